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
# Squared steps per bit: dD/dR of D(R) = step^2 / 12 with step ~ 2^-R.
BIT_PRICE = 2 * math.log(2) / 12


NUM_LEVELS = 128  # magnitudes 0 to 127
NO_PULL = torch.zeros(NUM_LEVELS)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for every draw."""
    return torch.Generator().manual_seed(seed)


def correlated_factor(cols: int, seed: int = 0) -> Tensor:
    """Cholesky factor of a second moment whose eigenvalues span two decades."""
    noise = torch.randn(cols, cols, dtype=torch.float64, generator=seeded(seed))
    basis, _ = torch.linalg.qr(noise)
    values = torch.logspace(-1, 1, cols, dtype=torch.float64)
    return torch.linalg.cholesky((basis * values) @ basis.T)


def grid(*shape: int, step: float, most: int, seed: int) -> torch.Tensor:
    """Random multiples of a power of two, of few bits: float32 sums of products are exact."""
    return torch.randint(-most, most + 1, shape, generator=seeded(seed)) * step


def some_pull(seed: int, step: float = 1 / 64) -> torch.Tensor:
    """Multiples of ``step`` in [0, 0.45)."""
    return (torch.rand(NUM_LEVELS, generator=seeded(seed)) * 0.45 / step).floor() * step


def sparse_feedback(cols: int, seed: int) -> torch.Tensor:
    """Quarters below the diagonal, about one per column: errors neither vanish nor explode."""
    keep = torch.rand(cols, cols, generator=seeded(seed)) < 1 / cols
    return (grid(cols, cols, step=0.25, most=4, seed=seed + 1) * keep).tril(-1)


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


def look_up(scaled: Tensor, tables: Tensor) -> Tensor:
    """The entry for the half of a step in which each value lies, in its own table of 512."""
    index = (2 * scaled.double()).floor().clamp(-256, 255).long() + 256
    return tables.gather(-1, index[..., None])[..., 0].double()


def assert_rounded(q: torch.Tensor, target: torch.Tensor, slack: torch.Tensor, pull: torch.Tensor):
    """Each integer is the rounding of some value within ``slack`` of its target, both in steps."""
    assert (round_levels(target - slack, pull) <= q).all()
    assert (q <= round_levels(target + slack, pull)).all()


def round_columns(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    step: Tensor,
    pull: Tensor,
    row_feedback: Tensor | None = None,
    nearest: Tensor | None = None,
    panel_rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """``q`` and ``error`` of the operator ``round_columns_``, columns last to first, and in each the
    rows last to first.
    """

    def rounded(scaled: Tensor, row: Tensor) -> Tensor:
        if nearest is None:
            return round_levels(scaled, pull)
        return look_up(scaled, nearest[row // panel_rows])

    weight, target, step = weight.double(), target.double().clone(), step.double()
    cols, rows = weight.shape
    q, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for k in reversed(range(cols)):
        if row_feedback is None:
            q[k] = rounded(target[k] / step[k], torch.arange(rows))
        else:
            size = row_feedback.shape[1]
            correction = torch.zeros(rows, dtype=torch.float64)
            for n in reversed(range(rows)):
                q[k, n] = rounded((target[k, n] + correction[n]) / step[k], torch.tensor(n))
                first = n // size * size
                factors = row_feedback[n // size, n - first, : n - first].double()
                correction[first:n] += (target[k, n] - q[k, n] * step[k]) * factors
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


def full_matrix(blocks: Tensor, rows: int) -> Tensor:
    """``(N, N)`` of its blocks on the diagonal, without what lies behind the last row."""
    return torch.block_diag(*blocks)[:rows, :rows]


def feedback_targets(
    weight: Tensor, approximation: Tensor, factor: Tensor, row_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What every weight should have been rounded from, given what became of those behind it: in its
    row, and in the rows behind it.

    Returns:
        ``(N, K)`` targets, and how far from them float32 may have ended up: one rounding for each
        of K sums, and of N if rows correct each other, and fewer than 16 for what goes into them.
    """
    unit = factor / factor.diagonal()
    behind = unit.tril(-1)
    weight, roundings = weight.double(), factor.shape[0] + 16
    error = weight - approximation.double()
    target = weight + error @ behind
    sizes = weight.abs() + approximation.double().abs()
    magnitude = weight.abs() + sizes @ behind.abs()
    if row_factor is not None:
        rows = full_matrix(row_factor, weight.shape[0])
        from_rows = (rows / rows.diagonal()).tril(-1).T
        target = target + from_rows @ (error @ unit)
        magnitude = magnitude + from_rows.abs() @ (sizes @ unit.abs())
        roundings += weight.shape[0]
    return target, roundings * UNIT * magnitude


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


def waterfilling_bits(energies: Tensor, eigenvalues: Tensor, distortion: float) -> float:
    """Reverse water-filling with the level found exactly: components below it keep all of their
    variance.
    """
    variances = torch.outer(energies.double(), eigenvalues.double()).flatten()
    variances = np.sort(variances.clamp_min(0).numpy())
    budget = distortion * len(variances)
    for below in range(len(variances)):
        level = (budget - variances[:below].sum()) / (len(variances) - below)
        if level <= variances[below]:
            return float(np.log2(variances[below:] / level).sum() / 2 / len(variances))
    return 0.0


def fit_row_scale(
    weight: Tensor, qweight: Tensor, col_scale: Tensor, factor: Tensor, row_factor: Tensor
) -> Tensor:
    """Least squares over all rows at once: ``min_r |A^T (W - diag(r) Q diag(c)) L|``."""
    left = full_matrix(row_factor, weight.shape[0]).T
    columns = (qweight.double() * col_scale.double()) @ factor
    # Column n of the system: what one unit of row n's scale changes in every entry of the product.
    system = torch.einsum("mn,nk->mkn", left, columns).flatten(0, 1)
    target = (left @ (weight.double() @ factor)).flatten()
    return torch.tensor(np.linalg.lstsq(system.numpy(), target.numpy(), rcond=None)[0])


def packed_nbytes(qweight: Tensor, panel_rows: int) -> int:
    """Size of a packed payload, panel by panel: PAYLOAD.md, and the encoder's charge of 8 bytes for
    an exception; raw where no width takes two percent less.
    """
    total, panels = 64, qweight.split(panel_rows)
    for panel in panels:
        rows = -(-panel.shape[0] // 16) * 16
        cols = -(-panel.shape[1] // 32) * 32
        counts = torch.bincount(panel.flatten().int() + 128).sort(descending=True)[0]
        sizes = []
        for width in range(2, 7):
            exceptions = int(counts[2**width :].sum())
            nbytes = 64 + rows * cols * width // 8 + (2 * rows if exceptions else 0)
            sizes.append((nbytes + 8 * exceptions, nbytes + 3 * exceptions))
        charged, stored = min(sizes)
        stored = stored if charged < 0.98 * panel.numel() else panel.numel()
        total += -(-stored // 64) * 64
    return total + -(-32 * len(panels) // 64) * 64


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
