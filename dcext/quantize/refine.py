"""Rounding again, where a code costs the same whatever it stands for: every weight once more, given all the others.

Error feedback rounds each weight when those before it are not known yet. Afterwards they are, and a weight may have a
better value. This is coordinate descent, which only ever lowers the error; where codes have lengths it would have to
weigh them, so only packed payloads use it.

Source: QuantEase, arXiv:2309.01885, for columns; here rows correct each other, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcext import ops  # noqa: F401  (registers round_columns_)
from dcext.quantize.feedback import BLOCK_COLS, NUM_LEVELS
from dcext.quantize.output_moment import ROW_BLOCK, in_blocks


def refine(
    weight: Tensor,
    qweight: Tensor,
    factor: Tensor,
    row_factor: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    nearest: Tensor,
    panel_rows: int,
    sweeps: int,
) -> Tensor:
    """Lowers ``||A^T (W - diag(row_scale) Q diag(col_scale)) L||^2`` one weight at a time, the others staying.

    With ``c = E H`` of the errors E and ``H = L L^T``, ``G = A A^T``, the best value of weight (n, k) is
    ``w_nk + (c_nk / H_kk - e_nk) + sum_{m != n} G_nm c_mk / (G_nn H_kk)``. Columns go from the last to the first, and
    rows in each. What rows before n ask of it is taken from the block of columns' beginning; all else is up to date.

    Args:
        weight: ``(N, K)`` float32. Not modified.
        qweight: ``(N, K)`` int8. Not modified.
        factor: ``(K, K)`` float64, L.
        row_factor: A, from ``output_moment.row_factor``.
        row_scale: ``(N,)`` float32, positive.
        col_scale: ``(K,)`` float32, positive.
        nearest: ``(panels, 512)`` int8, as for ``round_with_feedback``.
        panel_rows: rows that share a table.
        sweeps: how often every weight is looked at.

    Returns:
        ``(N, K)`` int8.
    """
    moment = (factor @ factor.mT).float()
    by_col = moment / moment.diagonal()
    rows = row_scale.shape[0]
    upper, lower = _row_influence(row_factor, row_scale)
    from_rows = upper.mT.contiguous()
    scaled = (weight / row_scale[:, None]).t().contiguous()
    rounded = qweight.t().contiguous()
    error = scaled - rounded.float() * col_scale[:, None]
    no_pull = torch.zeros(NUM_LEVELS)
    for end in [*range(weight.shape[1], 0, -BLOCK_COLS)] * sweeps:
        block = slice(max(0, end - BLOCK_COLS), end)
        asked = by_col[:, block].t() @ error
        inside = by_col[block, block].contiguous()
        # The operator adds the new errors of columns behind to a target, and what rows behind ask.
        target = scaled[block] + asked - error[block] - inside.tril(-1).t() @ error[block]
        target += _asked_by_rows_before(asked, upper, lower)[:, :rows]
        new = torch.empty_like(target)
        torch.ops.dcext.round_columns_(
            scaled[block],
            target.contiguous(),
            inside,
            col_scale[block].contiguous(),
            no_pull,
            rounded[block],
            new,
            from_rows,
            nearest,
            panel_rows,
        )
        error[block] = new
    return rounded.t().contiguous()


def _row_influence(row_factor: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``G_nm / G_nn * row_scale_m / row_scale_n``, ``(blocks, ROW_BLOCK, ROW_BLOCK)``: for m > n, and for m < n."""
    moment = row_factor @ row_factor.mT
    scale = in_blocks(row_scale.double())
    ratio = scale[:, None, :] / scale[:, :, None].clamp_min(1e-30)
    influence = moment / moment.diagonal(dim1=1, dim2=2)[:, :, None] * ratio
    return influence.triu(1).float(), influence.tril(-1).float()


def _asked_by_rows_before(asked: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """What to add to targets for the rows before each; ``(cols, rows)``, with rows up to a whole block.

    The operator passes on ``target - value``, and with it what was added here: so much is taken off again.
    """
    added = lower @ in_blocks(asked.t().contiguous())
    unit = upper + torch.eye(ROW_BLOCK)
    kept = torch.linalg.solve_triangular(unit, added, upper=True, unitriangular=True)
    return kept.reshape(-1, asked.shape[0]).t()
