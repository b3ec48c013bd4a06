"""Triton kernels behind ``packed_linear``: products with packed weights that are decoded in registers.

Activations are what ``activation_kernels`` prepares, transposed too for the exceptions where there are any.

``multiply`` computes ``y[m, n] = (float(sum_k q[m, k] w[n, k]) * row_scale[n]) * act_scale[m] + bias[n]``: int8 times
int8 in int32, exact, or fp16/bf16 times the weights in that type, in fp32. One program takes a tile of 16 BLOCKS rows of
one panel, whose width is the same for all its threads, and TOKENS tokens, and walks over the columns 32 GROUPS SPLITS at
a time. Weights are the left operand of the tensor cores, so that few tokens fill them. In small tiles each warp takes
other columns (SPLITS), to be added up in the end.

Codes are loaded as they are stored, in vectors of 16 bytes: of each block and piece, GROUPS runs of 64 bytes. The eight words
that ``packed_lookup`` makes of four pieces are 32 consecutive columns of a row, so that reshape and permute only name
what the registers hold already.

Exceptions come first, as the value that sums start from: the columns of a row pick rows of the transposed activations.
Their order is fixed, and so is that of float sums.

Launch: (tiles, tokens / TOKENS) programs of four warps. Shared memory: activations and codes in stages, 72 KiB at most.
Compiled for sm_90, W8A8: 96 registers up to 16 tokens, 174 for 128, none spilled; up to 16 tokens the loop has 2.3, 2.6,
3.3, 5.8 and 9.3 instructions per weight at widths 2 to 6. Measured: nothing yet.
"""

import triton
import triton.language as tl

from dcext.kernels.packed_lookup import lookup_asm, lookup_constraints, table_words
from dcext.kernels.split_kernels import spread

_HAS_ASM = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter looks up in memory
_BLOCK_ROWS = tl.constexpr(16)
_GROUP_COLS = tl.constexpr(32)
_PIECE = tl.constexpr(64)
_RAW_WIDTH = tl.constexpr(8)


@triton.jit
def _load_table(table, WIDTH: tl.constexpr):
    """The table's words, as a tuple of scalars."""
    words = table.to(tl.pointer_type(tl.int32), bitcast=True)
    loaded = (tl.load(words),)
    for i in tl.static_range(1, table_words(WIDTH)):
        loaded += (tl.load(words + i),)
    return loaded


