"""Linear layers on a GPU straight from packed weights. Importing this imports triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from dcext.config import ACTIVATIONS
from dcext.kernels import packed_kernels as kernels
from dcext.kernels.activation_kernels import quantize, scale
from dcext.kernels.activations import quantize_tile, scale_tile
from dcext.kernels.dispatch import to_autocast_dtype, without_gradient
from dcext.weights.packed import GROUP_COLS, PackedWeight

__all__ = ["PackedWeight", "packed_linear"]

_DTYPES = {
    "int8": (torch.float32, torch.bfloat16, torch.float16),
    "none": (torch.bfloat16, torch.float16),
}
_SMALL_TILE_TOKENS = 16  # up to here, warps split the columns of 16 rows between them
_MAX_TOKENS = 128  # of a program; more would not fit in its registers
_EXCEPTION_ELEMENTS = 4096  # products with exceptions that a program holds at a time
# A product and a sum stay apart, as in the kernels of the CPU.
_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activations: str = "int8",
) -> Tensor:
    """``(x * col_scale) @ (qweight * row_scale[:, None]).T + bias``, decoding ``qweight`` inside the product.

    With ``activations="int8"`` each token is quantized to int8 first, as ``dcext::quantize_activations`` does; sums
    are exact in int32, and outputs are the bits of ``dcext::linear``. With ``"none"``, ``x * col_scale`` and the weights
    are of the dtype of ``x``, and sums are float32 in an order that depends on the number of tokens alone. There are no
    gradients: where an argument requires one, backward raises ``NotImplementedError``. Under autocast ``x`` takes its
    dtype.

    Args:
        x: ``(..., in_features)`` on the device of ``weight``; float32, bfloat16 or float16 for ``"int8"``, bfloat16 or
            float16 for ``"none"``. Not modified.
        weight: the weights. On the CPU only under ``TRITON_INTERPRET=1``.
        row_scale: ``(out_features,)`` float32.
        col_scale: ``(in_features,)`` float32, or None for ones.
        bias: ``(out_features,)`` float32, or None.
        activations: ``"int8"`` or ``"none"``.

    Returns:
        ``(..., out_features)``, dtype of ``x``, on the current stream. A token with NaN or infinity gives NaN
        (``"int8"``).

    Raises:
        ValueError: a shape, dtype, device or name is not as above.
    """
    x = to_autocast_dtype(x)
    _check(x, weight, row_scale, col_scale, bias, activations)
    rows, cols = weight.shape
    tokens = x.reshape(-1, cols).contiguous()
    y = x.new_empty((len(tokens), rows))
    if len(tokens) > 0:
        with _on_device(x.device):
            config = _config(len(tokens), 1 if activations == "int8" else 2)
            has_exceptions = weight.exceptions is not None
            prepared = _prepare(tokens, col_scale, activations, config, has_exceptions)
            _multiply(prepared, weight, row_scale, bias, y, config)
    y = y.reshape(*x.shape[:-1], rows)
    return without_gradient("packed_linear", y, x, row_scale, col_scale, bias)


def _config(tokens: int, itemsize: int) -> dict[str, int]:
    """How ``multiply`` cuts its work: activations of ``itemsize`` bytes."""
    is_small = tokens <= _SMALL_TILE_TOKENS
    blocks, splits, groups = (1, 4, 8 // itemsize) if is_small else (4, 1, 4)
    tile_tokens = min(max(triton.next_power_of_2(tokens), 16), _MAX_TOKENS // itemsize)
    exception_tokens = 1 if tokens == 1 else tile_tokens
    at_once = _EXCEPTION_ELEMENTS // (16 * blocks * exception_tokens)
    return {
        "SPLITS": splits,
        "BLOCKS": blocks,
        "GROUPS": groups,
        "TOKENS": tile_tokens,
        "EXCEPTION_TOKENS": exception_tokens,
        "EXCEPTIONS_AT_ONCE": min(max(at_once, 1), 32),
    }


def _prepare(
    tokens: Tensor,
    col_scale: Tensor | None,
    activations: str,
    config: dict[str, int],
    transposed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Activations as ``multiply`` reads them, the same transposed or None, and scales of tokens or None."""
    num_tokens, cols = tokens.shape
    step = GROUP_COLS * config["GROUPS"] * config["SPLITS"]
    dtype = torch.int8 if activations == "int8" else tokens.dtype
    out = tokens.new_empty((num_tokens, triton.cdiv(cols, step) * step), dtype=dtype)
    out_t = None
    if transposed:  # rows of 16 tokens, so that they are aligned; few tokens stay close together
        stride = num_tokens if num_tokens < 16 else triton.cdiv(num_tokens, 16) * 16
        out_t = tokens.new_empty((cols, stride), dtype=dtype)
    stride_t = 0 if out_t is None else out_t.stride(0)
    sizes = (num_tokens, cols, out.shape[1], stride_t)
    written = max(num_tokens, stride_t)
    if activations == "none":
        tile = scale_tile(num_tokens, out.shape[1], transposed=transposed)
        grid = (triton.cdiv(written, tile["TOKENS"]), triton.cdiv(out.shape[1], tile["COLS"]))
        scale[grid](tokens, col_scale, out, out_t, *sizes, **tile)
        return out, out_t, None
    act_scale = tokens.new_empty(num_tokens, dtype=torch.float32)
    tile = quantize_tile(num_tokens, out.shape[1], transposed=transposed)
    quantize[(triton.cdiv(written, tile["TOKENS"]),)](
        tokens, col_scale, out, out_t, act_scale, *sizes, **tile
    )
    return out, out_t, act_scale


def _multiply(
    prepared: tuple[Tensor, Tensor | None, Tensor | None],
    weight: PackedWeight,
    row_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: dict[str, int],
) -> None:
    out, out_t, act_scale = prepared
    tiles = weight.tiles[config["BLOCKS"]]
    exceptions = weight.exceptions
    kernels.multiply[len(tiles), triton.cdiv(len(out), config["TOKENS"])](
        weight.payload,
        tiles,
        *((None,) * 3 if exceptions is None else exceptions.tensors()),
        out,
        out_t,
        row_scale,
        act_scale,
        bias,
        y,
        len(out),
        *weight.shape,
        out.shape[1],
        0 if out_t is None else out_t.stride(0),
        **config,
        **_OPTIONS,
    )


def _check(
    x: Tensor,
    weight: PackedWeight,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    activations: str,
) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"packed_linear: activations: expected one of {ACTIVATIONS}, got {activations!r}"
        )
    rows, cols = weight.shape
    dtypes = _DTYPES[activations]
    if x.dtype not in dtypes or x.dim() == 0 or x.shape[-1] != cols:
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"packed_linear: x: expected (..., {cols}) of {names} for activations={activations!r}, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if weight.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"packed_linear: weight: expected on a GPU, got on {weight.device}")
    vectors = (("row_scale", row_scale, rows), ("col_scale", col_scale, cols), ("bias", bias, rows))
    for name, vector, size in vectors:
        if vector is None:
            continue
        if vector.shape != (size,) or vector.dtype != torch.float32 or not vector.is_contiguous():
            raise ValueError(
                f"packed_linear: {name}: expected contiguous ({size},) torch.float32, "
                f"got {tuple(vector.shape)} {vector.dtype}"
            )
    for name, tensor in (("x", x), *((name, vector) for name, vector, _ in vectors)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"packed_linear: {name}: expected on {weight.device}, got on {tensor.device}"
            )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
