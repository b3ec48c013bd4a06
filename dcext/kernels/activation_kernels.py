"""Triton kernels that prepare activations for a product: scaled, and for W8A8 quantized, in rows that begin aligned.

Both read ``x``, (tokens M, columns K) row-major, and write rows of ``padded`` columns with zeros behind K; and on request
the same transposed, (K, stride_t).

Launch: ``scale`` one program for TOKENS tokens and COLS columns, ``quantize`` for TOKENS tokens; the warps and the rest
are what ``activations`` says. Memory-bound: a token that fits in a program's registers (WHOLE) is read once, others
twice, the second time from cache. Shared memory: what the maximum over a row's threads takes. Measured: nothing yet.
"""

import triton
import triton.language as tl

_HAS_ASM = tl.constexpr(not triton.knobs.runtime.interpret)
_SMALLEST_ABSMAX = tl.constexpr(1e-36)  # below, 127 / absmax overflows; such tokens are zero
_LARGEST = tl.constexpr(3.4028234663852886e38)  # float32; torch.compile cannot copy infinity
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to integers, half to even
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def add_rn(a, b):
    """Sum of float32, not fused with a product before it, whatever the compiler is told.

    The options of a launch would tell it, but torch.compile does not hand them on.
    """
    if _HAS_ASM:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a + b


@triton.jit
def _load_scaled(x, col_scale, m, k, M, K):
    """(TOKENS, COLS) float32 of x * col_scale, zeros outside."""
    mask = (m < M)[:, None] & (k < K)[None, :]
    v = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask, 0).to(tl.float32)
    if col_scale is not None:
        v = v * tl.load(col_scale + k, k < K, 0)[None, :]
    return v


@triton.jit
def _store_prepared(value, out, out_t, m, k, M, K, padded, stride_t):
    """Stores activations, and transposed if that is wanted."""
    rows = m.to(tl.int64)[:, None] * padded
    tl.store(out + rows + k[None, :], value, (m < M)[:, None] & (k < padded)[None, :])
    if out_t is not None:
        cols = k.to(tl.int64)[None, :] * stride_t
        # Behind the last token too, where rows are padded: stores of whole vectors need an aligned mask.
        tl.store(out_t + cols + m[:, None], value, (m < stride_t)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def scale(
    x,  # (M, K) float16 or bfloat16
    col_scale,  # (K,) float32, or None
    out,  # (M, padded), dtype of x
    out_t,  # (K, stride_t), dtype of x, or None
    M,
    K,
    padded,
    stride_t,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Computes x * col_scale."""
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1) * COLS + tl.arange(0, COLS)
    v = _load_scaled(x, col_scale, m, k, M, K).to(out.dtype.element_ty)
    _store_prepared(v, out, out_t, m, k, M, K, padded, stride_t)


@triton.jit
def _finite_or_infinity(v):
    """|v|, infinity for NaN too."""
    v = tl.abs(v)
    return tl.where(v <= _LARGEST, v, float("inf"))


@triton.jit
def _rounded(v, inverse, is_nonzero):
    """int8 of v * inverse, rounded half to even; |v * inverse| <= 127 (1 + 2^-23), so there is nothing to clamp."""
    v = tl.where(is_nonzero[:, None], v * inverse[:, None], 0.0)
    v = add_rn(v, tl.full(v.shape, _ROUND, tl.float32))
    return (v.to(tl.int32, bitcast=True) - _ROUND_BITS).to(tl.int8)


@triton.jit(do_not_specialize=["M"])
def quantize(
    x,  # (M, K) float32, float16 or bfloat16
    col_scale,  # (K,) float32, or None
    out,  # (M, padded) int8
    out_t,  # (K, stride_t) int8, or None
    act_scale,  # (M,) float32
    M,
    K,
    padded,
    stride_t,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,  # COLS >= padded
):
    """Computes act_scale = max|v| / 127 and out = round_half_even(v * (127 / max|v|)), v = x * col_scale.

    A token that is not finite has scale NaN and zeros.
    """
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first_k = tl.arange(0, COLS)
    if WHOLE:
        whole = _load_scaled(x, col_scale, m, first_k, M, K)
        largest = _finite_or_infinity(whole)
    else:
        largest = tl.zeros((TOKENS, COLS), tl.float32)
        for begin in range(0, K, COLS):
            v = _load_scaled(x, col_scale, m, begin + first_k, M, K)
            largest = tl.maximum(largest, _finite_or_infinity(v))
    absmax = tl.max(largest, 1)
    is_finite = absmax <= _LARGEST
    is_nonzero = is_finite & (absmax >= _SMALLEST_ABSMAX)
    seven_bits = tl.full((TOKENS,), 127.0, tl.float32)
    token_scale = tl.div_rn(tl.where(is_finite, absmax, 0.0), seven_bits)
    tl.store(act_scale + m, tl.where(is_finite, token_scale, float("nan")), m < M)
    inverse = tl.div_rn(seven_bits, tl.where(is_nonzero, absmax, 1.0))
    if WHOLE:
        q = _rounded(whole, inverse, is_nonzero)
        _store_prepared(q, out, out_t, m, first_k, M, K, padded, stride_t)
    else:
        for begin in range(0, padded, COLS):
            k = begin + first_k
            q = _rounded(_load_scaled(x, col_scale, m, k, M, K), inverse, is_nonzero)
            _store_prepared(q, out, out_t, m, k, M, K, padded, stride_t)
