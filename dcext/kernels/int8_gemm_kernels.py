"""The Triton kernel behind ``int8_linear``: products with plain int8 weights.

``multiply`` computes ``y[m, n] = (float(sum_k q[m, k] w[n, k]) * row_scale[n]) * act_scale[m] + outliers + bias[n]``: int8
times int8 in int32, exact, or fp16/bf16 times the weights in that type, in fp32. Weights are (N, K), activations (M, K),
both row-major in rows of their own stride, so that both are K-major, as integer ``wgmma`` wants them.

One program takes a tile of ROWS rows and TOKENS tokens and walks over the columns COLS SPLITS at a time. Weights are the
left operand of the tensor cores: few tokens fill their narrow side (8 or 16 columns), and for W8A16 the weights go from
shared memory through registers, where they are converted, into the operand that may come from registers.

Launch: a one-dimensional grid. GROUP tiles of rows, one after the other, for each tile of tokens, so that programs that
run at the same time share weights and activations in L2. Shared memory: COLS SPLITS columns of both operands in each
stage. ``int8_gemm_tuning`` has the sizes.

What bounds it: up to some 128 tokens the memory that the weights come from, so that what counts is the bytes in flight,
and the programs; then tensor cores. Up to 16 tokens (and some of the choices up to 64) the warps of a program split its
columns between them (SPLITS) and add up in the end: tiles of 16 rows then keep all four warps at work, and N / 16
programs fill a GPU from N = 2048 on. Splitting columns between programs as well would need a second pass, which takes
longer (a launch, or a round trip through L2: 1 to 2 us) than it saves there.

On Hopper a large tile is bound by L2: 128 x 256 reads 48 bytes per clock and multiprocessor at the peak of the tensor
cores. Triton 3.6 and 3.7 keep ``wgmma`` in flight across steps for float32 sums only: after each step of int8 the tensor
cores of a warpgroup wait for the next, while the copies of later stages go on; two programs of 128 x 128 on a
multiprocessor fill each other's gaps.

Float sums (W8A16, outliers) have one order for each choice of sizes.

Compiled for sm_90, W8A8: 48 to 96 registers up to 16 tokens, 128 for 128 x 128, 209 to 255 for 32,768 outputs; none
spilled. sm_80, 100 and 120 take ``mma.sync`` for int8. Measured: nothing yet.
"""

import triton
import triton.language as tl

from dcext.kernels.activation_kernels import add_rn
from dcext.kernels.split_kernels import spread

_OUTLIERS = tl.constexpr(16)  # columns at a time


@triton.jit
def _tile_of_program(num_row_tiles, num_token_tiles, GROUP: tl.constexpr):
    """Row tile and token tile of this program."""
    program = tl.program_id(0)
    group = program // (GROUP * num_token_tiles)
    first = group * GROUP
    size = min(num_row_tiles - first, GROUP)
    inside = program - first * num_token_tiles
    return first + inside % size, inside // size


@triton.jit
def _multiply_columns(
    qweight,  # at the tile's first row
    x,  # at the tile's first token
    rows,  # of the matrix behind the tile's first
    tokens,
    K,
    qweight_stride,
    x_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(ROWS, TOKENS): sums of products over all columns."""
    ACC: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    row = tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    w_k = spread(tl.arange(0, COLS)[None, :], SPLITS, COLS)
    x_k = spread(tl.arange(0, COLS)[:, None], SPLITS, COLS)
    w_tile = qweight + (row * qweight_stride + w_k)
    x_tile = x + (token * x_stride + x_k)
    acc = tl.zeros((ROWS, TOKENS) if SPLITS == 1 else (SPLITS, ROWS, TOKENS), ACC)
    for first in range(0, K, SPLITS * COLS):
        w = tl.load(w_tile + first, (row < rows) & (w_k < K - first), 0)
        q = tl.load(x_tile + first, (token < tokens) & (x_k < K - first), 0)
        acc = tl.dot(w.to(q.dtype), q, acc, out_dtype=ACC)
    if SPLITS > 1:
        acc = tl.sum(acc, 0)
    return acc


@triton.jit
def _add_outliers(
    out,  # (ROWS, TOKENS) float32
    x,  # (M, K), at the tile's first token
    outlier_index,
    outlier_weight,  # (N, num_outliers), at the tile's first row
    num_outliers,
    rows,
    tokens,
    K,
):
    """Adds ``outlier_weight @ x[:, outlier_index].T`` to ``out`` in float32.

    bfloat16 and float16 are exact in tf32, and products of two of them in float32.
    """
    PRECISION: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    row = tl.arange(0, out.shape[0])[:, None]
    token = tl.arange(0, out.shape[1])[None, :]
    for first in range(0, num_outliers, _OUTLIERS):
        i = first + tl.arange(0, _OUTLIERS)
        k = tl.load(outlier_index + i, i < num_outliers, -1)[:, None]
        # Not outside of x, whatever the index says.
        v = tl.load(x + (token * K + k), (token < tokens) & (k >= 0) & (k < K), 0)
        w = tl.load(
            outlier_weight + (row * num_outliers + i[None, :]),
            (row < rows) & (i < num_outliers)[None, :],
            0,
        )
        out = tl.dot(w.to(tl.float32), v.to(tl.float32), out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["M", "num_outliers", "bucket"])
def multiply(
    qweight,  # (N, K) int8, rows qweight_stride apart
    prepared,  # (M, K) int8, float16 or bfloat16, rows prepared_stride apart
    row_scale,  # (N,) float32
    act_scale,  # (M,) float32, or None
    bias,  # (N,) float32, or None
    x,  # (M, K) float32, float16 or bfloat16: activations as they came, for outliers
    outlier_index,  # (num_outliers,) int32, or None
    outlier_weight,  # (N, num_outliers) bfloat16, or None
    y,  # (M, N)
    M,
    N,
    K,
    qweight_stride,
    prepared_stride,
    num_outliers,
    bucket,  # M as the key of the tuning has it
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,  # of a split in one step
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of rows times one of tokens."""
    row_tile, token_tile = _tile_of_program(tl.cdiv(N, ROWS), tl.cdiv(M, TOKENS), GROUP)
    # Offsets inside of a tile are 32 bits, where it begins is 64.
    first_row = (row_tile * ROWS).to(tl.int64)
    first_token = (token_tile * TOKENS).to(tl.int64)
    rows = N - row_tile * ROWS
    tokens = M - token_tile * TOKENS
    acc = _multiply_columns(
        qweight + first_row * qweight_stride,
        prepared + first_token * prepared_stride,
        rows,
        tokens,
        K,
        qweight_stride,
        prepared_stride,
        ROWS,
        TOKENS,
        COLS,
        SPLITS,
    )

    row = tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    out = acc.to(tl.float32) * tl.load(row_scale + first_row + row, row < rows, 0)[:, None]
    if act_scale is not None:
        out = out * tl.load(act_scale + first_token + token, token < tokens, 0)[None, :]
    if outlier_index is not None:
        out = _add_outliers(
            out,
            x + first_token * K,
            outlier_index,
            outlier_weight + first_row * num_outliers,
            num_outliers,
            rows,
            tokens,
            K,
        )
    if bias is not None:
        out = add_rn(out, tl.load(bias + first_row + row, row < rows, 0)[:, None])
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    y += first_token * N + first_row
    tl.store(y + (token[None, :] * N + row[:, None]), out.to(y.dtype.element_ty), mask)