@triton.jit
def _look_up_in_memory(stored, table, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """What ``lookup_asm`` computes, a load for each weight."""
    low = stored[0]
    high = stored[len(stored) - 1]
    if WIDTH <= 3:
        low = low >> (PIECE // 2 * 2) & 0x33
    if WIDTH == 3:
        low |= (high >> PIECE & 0x11) << 2
    low_code, high_code = low & 15, low >> 4
    if WIDTH == 5:
        low_code |= (high >> PIECE & 1) << 4
        high_code |= (high >> PIECE + 4 & 1) << 4
    if WIDTH == 6:
        low_code |= (high >> (PIECE // 2 * 2) & 3) << 4
        high_code |= (high >> (PIECE // 2 * 2 + 4) & 3) << 4
    weights = table.to(tl.pointer_type(tl.int8), bitcast=True)
    return tl.load(weights + low_code.to(tl.int32)), tl.load(weights + high_code.to(tl.int32))


@triton.jit
def _decode_piece(codes, live, table, words, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Weights of columns 4 PIECE + c, and of 16 + 4 PIECE + c, of all groups of a tile of codes.

    codes: pointers to the first piece of each group, (slots, 64 GROUPS). Returns two tensors of that shape.
    """
    if WIDTH == 2:
        stored = (tl.load(codes + PIECE % 2 * _PIECE, live, 0),)
    elif WIDTH == 3:
        stored = (
            tl.load(codes + PIECE % 2 * _PIECE, live, 0),
            tl.load(codes + 2 * _PIECE, live, 0),
        )
    else:
        stored = (tl.load(codes + PIECE * _PIECE, live, 0),)
        if WIDTH == 5:
            stored += (tl.load(codes + 4 * _PIECE, live, 0),)
        elif WIDTH == 6:
            stored += (tl.load(codes + (4 + PIECE % 2) * _PIECE, live, 0),)
    if not _HAS_ASM:
        return _look_up_in_memory(stored, table, WIDTH, PIECE)
    return tl.inline_asm_elementwise(
        lookup_asm(WIDTH, PIECE),
        lookup_constraints(WIDTH),
        stored + words,
        dtype=(tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _decode(
    codes,
    live,
    table,
    words,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """(SPLITS, 16 BLOCKS, 32 GROUPS) int8 weights, or without the first dimension."""
    low0, high0 = _decode_piece(codes, live, table, words, WIDTH, 0)
    low1, high1 = _decode_piece(codes, live, table, words, WIDTH, 1)
    low2, high2 = _decode_piece(codes, live, table, words, WIDTH, 2)
    low3, high3 = _decode_piece(codes, live, table, words, WIDTH, 3)
    low = tl.join(tl.join(low0, low1), tl.join(low2, low3))
    high = tl.join(tl.join(high0, high1), tl.join(high2, high3))
    # split, block, group, row, column, piece % 2, piece // 2, half
    w = tl.join(low, high).reshape(SPLITS, BLOCKS, GROUPS, _BLOCK_ROWS, 4, 2, 2, 2)
    w = w.permute(0, 1, 3, 2, 7, 6, 5, 4)
    if SPLITS == 1:
        return w.reshape(BLOCKS * _BLOCK_ROWS, GROUPS * _GROUP_COLS)
    else:
        return w.reshape(SPLITS, BLOCKS * _BLOCK_ROWS, GROUPS * _GROUP_COLS)


@triton.jit
def _multiply_packed(
    acc,  # (SPLITS, 16 BLOCKS, TOKENS) int32 or float32; (16 BLOCKS, TOKENS) for one split
    codes,  # the tile's first code
    table,
    rows,  # of the tile
    x,  # pointers to the columns of the first step, (SPLITS, 32 GROUPS, TOKENS) or without the first
    x_mask,
    groups,  # of a row
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Adds the products of a tile that is stored packed."""
    words = _load_table(table, WIDTH) if _HAS_ASM else ()
    slot = tl.arange(0, SPLITS * BLOCKS)
    split, block = slot // BLOCKS, slot % BLOCKS
    byte = tl.arange(0, GROUPS * _PIECE)
    group = (split * GROUPS)[:, None] + (byte // _PIECE)[None, :]
    offset = (block * groups)[:, None] + group
    codes += offset * (WIDTH * _PIECE) + (byte % _PIECE)[None, :]
    is_row = (block * _BLOCK_ROWS < rows)[:, None]
    for first in range(0, groups, SPLITS * GROUPS):
        live = is_row & (first + group < groups)
        step = codes + first * (WIDTH * _PIECE)
        w = _decode(step, live, table, words, WIDTH, SPLITS, BLOCKS, GROUPS)
        x_tile = tl.load(x + first * _GROUP_COLS, x_mask, 0)
        acc = tl.dot(w.to(x_tile.dtype), x_tile, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _multiply_raw(
    acc,
    weights,
    rows,
    x,
    x_mask,
    K,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Adds the products of a tile that is stored raw; arguments as above."""
    COLS: tl.constexpr = GROUPS * _GROUP_COLS
    row = tl.arange(0, BLOCKS * _BLOCK_ROWS)[:, None]
    k = spread(tl.arange(0, COLS)[None, :], SPLITS, COLS)
    weights = weights.to(tl.pointer_type(tl.int8), bitcast=True) + row * K + k
    for first in range(0, K, SPLITS * COLS):
        w = tl.load(weights + first, (row < rows) & (first + k < K), 0)
        x_tile = tl.load(x + first, x_mask, 0)
        acc = tl.dot(w.to(x_tile.dtype), x_tile, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _sum_exceptions(
    row_ptr,
    column,
    delta,
    row,  # (ROWS,)
    is_row,
    x_t,  # (K, stride_t), at the first token
    stride_t,
    is_token,  # (TOKENS,)
    ACC: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """(ROWS, TOKENS): what a row's exceptions add to its products with code 0 in their place."""
    ROWS: tl.constexpr = row.shape[0]
    TOKENS: tl.constexpr = is_token.shape[0]
    first = tl.load(row_ptr + row, is_row, 0)
    last = tl.load(row_ptr + row + 1, is_row, 0)
    total = tl.zeros((ROWS, TOKENS), ACC)
    for begin in tl.range(0, tl.max(last - first, 0), AT_ONCE, num_stages=3):
        i = first[None, :] + begin + tl.arange(0, AT_ONCE)[:, None]
        is_exception = i < last[None, :]
        k = tl.load(column + i, is_exception, 0).to(tl.int64)
        d = tl.load(delta + i, is_exception, 0)
        x = tl.load(
            x_t + (k * stride_t)[:, :, None] + tl.arange(0, TOKENS)[None, None, :],
            is_exception[:, :, None] & is_token[None, None, :],
            0,
        )
        total += tl.sum(d.to(ACC)[:, :, None] * x.to(ACC), 0)
    return total


@triton.jit(do_not_specialize=["M"])
def multiply(
    payload,  # 1-D uint8
    tiles,  # (tiles, 5) int64, see PackedWeight
    row_ptr,  # (N + 1,) int32, or None without exceptions
    column,  # (exceptions,) int32, or None
    delta,  # (exceptions,) int16, or None
    x,  # (M, padded) int8, float16 or bfloat16: prepared activations
    x_t,  # (K, stride_t), the same transposed, or None
    row_scale,  # (N,) float32
    act_scale,  # (M,) float32, or None
    bias,  # (N,) float32, or None
    y,  # (M, N)
    M,
    N,
    K,
    padded,
    stride_t,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXCEPTION_TOKENS: tl.constexpr,  # TOKENS, or 1 where M is 1
    EXCEPTIONS_AT_ONCE: tl.constexpr,
):
    """One tile of rows times TOKENS tokens."""
    ACC: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    ROWS: tl.constexpr = BLOCKS * _BLOCK_ROWS
    tiles += tl.program_id(0) * 5
    codes = payload + tl.multiple_of(tl.load(tiles), 16)
    table = payload + tl.multiple_of(tl.load(tiles + 1), 64)
    first_row = tl.load(tiles + 2)
    rows = tl.load(tiles + 3).to(tl.int32)
    width = tl.load(tiles + 4).to(tl.int32)
    row = tl.arange(0, ROWS)
    is_row = row < rows
    first_token = (tl.program_id(1) * TOKENS).to(tl.int64)
    token = tl.arange(0, TOKENS)
    is_token = first_token + token < M

    acc = tl.zeros((ROWS, TOKENS), ACC)
    if row_ptr is not None:
        exception_token = tl.arange(0, EXCEPTION_TOKENS)
        acc += _sum_exceptions(
            row_ptr + first_row,
            column,
            delta,
            row,
            is_row,
            x_t + first_token,
            stride_t,
            first_token + exception_token < stride_t,  # aligned, other than M
            ACC,
            EXCEPTIONS_AT_ONCE,
        )
    if SPLITS > 1:
        acc = tl.where((tl.arange(0, SPLITS) == 0)[:, None, None], acc[None, :, :], 0)

    x_k = spread(tl.arange(0, GROUPS * _GROUP_COLS)[:, None], SPLITS, GROUPS * _GROUP_COLS)
    x_tile = x + first_token * padded + x_k + (token * padded)[None, :]
    x_mask = is_token[None, :]
    groups = tl.cdiv(K, _GROUP_COLS)
    for WIDTH in tl.static_range(2, 7):
        if width == WIDTH:
            acc = _multiply_packed(
                acc, codes, table, rows, x_tile, x_mask, groups, WIDTH, SPLITS, BLOCKS, GROUPS
            )
    if width == _RAW_WIDTH:
        acc = _multiply_raw(acc, codes, rows, x_tile, x_mask, K, SPLITS, BLOCKS, GROUPS)

    if SPLITS > 1:
        acc = tl.sum(acc, 0)
    out = acc.to(tl.float32) * tl.load(row_scale + first_row + row, is_row, 0)[:, None]
    if act_scale is not None:
        out = out * tl.load(act_scale + first_token + token, is_token, 0)[None, :]
    if bias is not None:
        out = out + tl.load(bias + first_row + row, is_row, 0)[:, None]
    y += first_token * N + first_row
    mask = is_row[:, None] & is_token[None, :]
    tl.store(y + row[:, None] + token.to(tl.int64)[None, :] * N, out.to(y.dtype.element_ty), mask)
