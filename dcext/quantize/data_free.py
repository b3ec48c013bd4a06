"""Recipe ``data-free``: rounding to nearest with row-wise steps at a target size, for those without calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.quantize.feedback import MAX_LEVEL
from dcext.quantize.quantized import QuantizedWeight, to_bfloat16_values
from dcext.quantize.rate import predicted_entropy

SEARCH_STEPS = 40


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
    normalized = weight / shape[:, None]
    low, high = float(normalized.abs().max()) / 1e6, float(normalized.abs().max()) * 2
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5
        if predicted_entropy(normalized.flatten(), middle) > target_bits:
            low = middle
        else:
            high = middle
        if high < low * 1.001:
            break
    least = weight.abs().amax(1) / MAX_LEVEL
    row_scale = to_bfloat16_values(torch.maximum(high * shape, least * 1.01))
    qweight = (weight / row_scale[:, None]).round_().clamp_(-MAX_LEVEL, MAX_LEVEL).to(torch.int8)
    return QuantizedWeight(qweight, row_scale)
