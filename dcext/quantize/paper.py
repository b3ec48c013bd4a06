"""Recipe ``paper``: importance scaling, INT8 per tensor, pruning by importance (arXiv:2502.15443)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcext.quantize.quantized import QuantizedWeight, entropy_of_counts, to_bfloat16_values
from dcext.quantize.rounding import quantize_absmax

ALPHAS = tuple(i / 10 for i in range(11))


def importance_scale(absmax: Tensor, alpha: float) -> Tensor:
    """``s_i = max|X_i| ^ alpha``: how much each input channel's weights grow before they are quantized.

    Args:
        absmax: ``(K,)``, ``max|X_i|`` over the calibration text. Channels that are always zero get s = 1.
        alpha: 0 leaves the weights alone.

    Returns:
        ``(K,)`` float32, positive; values whose inverses are bfloat16's, so that ``col_scale = 1 / s`` costs 16 bits.
    """
    scale = torch.where(absmax > 0, absmax.float(), torch.ones_like(absmax, dtype=torch.float32))
    return 1 / to_bfloat16_values(scale.clamp(2.0**-120, 2.0**120).pow(-alpha))


def quantize_scaled(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Per-tensor absmax INT8 of ``W diag(s)``.

    Args:
        weight: ``(N, K)`` floating point.
        scale: ``(K,)``, s.

    Returns:
        ``qweight`` ``(N, K)`` int8 and ``row_scale`` ``(N,)`` float32 with one value.
    """
    return quantize_absmax(weight.float() * scale, "tensor")


def prune(qweight: Tensor, absmax: Tensor, sparsity: float, granularity: str = "tensor") -> Tensor:
    """Zeroes the integers of lowest score ``max|X_i| * |q_ij|``.

    Args:
        qweight: ``(N, K)`` int8. Not modified.
        absmax: ``(K,)``, ``max|X_i|``.
        sparsity: share of all weights that shall be zero, those that are zero already included; in [0, 1).
        granularity: the share is taken of the whole ``"tensor"`` or of each ``"row"``.

    Returns:
        ``(N, K)`` int8. Ties at the threshold are broken by position, so that the share is exact.
    """
    if sparsity == 0:
        return qweight
    score = qweight.float().abs() * absmax.float()
    if granularity == "tensor":
        score = score.reshape(1, -1)
    count = round(sparsity * score.shape[1])
    order = score.argsort(dim=1, stable=True)[:, :count]
    pruned = qweight.reshape(score.shape).clone()
    pruned.scatter_(1, order, 0)
    return pruned.reshape(qweight.shape)


def quantize_paper(
    weight: Tensor, absmax: Tensor, alpha: float, sparsity: float, granularity: str = "tensor"
) -> QuantizedWeight:
    """All of the recipe for one matrix: scale, quantize, prune. Arguments as for the functions above."""
    scale = importance_scale(absmax, alpha)
    qweight, row_scale = quantize_scaled(weight, scale)
    pruned = prune(qweight, absmax, sparsity, granularity)
    return QuantizedWeight(pruned, row_scale, None if alpha == 0 else to_bfloat16_values(1 / scale))


def alpha_cost(bits: float, relative_error: float) -> float:
    """What an alpha is judged by: its bits, and its error at six decibels a bit.

    Halving every step costs one bit and quarters the error, so ``bits + log2(error) / 2`` compares sizes at equal error.
    """
    return bits + 0.5 * math.log2(max(relative_error, 1e-30))


def alpha_trial(
    weight: Tensor,
    absmax: Tensor,
    second_moment: Tensor,
    alpha: float,
    sparsity: float,
    granularity: str = "tensor",
) -> tuple[float, float]:
    """Entropy and output error of one alpha.

    Args:
        weight: ``(N, K)``.
        absmax: ``(K,)``, ``max|X_i|``.
        second_moment: ``(K, K)``, ``E[x x^T]``.
        alpha: to try.
        sparsity: of the pruning that follows.
        granularity: of the sparsity.

    Returns:
        Order-0 entropy of the integers in bits, and ``E|(W - W^) x|^2 / E|W x|^2``.
    """
    quantized = quantize_paper(weight, absmax, alpha, sparsity, granularity)
    counts = torch.bincount(quantized.qweight.flatten().int() + 127, minlength=255)
    moment, weight = second_moment.float(), weight.float()
    error = weight - quantized.dequantize()
    noise = float(((error @ moment) * error).sum())
    return entropy_of_counts(counts), noise / max(float(((weight @ moment) * weight).sum()), 1e-30)
