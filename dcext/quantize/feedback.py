"""Rounding of a weight matrix column by column, each column corrected for the errors already made (recipe ``rate``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcext import ops  # noqa: F401  (registers round_columns_)
from dcext.quantize.output_moment import row_feedback

MAX_LEVEL = 127
NUM_LEVELS = 128
DAMPING = 0.05  # of the mean diagonal, added to second moments: what 32k tokens leave uncertain
# Columns that the operator rounds in one go; the rest of the feedback is matrix products.
BLOCK_COLS = 64

# dD/dR = 2 ln 2 D at the slope of a uniform quantizer, D = step^2 / 12: what a bit is worth, in squared steps.
BIT_PRICE = 2 * math.log(2) / 12


def cholesky_factor(second_moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Lower Cholesky factor of ``H + damping * mean(diag H) * I`` in float64.

    Args:
        second_moment: ``(K, K)`` float64, ``E[x x^T]``, symmetric.
        damping: share of the mean diagonal that is added; raised tenfold until the factorization exists.

    Returns:
        ``(K, K)`` float64, lower triangular.

    Raises:
        ValueError: not finite, or zero.
    """
    diagonal = second_moment.diagonal()
    mean = float(diagonal.mean())
    if not math.isfinite(mean) or mean <= 0 or not bool(torch.isfinite(second_moment).all()):
        raise ValueError(
            f"cholesky_factor: second_moment: expected finite and not zero, got mean diagonal {mean}"
        )
    while True:
        damped = second_moment.clone()
        damped.diagonal().add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor
        damping = max(10 * damping, 1e-8)


def round_with_feedback(
    weight: Tensor,
    factor: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    pull: Tensor | None = None,
    row_factor: Tensor | None = None,
    nearest: Tensor | None = None,
    panel_rows: int = 0,
) -> Tensor:
    """Integers of a matrix for given steps, with the error of each weight spread over those still to be rounded.

    Minimizes ``||A^T (W - diag(row_scale) Q diag(col_scale)) L||^2`` greedily, columns from the last to the first and
    rows in each column as well. With ``f_ni = sum_{k>=i} (w_nk - w^_nk) L_ki / L_ii``, which is known for the rows
    behind n, weight (n, i) is rounded to the nearest multiple of its step after
    ``sum_{k>i} (w_nk - w^_nk) L_ki / L_ii + sum_{m>n} f_mi A_mn / A_nn`` was added to it.

    Args:
        weight: ``(N, K)`` float32. Not modified.
        factor: ``(K, K)`` float64, lower Cholesky factor L of the inputs' second moment.
        row_scale: ``(N,)`` float32, positive.
        col_scale: ``(K,)`` float32, positive; the step of weight (n, k) is ``row_scale[n] * col_scale[k]``.
        pull: ``(128,)`` float32 from ``rate_pull``, or None to round to nearest.
        row_factor: A, from ``output_moment.row_factor``; None for the identity.
        nearest: ``(panels, 512)`` int8, what each half of a step is rounded to, from ``packed_rate``, instead of the
            nearest multiple; see ``round_columns_`` in ``dcext/ops.py``.
        panel_rows: rows that share a table.

    Returns:
        ``(N, K)`` int8 in [-127, 127].

    Source: GPTQ, arXiv:2210.17323; steps by column as in WaterSIC, arXiv:2603.04956; feedback from both sides as in
    YAQA, arXiv:2505.22988.
    """
    rows, cols = weight.shape
    pull = torch.zeros(NUM_LEVELS) if pull is None else pull
    feedback = (factor / factor.diagonal()).float()
    from_rows = None if row_factor is None else row_feedback(row_factor, row_scale)
    scaled = (weight / row_scale[:, None]).t().contiguous()
    error = torch.empty_like(scaled)
    qweight = torch.empty((cols, rows), dtype=torch.int8)
    for end in range(cols, 0, -BLOCK_COLS):
        begin = max(0, end - BLOCK_COLS)
        target = scaled[begin:end].clone()
        if end < cols:
            target.addmm_(feedback[end:, begin:end].t(), error[end:])
        torch.ops.dcext.round_columns_(
            scaled[begin:end],
            target,
            feedback[begin:end, begin:end].contiguous(),
            col_scale[begin:end].contiguous(),
            pull,
            qweight[begin:end],
            error[begin:end],
            from_rows,
            nearest,
            panel_rows,
        )
    return qweight.t().contiguous()


def rate_pull(counts: Tensor) -> Tensor:
    """How far each rounding threshold moves up so that a shorter code is taken where it is worth the error.

    Between the levels q - 1 and q a magnitude rounds down below ``q - 1/2 + pull[q]``, where the squared error that it
    adds, ``2 pull[q]`` squared steps, equals ``BIT_PRICE`` times the bits that the shorter code saves.

    Args:
        counts: ``(128,)`` how often each magnitude occurs.

    Returns:
        ``(128,)`` float32 in [0, 0.45].
    """
    p = (counts.double() + 0.5) / (counts.sum() + 0.5 * NUM_LEVELS)
    p[1:] /= 2  # a magnitude is two values
    bits = -p.log2()
    pull = torch.zeros(NUM_LEVELS, dtype=torch.float64)
    pull[1:] = BIT_PRICE / 2 * (bits[1:] - bits[:-1])
    return pull.clamp_(0, 0.45).float()
