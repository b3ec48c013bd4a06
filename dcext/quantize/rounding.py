"""Rounding to int8."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_absmax(weight: Tensor, granularity: str = "row") -> tuple[Tensor, Tensor]:
    """Symmetric INT8: ``row_scale = absmax / 127``, ``qweight = round(weight / row_scale)``, half to even.

    Args:
        weight: ``(out_features, in_features)`` floating point, finite. Not modified.
        granularity: ``"row"`` or ``"tensor"`` absmax; a tensor's scale is repeated for every row.

    Returns:
        ``qweight`` ``(out_features, in_features)`` int8 in [-127, 127], and ``row_scale`` ``(out_features,)`` float32.
        Rows that are zero get scale 1.

    Raises:
        TypeError: ``weight`` is not floating point.
        ValueError: it is not 2-D, or holds NaN or infinity; an unknown granularity.
    """
    if not weight.is_floating_point():
        raise TypeError(f"quantize_absmax: weight: expected floating point, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(
            f"quantize_absmax: weight: expected 2 dimensions, got {tuple(weight.shape)}"
        )
    if granularity not in ("row", "tensor"):
        raise ValueError(
            f"quantize_absmax: granularity: expected 'row' or 'tensor', got {granularity!r}"
        )
    weight = weight.detach().float()
    absmax = weight.abs().amax(dim=1)
    if not torch.isfinite(absmax).all():
        rows = int((~torch.isfinite(absmax)).sum())
        raise ValueError(
            f"quantize_absmax: weight: expected finite values, got NaN or inf in {rows} rows"
        )
    if granularity == "tensor":
        absmax = absmax.max().expand_as(absmax)
    row_scale = torch.where(absmax > 0, absmax / 127, torch.ones_like(absmax)).contiguous()
    qweight = (weight / row_scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return qweight, row_scale
