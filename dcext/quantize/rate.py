"""Recipe ``rate``: steps and rounding that lose least at a given size of the entropy-coded integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcext.quantize.feedback import MAX_LEVEL, NUM_LEVELS, rate_pull, round_with_feedback
from dcext.quantize.output_moment import in_blocks, row_factor
from dcext.quantize.quantized import QuantizedWeight, entropy_of_counts, to_bfloat16_values

# Where a bfloat16 column pays against a coarser int8 one: 8 bits more are worth (3.5^2 - 1) / (2 ln 2) of its error.
OUTLIER_STEPS = 3.5
MOST_POWER = 10.0  # of a token in second moments, over the median
SAMPLE_WEIGHTS = 1 << 14  # of each layer, for forecasts
ROW_CLASSES = 32  # of the water-filling reference
OUTSIDE_STEP = 1e30  # rounds everything to zero
MOST_SPREAD = 4.0  # factor by which a row's or a column's step may differ for its spread
HEADROOM = 120  # largest level planned for; the rest up to 127 is for what error feedback adds


@dataclass
class Scales:
    """How a group of layers that read the same input is scaled before it is rounded.

    Attributes:
        row_scale: by layer, ``(N,)`` float32, values that bfloat16 holds.
        col_scale: ``(K,)`` float32, values that bfloat16 holds, shared by the layers.
        outliers: by layer, ascending indices of columns kept in bfloat16.
    """

    row_scale: dict[str, Tensor]
    col_scale: Tensor
    outliers: dict[str, Tensor]

    def fill(self, left_bits: float) -> None:
        """Comes as near to a size as it can, for the last group of a model. Nothing where none is known before rounding."""


@dataclass
class Steps(Scales):
    """Scales whose products are the steps of entropy-coded integers.

    Attributes:
        capped: columns whose step had to grow so that their largest weight fits.
    """

    capped: int


def spread_factor(spread: Tensor) -> Tensor:
    """How much larger steps are where integers would spread wider: ``sqrt(v / mean v)``.

    With a code table of its own every row and column would have steps that add the same to the loss. But one table
    serves them all. Under it a code grows about as ``q^2 / (2 mean q^2)``, so a coarser step saves bits in proportion
    to ``v^2 / step^2``, and what it adds to the loss, ``step^2``, has to be in proportion to that. This halves the bits
    that the common table costs.

    Args:
        spread: ``(n,)``, root mean square of the integers in each row or column if all steps added the same.

    Returns:
        ``(n,)``, between ``1 / MOST_SPREAD`` and ``MOST_SPREAD``.
    """
    share = spread / spread.mean().clamp_min(1e-30)
    return share.sqrt().clamp(1 / MOST_SPREAD, MOST_SPREAD)


def plan_steps(
    weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
) -> Steps:
    """Steps of a group: ``scale * row_scale[n] / L_kk``, larger where values spread wider or would leave int8.

    With the Cholesky factor L of the inputs' second moment, a column rounded after those behind it adds
    ``step^2 L_kk^2 / 12`` to the output error, so but for ``spread_factor`` all weights of all layers contribute the
    same.

    Args:
        weights: by layer, ``(N, K)`` float32.
        factor: ``(K, K)`` float64, lower Cholesky factor.
        rows: by layer, from ``output_moment.row_scales``.
        scale: the model's one number that sets its size.

    Source: WaterSIC, arXiv:2603.04956; equal slopes by Lagrange.
    """
    pivots = factor.diagonal().float()
    adjusted, energy = {}, torch.zeros_like(pivots)
    for name, weight in weights.items():
        squares = (weight / rows[name][:, None] * pivots).square()
        energy += squares.sum(0)
        by_row = squares.mean(1).sqrt()
        adjusted[name] = to_bfloat16_values(rows[name] * spread_factor(by_row))
    wanted = scale / pivots * spread_factor(energy.sqrt())
    needed = torch.zeros_like(wanted)
    outliers = {}
    for name, weight in weights.items():
        least = (weight.abs() / adjusted[name][:, None]).amax(0) / HEADROOM
        is_outlier = least > OUTLIER_STEPS * wanted
        outliers[name] = is_outlier.nonzero()[:, 0].int()
        needed = torch.maximum(needed, least.masked_fill(is_outlier, 0))
    steps = torch.maximum(wanted, needed)
    return Steps(adjusted, to_bfloat16_values(steps), outliers, int((needed > wanted).sum()))


def round_to_steps(
    name: str, weight: Tensor, factor: Tensor, steps: Steps, moment: Tensor
) -> QuantizedWeight:
    """Rounds one layer with error feedback, then fits its row scales.

    Args:
        name: of the layer in ``steps``.
        weight: ``(N, K)`` float32, what is to be approximated.
        factor: ``(K, K)`` float64, lower Cholesky factor of the inputs' second moment.
        steps: from ``plan_steps``.
        moment: of the derivatives by its outputs, from ``OutputMoment``.
    """
    row_scale, col_scale = steps.row_scale[name], steps.col_scale
    outliers = steps.outliers[name].long()
    inside = weight.index_fill(1, outliers, 0)
    sample = (inside[::4] / row_scale[::4, None] / col_scale).abs().round_().clamp_(max=MAX_LEVEL)
    pull = rate_pull(torch.bincount(sample.flatten().int(), minlength=NUM_LEVELS))
    # Columns kept outside round to zero, and make no error that columns before them would correct.
    taken = col_scale.index_fill(0, outliers, OUTSIDE_STEP)
    by_row = row_factor(moment, weight.shape[0])
    qweight = round_with_feedback(inside, factor, row_scale, taken, pull, by_row)
    return fit_scales(name, weight, qweight, factor, steps, by_row)


def fit_scales(
    name: str, weight: Tensor, qweight: Tensor, factor: Tensor, scales: Scales, by_row: Tensor
) -> QuantizedWeight:
    """Fits what is not rounded to integers that are: row scales, then outlier columns.

    Args:
        name: of the layer in ``scales``.
        weight: ``(N, K)`` float32, what is approximated.
        qweight: ``(N, K)`` int8, zero in outlier columns.
        factor: ``(K, K)`` float64, lower Cholesky factor of the inputs' second moment.
        scales: with which the layer was rounded.
        by_row: from ``output_moment.row_factor``.
    """
    col_scale, outliers = scales.col_scale, scales.outliers[name].long()
    inside = weight.index_fill(1, outliers, 0)
    fitted = fit_row_scale(inside, qweight, col_scale, factor, scales.row_scale[name], by_row)
    if not len(outliers):
        return QuantizedWeight(qweight, fitted, col_scale)
    error = inside - qweight.float() * fitted[:, None] * col_scale
    kept = weight[:, outliers] + _absorbed(error, factor, outliers)
    return QuantizedWeight(
        qweight, fitted, col_scale, outliers.int(), kept.to(torch.bfloat16).contiguous()
    )


def _absorbed(error: Tensor, factor: Tensor, columns: Tensor) -> Tensor:
    """What to add to float columns so that they make up best for the errors of all others: ``E H_:O H_OO^-1``."""
    mine = factor[columns]
    cross = (error.double() @ factor) @ mine.t()
    return torch.linalg.solve(mine @ mine.t(), cross, left=False).float()


def fit_row_scale(
    weight: Tensor,
    qweight: Tensor,
    col_scale: Tensor,
    factor: Tensor,
    default: Tensor,
    by_row: Tensor,
) -> Tensor:
    """The row scales r of least ``||A^T (W - diag(r) Q diag(col_scale)) L||`` for given integers.

    Args:
        weight: ``(N, K)``.
        qweight: ``(N, K)`` int8.
        col_scale: ``(K,)``.
        factor: ``(K, K)`` lower Cholesky factor L.
        default: ``(N,)``, for rows without a nonzero integer and where the fit is not positive.
        by_row: A, from ``output_moment.row_factor``.

    Returns:
        ``(N,)`` float32, values that bfloat16 holds.
    """
    lower = factor.float()
    columns = in_blocks((qweight.float() * col_scale) @ lower)
    target = in_blocks(weight @ lower)
    moment = by_row @ by_row.mT
    normal = (columns @ columns.mT).double() * moment
    right = ((columns @ target.mT).double() * moment).sum(2)
    empty = normal.diagonal(dim1=1, dim2=2) == 0
    normal += torch.diag_embed(empty.double())
    solved = torch.linalg.solve(normal, right).flatten()[: len(default)].float()
    usable = ~empty.flatten()[: len(default)] & (solved > 0)
    return to_bfloat16_values(torch.where(usable, solved, default))


def rounding_order(second_moment: Tensor) -> Tensor:
    """The order in which columns are stored for rounding: by the power of their inputs, weakest first.

    Columns are rounded from the last to the first, so the strongest inputs come while most others can still make up
    for their errors. Their Cholesky pivots are then as small as the moment allows, and the steps of all columns most
    alike: fewer columns leave the range of int8, and one code table serves them better.

    Args:
        second_moment: ``(K, K)``, ``E[x x^T]``.

    Returns:
        ``(K,)`` int64, a permutation.

    Source: GPTQ's ``act_order``, which has the same purpose.
    """
    return second_moment.diagonal().argsort(stable=True)


def restore_order(quantized: QuantizedWeight, order: Tensor, col_scale: Tensor) -> QuantizedWeight:
    """Puts the columns of a matrix that was rounded in ``order`` back to their places.

    Args:
        quantized: whose columns are ``order``'s.
        order: ``(K,)`` from ``rounding_order``.
        col_scale: ``(K,)`` in the original order already; layers that read the same input share this tensor.
    """
    back = order.argsort()
    restored = replace(
        quantized, qweight=quantized.qweight[:, back].contiguous(), col_scale=col_scale
    )
    if quantized.outlier_index is not None and quantized.outlier_weight is not None:
        index, sequence = order[quantized.outlier_index.long()].sort()
        restored.outlier_index = index.int()
        restored.outlier_weight = quantized.outlier_weight[:, sequence].contiguous()
    return restored


@dataclass
class WeightSample:
    """Some weights of a layer, from which its size at any scale is predicted.

    Attributes:
        values: ``(n,)`` float32, weights in units of their column's step for ``scale = 1`` and row scales of 1.
        rows: ``(n,)`` int32, the rows that they are from.
        row_spread: ``(N,)`` float32, root mean square of all weights of a row, times ``L_kk`` of their column.
        units: ``(n,)`` float32, the weights times ``L_kk``, over the root mean squares of their row and column.
        col_spread: ``(n,)`` float32, that of their column, in matrices whose rows have 1.
        shape: of the layer.
    """

    values: Tensor
    rows: Tensor
    row_spread: Tensor
    units: Tensor
    col_spread: Tensor
    shape: tuple[int, int]

    def normalized(self, row_scale: Tensor) -> Tensor:
        """The values in units of their steps at ``scale = 1``, ``row_scale`` from ``output_moment.row_scales``."""
        steps = row_scale * spread_factor(self.row_spread / row_scale)
        return self.values / steps[self.rows]


def sample_weights(weight: Tensor, pivots: Tensor, *, seed: int) -> WeightSample:
    """Draws ``SAMPLE_WEIGHTS`` weights of a layer, or takes all of a smaller one.

    Args:
        weight: ``(N, K)`` floating point.
        pivots: ``(K,)`` float32, the diagonal of the Cholesky factor of the inputs' second moment.
        seed: of the choice.
    """
    rows, cols = weight.shape
    index = torch.arange(rows * cols)
    if index.numel() > SAMPLE_WEIGHTS:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(rows * cols, (SAMPLE_WEIGHTS,), generator=generator)
    row, col = index // cols, index % cols
    scaled = weight.detach().float() * pivots
    squares = scaled.square()
    # Rows are weighted alike here, since what they are worth is not known yet.
    values = scaled[row, col] / spread_factor(squares.mean(0).sqrt())[col]
    by_row = squares.mean(1)
    by_col = ((1 / by_row).nan_to_num(posinf=0) @ squares / rows).sqrt()
    units = scaled[row, col] / (by_row.sqrt()[row] * by_col[col]).clamp_min(1e-30)
    return WeightSample(values, row.int(), by_row.sqrt(), units, by_col[col], (rows, cols))


def waterfilling_bits(energies: Tensor, eigenvalues: Tensor, distortion: float) -> float:
    """The fewest bits per weight for a Gaussian matrix at this distortion, by reverse water-filling.

    Seen as the loss sees it, through the second moments of outputs' derivatives and of inputs, the matrix has components
    of variance ``e_n h_k``. A water level theta gives each ``max(0, log2(e_n h_k / theta) / 2)`` bits and distortion
    ``min(theta, e_n h_k)``. Rows of like energy are taken together, in ``ROW_CLASSES`` classes.

    Args:
        energies: ``(N,)`` float64, ``e_n``, from ``output_moment.row_energies``.
        eigenvalues: ``(K,)`` of the inputs' second moment, ``h_k``.
        distortion: mean over the weights of the weighted error, ``tr(G E H E^T) / (N K)``.

    Source: Cover and Thomas, Elements of Information Theory, 10.3.3.
    """
    classes = energies.sort()[0].tensor_split(min(ROW_CLASSES, len(energies)))
    means = torch.stack([part.mean() for part in classes])
    counts = torch.tensor([len(part) for part in classes], dtype=torch.float64)
    ascending, order = torch.outer(means, eigenvalues.double().clamp_min(1e-30)).flatten().sort()
    times = counts[:, None].expand(-1, len(eigenvalues)).flatten()[order]
    # The distortion if the level were at each component in turn; it grows with the level.
    above = times.flip(0).cumsum(0).flip(0)
    below = (ascending * times).cumsum(0) - ascending * times
    weights = len(energies) * len(eigenvalues)
    total = distortion * weights
    if total >= float((ascending * times).sum()):
        return 0.0
    first = int(torch.searchsorted(below + ascending * above, total))
    first = min(first, len(ascending) - 1)
    level = (total - float(below[first])) / float(above[first])
    return float(((ascending[first:] / level).log2() * times[first:]).sum()) / 2 / weights


def predicted_entropy(normalized: Tensor, scale: float) -> float:
    """Order-0 entropy, in bits, of values rounded to multiples of ``scale``, within the levels of int8."""
    levels = (normalized / scale).round_().clamp_(-MAX_LEVEL, MAX_LEVEL).int() + MAX_LEVEL
    counts = torch.bincount(levels, minlength=2 * MAX_LEVEL + 1)
    return entropy_of_counts(counts)
