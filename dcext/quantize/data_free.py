"""Recipe ``data-free``: rounding to nearest with row-wise steps at a target size, for those without calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.codec import entropy
from dcext.quantize.feedback import MAX_LEVEL
from dcext.quantize.quantized import QuantizedWeight, to_bfloat16_values


def round_data_free(weight: Tensor, target_bits: float) -> QuantizedWeight:
    """Rounds to nearest with steps proportional to the square root of each row's root mean square.

    Equal steps would be best if all outputs mattered alike, steps proportional to the rows' size if all outputs had the
    same tolerance relative to their own size; without data, the middle is the safe choice.

    Args:
        weight: ``(N, K)`` floating point, finite.
        target_bits: order-0 entropy of the integers, bits per weight. Steps are larger where int8 would not hold them.

    Returns:
        Without ``col_scale``; all rows that are zero have scale 1.

    Raises:
        ValueError: NaN or infinity.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("round_data_free: weight: expected finite values, got NaN or inf")
    rms = weight.square().mean(1).sqrt()
    if not bool((rms > 0).any()):
        return QuantizedWeight(torch.zeros_like(weight, dtype=torch.int8), torch.ones_like(rms))
    shape = torch.where(rms > 0, rms, rms.max()).sqrt()
    least = weight.abs().amax(1) / MAX_LEVEL * 1.01

    def rounded(scale: float) -> QuantizedWeight:
        row_scale = to_bfloat16_values(torch.maximum(scale * shape, least))
        levels = (weight / row_scale[:, None]).round_().clamp_(-MAX_LEVEL, MAX_LEVEL)
        return QuantizedWeight(levels.to(torch.int8), row_scale)

    # No row is clamped at any scale, so the entropy falls with it, and capped rows are made up for by the others.
    high = 2 * float((weight / shape[:, None]).abs().max())
    low = high * 1e-6
    while high > low * 1.001:
        middle = (low * high) ** 0.5
        if entropy(rounded(middle).qweight) > target_bits:
            low = middle
        else:
            high = middle
    return rounded(high)
