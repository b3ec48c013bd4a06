"""The formulas of ``dcext.quantize`` in plain float64: a column, a row or a weight at a time.

Arguments and results are torch tensors and as in the functions of the same names. ``UNIT`` is the
relative error of one float32 operation; where float32 results are compared, the tests allow what so
many operations can add up to.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

UNIT = 2.0**-24  # of float32
UNIT_BFLOAT16 = 2.0**-8  # of rounding to bfloat16
BIT_PRICE = (
    2 * math.log(2) / 12
)  # squared steps per bit: dD/dR of D(R) = step^2 / 12 with step ~ 2^-R


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for every draw."""
    return torch.Generator().manual_seed(seed)


def correlated_factor(cols: int, seed: int = 0) -> Tensor:
    """Cholesky factor of a second moment whose eigenvalues span two decades."""
    noise = torch.randn(cols, cols, dtype=torch.float64, generator=seeded(seed))
    basis, _ = torch.linalg.qr(noise)
    values = torch.logspace(-1, 1, cols, dtype=torch.float64)
    return torch.linalg.cholesky((basis * values) @ basis.T)


def round_levels(scaled: Tensor, pull: Tensor) -> Tensor:
    """Levels of values given in steps: the upper of two neighbours from ``middle + pull`` on, ties
    without it to even.
    """
    pull = torch.cat([pull.double(), torch.zeros(1, dtype=torch.float64)])
    magnitude = scaled.double().abs().clamp(max=127)
    lower = magnitude.floor()
    rise = pull[lower.long() + 1]
    beyond = magnitude - (lower + 0.5 + rise)
    is_upper = (beyond > 0) | ((beyond == 0) & ((rise > 0) | (lower % 2 == 1)))
    return (lower + is_upper) * scaled.sign()


def round_columns(
    weight: Tensor, target: Tensor, feedback: Tensor, step: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor]:
    """``q`` and ``error`` of the operator ``round_columns_``, columns last to first."""
    weight, target, step = weight.double(), target.double().clone(), step.double()
    q, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for k in reversed(range(weight.shape[0])):
        q[k] = round_levels(target[k] / step[k], pull)
        error[k] = weight[k] - q[k] * step[k]
        for i in range(k):
            target[i] += error[k] * feedback[k, i].double()
    return q, error


def round_with_feedback(
    weight: Tensor, factor: Tensor, row_scale: Tensor, col_scale: Tensor, pull: Tensor
) -> Tensor:
    """``t_i = w_i + sum_{k>i} (w_k - w^_k) L_ki / L_ii``, rounded, from the last column to the
    first.
    """
    weight = weight.double() / row_scale.double()[:, None]
    error = torch.zeros_like(weight)
    q = torch.zeros_like(weight)
    for i in reversed(range(weight.shape[1])):
        target = weight[:, i] + error @ (
            factor[:, i] / factor[i, i]
        )  # later errors; the others are still zero
        q[:, i] = round_levels(target / col_scale[i].double(), pull)
        error[:, i] = weight[:, i] - q[:, i] * col_scale[i].double()
    return q


def feedback_targets(
    weight: Tensor, approximation: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """What every column should have been rounded from, given what became of those behind it.

    Returns:
        ``(N, K)`` targets, and how far from them float32 may have ended up: one rounding for each
        of K sums and fewer than 16 for what goes into them.
    """
    behind = (factor / factor.diagonal()).tril(-1)
    weight = weight.double()
    error = weight - approximation.double()
    magnitude = weight.abs() + (weight.abs() + approximation.double().abs()) @ behind.abs()
    return weight + error @ behind, (factor.shape[0] + 16) * UNIT * magnitude


def output_error(weight: Tensor, approximation: Tensor, second_moment: Tensor) -> float:
    """``E|(W - W^) x|^2``, summed over the outputs."""
    error = weight.double() - approximation.double()
    return float(torch.trace(error @ second_moment.double() @ error.T))


def rate_threshold(bits_lower: float, bits_upper: float) -> float:
    """Where between two levels (0 and 1) both cost the same in ``error^2 + BIT_PRICE * bits``, by
    bisection.
    """
    low, high = (
        -50.0,
        50.0,
    )  # beyond both: a code may be so short that its level pays beyond the other
    for _ in range(100):
        middle = (low + high) / 2
        cost_lower = middle**2 + BIT_PRICE * bits_lower
        cost_upper = (1 - middle) ** 2 + BIT_PRICE * bits_upper
        low, high = (middle, high) if cost_lower < cost_upper else (low, middle)
    return high


def entropy(values: Tensor) -> float:
    """Order-0 entropy in bits per value."""
    _, counts = np.unique(values.numpy(), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def waterfilling_bits(
    weight: Tensor, eigenvalues: Tensor, sensitivity: Tensor, distortion: float
) -> float:
    """Reverse water-filling with the level found exactly: components below it keep all of their
    variance.
    """
    rows = sensitivity.double() * weight.double().square().mean(1)
    variances = torch.outer(rows, eigenvalues.double()).flatten()
    variances = np.sort(variances.clamp_min(0).numpy())
    budget = distortion * weight.numel()
    for below in range(len(variances)):
        level = (budget - variances[:below].sum()) / (len(variances) - below)
        if level <= variances[below]:
            return float(np.log2(variances[below:] / level).sum() / 2 / weight.numel())
    return 0.0


def fit_row_scale(weight: Tensor, qweight: Tensor, col_scale: Tensor, factor: Tensor) -> Tensor:
    """Least squares, row by row: ``min_r |(w - r q diag(c)) L|``."""
    fitted = []
    for row, integers in zip(weight.double(), qweight.double(), strict=True):
        column = (integers * col_scale.double()) @ factor
        solution = np.linalg.lstsq(column[:, None].numpy(), (row @ factor).numpy(), rcond=None)
        fitted.append(solution[0][0])
    return torch.tensor(np.array(fitted))


def int8_zero_share(x: Tensor) -> float:
    """Share of values that are zero after INT8 with one absmax scale per token."""
    x = x.double()
    absmax = x.abs().amax(1, keepdim=True)
    q = (x * 127 / torch.where(absmax > 0, absmax, 1)).round()
    return float((q == 0).double().mean())


def prune(qweight: Tensor, absmax: Tensor, sparsity: float) -> Tensor:
    """Zeroes the ``round(sparsity * n)`` integers of lowest ``(max|X_i| * |q_ij|, position)`` of
    the whole matrix.
    """
    rows, cols = qweight.shape
    values = qweight.flatten().tolist()
    scores = [abs(q) * float(absmax[i % cols]) for i, q in enumerate(values)]
    for i in sorted(range(rows * cols), key=lambda i: (scores[i], i))[
        : round(sparsity * len(values))
    ]:
        values[i] = 0
    return torch.tensor(values, dtype=torch.int8).reshape(rows, cols)
