"""Linear layers on a GPU with plain int8 weights. Importing this registers ``dcext::int8_linear`` and imports triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from dcext.config import ACTIVATIONS
from dcext.kernels.activation_kernels import quantize, scale
from dcext.kernels.activations import quantize_tile, scale_tile
from dcext.kernels.dispatch import to_autocast_dtype
from dcext.kernels.int8_gemm_tuning import token_bucket, tuned_multiply

__all__ = ["int8_linear"]

_DTYPES = {
    "int8": (torch.float32, torch.bfloat16, torch.float16),
    "none": (torch.bfloat16, torch.float16),
}
_MAX_COLS = 2**17  # sums of so many products of -128 and 127 fit in int32
_MAX_STRIDE = 2**22  # offsets inside of a tile of up to 256 rows or tokens fit in int32
_ALIGNMENT_BYTES = 16  # of rows, for loads of whole vectors
_IS_INTERPRETED = triton.knobs.runtime.interpret
# Interpreted kernels cannot be traced.
wrap_triton: Any = (lambda kernel: kernel) if _IS_INTERPRETED else torch.library.wrap_triton


def _grid(tokens: int, rows: int) -> Any:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(tokens, meta["TOKENS"]),)

    return grid


def _prepare(
    tokens: Tensor, col_scale: Tensor | None, activations: str
) -> tuple[Tensor, Tensor | None]:
    """Activations as ``multiply`` reads them, and scales of tokens or None."""
    num_tokens, cols = tokens.shape
    itemsize = 1 if activations == "int8" else tokens.element_size()
    padded = triton.cdiv(cols * itemsize, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES // itemsize
    if activations == "none":
        if col_scale is None and padded == cols:
            return tokens, None
        out = tokens.new_empty((num_tokens, padded))
        tile = scale_tile(num_tokens, padded)
        grid = (num_tokens, triton.cdiv(padded, tile["COLS"]))
        wrap_triton(scale)[grid](tokens, col_scale, out, None, num_tokens, cols, padded, 0, **tile)
        return out, None
    out = tokens.new_empty((num_tokens, padded), dtype=torch.int8)
    act_scale = tokens.new_empty((num_tokens,), dtype=torch.float32)
    tile = quantize_tile(num_tokens, padded)
    wrap_triton(quantize)[(num_tokens,)](
        tokens, col_scale, out, None, act_scale, num_tokens, cols, padded, 0, **tile
    )
    return out, act_scale


def _check(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    activations: str,
) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"int8_linear: activations: expected one of {ACTIVATIONS}, got {activations!r}"
        )
    if qweight.dtype != torch.int8 or qweight.dim() != 2 or 0 in qweight.shape:
        raise ValueError(
            f"int8_linear: qweight: expected 2-D torch.int8, not empty, got {tuple(qweight.shape)} {qweight.dtype}"
        )
    rows, cols = qweight.shape
    if cols > _MAX_COLS:
        raise ValueError(f"int8_linear: qweight: expected at most {_MAX_COLS} columns, got {cols}")
    if cols > 1 and qweight.stride(1) != 1:
        raise ValueError(
            f"int8_linear: qweight: expected contiguous rows, got strides {qweight.stride()}"
        )
    if max(rows, qweight.stride(0)) > _MAX_STRIDE:
        raise ValueError(
            f"int8_linear: qweight: expected at most {_MAX_STRIDE} rows, no farther apart, "
            f"got {rows} and strides {qweight.stride()}"
        )
    if qweight.device.type != "cuda" and not _IS_INTERPRETED:
        raise ValueError(f"int8_linear: qweight: expected on a GPU, got on {qweight.device}")
    dtypes = _DTYPES[activations]
    if x.dtype not in dtypes or x.dim() == 0 or x.shape[-1] != cols:
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"int8_linear: x: expected (..., {cols}) of {names} for activations={activations!r}, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if (outlier_index is None) != (outlier_weight is None):
        raise ValueError("int8_linear: outliers: expected both of index and weight, got one")
    num_outliers = 0 if outlier_index is None else outlier_index.numel()
    arrays: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("row_scale", row_scale, (rows,), torch.float32),
        ("col_scale", col_scale, (cols,), torch.float32),
        ("bias", bias, (rows,), torch.float32),
        ("outlier_index", outlier_index, (num_outliers,), torch.int32),
        ("outlier_weight", outlier_weight, (rows, num_outliers), torch.bfloat16),
    ]
    for name, array, shape, dtype in arrays:
        if array is None:
            continue
        if array.shape != shape or array.dtype != dtype or not array.is_contiguous():
            raise ValueError(
                f"int8_linear: {name}: expected contiguous {shape} {dtype}, "
                f"got {tuple(array.shape)} {array.dtype}"
            )
    for name, tensor in (("x", x), *((name, array) for name, array, _, _ in arrays)):
        if tensor is not None and tensor.device != qweight.device:
            raise ValueError(
                f"int8_linear: {name}: expected on {qweight.device}, got on {tensor.device}"
            )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device. Tensors that are only traced may be of a GPU that is not there."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


# Behind what it calls: torch looks for kernels there, for the keys of its caches, when this is registered.
@torch.library.triton_op("dcext::int8_linear", mutates_args=())
def _int8_linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    activations: str,
) -> Tensor:
    _check(x, qweight, row_scale, col_scale, bias, outlier_index, outlier_weight, activations)
    rows, cols = qweight.shape
    tokens = x.reshape(-1, cols).contiguous()
    num_tokens = tokens.shape[0]
    y = x.new_empty((num_tokens, rows))
    if num_tokens > 0:
        with _on_device(x.device):
            prepared, act_scale = _prepare(tokens, col_scale, activations)
            is_static = isinstance(num_tokens, int)  # torch.compile tunes without a key
            bucket = token_bucket(num_tokens) if is_static else 0
            kernel = tuned_multiply(num_tokens, prepared.element_size())
            wrap_triton(kernel)[_grid(num_tokens, rows)](
                qweight,
                prepared,
                row_scale,
                act_scale,
                bias,
                tokens,
                outlier_index,
                outlier_weight,
                y,
                num_tokens,
                rows,
                cols,
                qweight.stride(0),
                prepared.stride(0),
                0 if outlier_index is None else outlier_index.shape[0],
                bucket,
            )
    return y.reshape(*x.shape[:-1], rows)


@_int8_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    outlier_index: Tensor | None,
    outlier_weight: Tensor | None,
    activations: str,
) -> Tensor:
    _check(x, qweight, row_scale, col_scale, bias, outlier_index, outlier_weight, activations)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


# Not register_autocast, which would cast scales and outlier columns too.
_autocast_library = torch.library.Library("dcext", "IMPL")
for _key in (torch._C.DispatchKey.AutocastCUDA, torch._C.DispatchKey.AutocastCPU):

    def _autocast(x: Tensor, *others: Any, key: torch._C.DispatchKey = _key) -> Tensor:
        x = to_autocast_dtype(x)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _int8_linear(x, *others)

    _autocast_library.impl("int8_linear", _autocast, _key.name)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    activations: str = "int8",
) -> Tensor:
    """``(x * col_scale) @ (qweight * row_scale[:, None]).T + bias``, and the products of outlier columns.

    With ``activations="int8"`` (W8A8) each token is quantized to int8 first, as ``dcext::quantize_activations`` does;
    sums are exact in int32, and without outlier columns outputs are the bits of ``dcext::linear``. With ``"none"``
    (W8A16), ``x * col_scale`` and the weights are of the dtype of ``x``, and sums are float32. The order of float sums
    depends on sizes and on the tiles that were found to be fastest (see ``int8_gemm_tuning``), and on nothing else.

    There are no gradients: where an argument requires one, backward raises ``RuntimeError``. Under autocast ``x`` takes
    its dtype.

    The same as ``torch.ops.dcext.int8_linear``, which takes the two tensors of ``outliers`` one by one and has no defaults.

    Args:
        x: ``(..., in_features)`` on the device of ``qweight``; float32, bfloat16 or float16 for ``"int8"``, bfloat16 or
            float16 for ``"none"``. Not modified.
        qweight: ``(out_features, in_features)`` int8, rows contiguous and at most 2^22 apart, fast where that is a
            multiple of 16; at most 2^22 rows and 2^17 columns. On the CPU only under ``TRITON_INTERPRET=1``.
        row_scale: ``(out_features,)`` float32.
        col_scale: ``(in_features,)`` float32, or None for ones.
        bias: ``(out_features,)`` float32, or None.
        outliers: column indices ``(n,)`` int32 and weights ``(out_features, n)`` bfloat16, or None. The columns are
            zero in ``qweight``; the products of ``x``, not scaled, are float32 sums. A column that is not in
            ``[0, in_features)`` counts as zeros.
        activations: ``"int8"`` or ``"none"``.

    Returns:
        ``(..., out_features)``, dtype of ``x``, on the current stream. A token with NaN or infinity gives NaN
        (``"int8"``).

    Raises:
        ValueError: a shape, dtype, device or name is not as above.
    """
    index, weight = (None, None) if outliers is None else outliers
    return _int8_linear(x, qweight, row_scale, col_scale, bias, index, weight, activations)
