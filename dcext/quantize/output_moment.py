"""How much the loss minds errors at the outputs of a layer: second moments of its derivatives, in blocks of rows.

Errors in two rows of a weight matrix may cancel in what they do to the loss: most of all in those of queries and keys,
where only products within a head matter. ``E[g g^T]`` tells which; its blocks on the diagonal take ``ROW_BLOCK`` numbers
a row, and hold a head or half of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.quantize.quantized import to_bfloat16_values

ROW_BLOCK = 64
FLOOR = 0.1  # of the mean: rows that calibration hardly moved the loss by are not trusted to matter less
SHARES = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # of off-diagonal entries that may be left out
TOKENS_AT_ONCE = 8192


def in_blocks(rows: Tensor) -> Tensor:
    """``(N, ...)`` as ``(blocks, ROW_BLOCK, ...)``, zeros behind the last row."""
    missing = -rows.shape[0] % ROW_BLOCK
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.reshape(-1, ROW_BLOCK, *rows.shape[1:])


def block_gram(rows: Tensor) -> Tensor:
    """``g g^T`` of ``(N, T)``, its blocks on the diagonal: ``(blocks, ROW_BLOCK, ROW_BLOCK)``."""
    blocks = in_blocks(rows)
    return blocks @ blocks.mT


def diagonal(moment: Tensor, rows: int) -> Tensor:
    """``(N,)``, the diagonal of the matrix whose blocks ``moment`` are."""
    return moment.diagonal(dim1=1, dim2=2).flatten()[:rows]


class OutputMoment:
    """Running second moment of the derivatives by a layer's outputs, with what is needed to know how far to trust it."""

    def __init__(self, out_features: int) -> None:
        """Starts with no token seen. Args: out_features: N."""
        self._rows = out_features
        blocks = -(-out_features // ROW_BLOCK)
        self._halves = torch.zeros(2, blocks, ROW_BLOCK, ROW_BLOCK, dtype=torch.float64)

    def update(self, gradient: Tensor) -> None:
        """Adds tokens, the first half of them and the second apart.

        Args:
            gradient: ``(..., N)`` floating point.
        """
        flat = gradient.detach().reshape(-1, self._rows)
        for half, part in enumerate(flat.tensor_split(2)):
            for chunk in part.split(TOKENS_AT_ONCE) if len(part) else ():
                self._halves[half] += block_gram(chunk.t().float())

    def moment(self, tokens: int) -> Tensor:
        """``(blocks, ROW_BLOCK, ROW_BLOCK)`` float32: the mean over ``tokens``, its off-diagonal entries shrunk.

        The share that is left out is the one of ``SHARES`` with which steps planned on either half of the tokens add
        least to the loss on the other.
        """
        halves = self._halves * (2 / tokens)
        scores = [
            sum(_added(_shrunk(halves[i], share), halves[1 - i], self._rows) for i in (0, 1))
            for share in SHARES
        ]
        share = SHARES[min(range(len(SHARES)), key=lambda i: scores[i])]
        return _shrunk(halves.mean(0), share).float()


def _shrunk(moment: Tensor, share: float) -> Tensor:
    kept = moment * (1 - share)
    kept.diagonal(dim1=1, dim2=2).copy_(moment.diagonal(dim1=1, dim2=2))
    return kept


def _floored(moment: Tensor, rows: int) -> Tensor:
    """Rows below the mean moved by ``FLOOR`` of the distance towards it; what is behind the last row does not matter."""
    present = in_blocks(torch.ones(rows, dtype=torch.float64))
    floored = moment.double() * present[:, :, None] * present[:, None, :]
    mean = diagonal(floored, rows).mean().clamp_min(1e-30)
    entries = floored.diagonal(dim1=1, dim2=2)
    entries += FLOOR * (mean - entries).clamp_min(0)
    return floored


def _added(planned: Tensor, actual: Tensor, rows: int) -> float:
    """Logarithm of what a bit rate adds to the loss, if steps are planned with one moment and another one holds.

    Errors rounded with feedback have the covariance ``step^2 / 12 * planned^-1``, in units in which the mean of their
    logarithms is ``log det planned``.
    """
    factor, info = torch.linalg.cholesky_ex(_floored(planned, rows))
    if bool(info.any()):
        return float("inf")
    by_row = (torch.cholesky_inverse(factor) * _floored(actual, rows)).sum(2)
    noise = by_row.flatten()[:rows].sum()
    return float((noise / rows).log() + 2 * factor.diagonal(dim1=1, dim2=2).log().sum() / rows)


def row_factor(moment: Tensor, rows: int) -> Tensor:
    """Lower Cholesky factor of a moment, block by block: ``(blocks, ROW_BLOCK, ROW_BLOCK)`` float64.

    Args:
        moment: from ``OutputMoment.moment``, finite.
        rows: N.
    """
    return torch.linalg.cholesky(_floored(moment, rows))


def row_scales(factor: Tensor, rows: int) -> Tensor:
    """Row steps for equal slope, ``1 / A_nn``: every row, corrected by those behind it, adds the same to the loss.

    Args:
        factor: from ``row_factor``.
        rows: N.

    Returns:
        ``(N,)`` float32, values that bfloat16 holds.
    """
    return to_bfloat16_values(diagonal(factor, rows).reciprocal().float())


def row_feedback(factor: Tensor, row_scale: Tensor) -> Tensor:
    """How rows correct each other, ``A_nm / A_mm * row_scale_n / row_scale_m``, for the operator ``round_columns_``.

    Args:
        factor: from ``row_factor``.
        row_scale: ``(N,)`` float32, in whose units rows are rounded.

    Returns:
        ``(blocks, ROW_BLOCK, ROW_BLOCK)`` float32, zero but for n > m.
    """
    scale = in_blocks(row_scale.double())
    unit = factor / factor.diagonal(dim1=1, dim2=2)[:, None, :]
    ratio = scale[:, :, None] / scale[:, None, :].clamp_min(1e-30)
    return (unit * ratio).tril(-1).float().contiguous()


def weighted_error(error: Tensor, second_moment: Tensor, moment: Tensor) -> float:
    """``tr(G E H E^T)``, twice what an error of the weights adds to the loss per token, to second order.

    Args:
        error: ``(N, K)``.
        second_moment: ``(K, K)``, of the inputs.
        moment: of the derivatives by the outputs.
    """
    blocks = in_blocks(error)
    return float(((blocks @ second_moment.to(error.dtype)) @ blocks.mT * moment).double().sum())


def row_energies(weight: Tensor, moment: Tensor) -> Tensor:
    """Variances of the components of a matrix of independent entries, as the loss sees them: ``(N,)`` float64.

    The eigenvalues of ``diag(v)^1/2 G diag(v)^1/2`` with ``v_n = mean_k w_nk^2``, ascending.
    """
    root = in_blocks(weight.float().square().mean(1).double().sqrt())
    values = torch.linalg.eigvalsh(root[:, :, None] * moment.double() * root[:, None, :])
    return values.flatten().clamp_min(0).sort()[0][-weight.shape[0] :]
