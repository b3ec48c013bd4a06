"""Recipe ``rate``: steps and rounding that lose least at a given size of the entropy-coded integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcext.quantize.feedback import MAX_LEVEL, NUM_LEVELS, rate_pull, round_with_feedback
from dcext.quantize.quantized import QuantizedWeight, entropy_of_counts, to_bfloat16_values

# Where a bfloat16 column pays against a coarser int8 one: 8 bits more are worth (3.5^2 - 1) / (2 ln 2) of its error.
OUTLIER_STEPS = 3.5
MOST_POWER = 10.0  # of a token in second moments, over the median
SAMPLE_WEIGHTS = 1 << 14  # of each layer, for forecasts
ROW_CLASSES = 32  # of the water-filling reference
OUTSIDE_STEP = 1e30  # rounds everything to zero
HEADROOM = 120  # largest level planned for; the rest up to 127 is for what error feedback adds


@dataclass
class Steps:
    """How a group of layers that read the same input is rounded.

    Attributes:
        row_scale: by layer, ``(N,)`` float32, values that bfloat16 holds.
        col_scale: ``(K,)`` float32, values that bfloat16 holds, shared by the layers.
        outliers: by layer, ascending indices of columns kept in bfloat16.
        capped: columns whose step had to grow so that their largest weight fits.
    """

    row_scale: dict[str, Tensor]
    col_scale: Tensor
    outliers: dict[str, Tensor]
    capped: int


def row_scales(sensitivity: Tensor, shrinkage: float) -> Tensor:
    """Row steps for equal slope: ``1 / sqrt(s_i)``, the squared derivatives shrunk towards their layer's mean.

    Args:
        sensitivity: ``(N,)``, mean squared derivative of the loss by each output.
        shrinkage: share of the mean in what is used; 1 gives all rows the same step.

    Returns:
        ``(N,)`` float32, values that bfloat16 holds.
    """
    shrunk = (1 - shrinkage) * sensitivity + shrinkage * sensitivity.mean()
    return to_bfloat16_values(shrunk.clamp_min(1e-30).rsqrt())


def plan_steps(
    weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
) -> Steps:
    """Steps of a group: ``scale * row_scale[n] / L_kk``, larger where a column's range demands it.

    With the Cholesky factor L of the inputs' second moment, a column rounded after those behind it adds
    ``step^2 L_kk^2 / 12`` to the output error, so this makes all weights of all layers contribute the same.

    Args:
        weights: by layer, ``(N, K)`` float32.
        factor: ``(K, K)`` float64, lower Cholesky factor.
        rows: by layer, from ``row_scales``.
        scale: the model's one number that sets its size.

    Source: WaterSIC, arXiv:2603.04956; equal slopes by Lagrange.
    """
    wanted = (scale / factor.diagonal()).float()
    needed = torch.zeros_like(wanted)
    outliers = {}
    for name, weight in weights.items():
        least = (weight.abs() / rows[name][:, None]).amax(0) / HEADROOM
        is_outlier = least > OUTLIER_STEPS * wanted
        outliers[name] = is_outlier.nonzero()[:, 0].int()
        needed = torch.maximum(needed, least.masked_fill(is_outlier, 0))
    steps = torch.maximum(wanted, needed)
    return Steps(rows, to_bfloat16_values(steps), outliers, int((needed > wanted).sum()))


def round_to_steps(name: str, weight: Tensor, factor: Tensor, steps: Steps) -> QuantizedWeight:
    """Rounds one layer with error feedback, then fits its row scales.

    Args:
        name: of the layer in ``steps``.
        weight: ``(N, K)`` float32, what is to be approximated.
        factor: ``(K, K)`` float64, lower Cholesky factor of the inputs' second moment.
        steps: from ``plan_steps``.
    """
    row_scale, col_scale = steps.row_scale[name], steps.col_scale
    outliers = steps.outliers[name].long()
    inside = weight.index_fill(1, outliers, 0)
    sample = (inside[::4] / row_scale[::4, None] / col_scale).abs().round_().clamp_(max=MAX_LEVEL)
    pull = rate_pull(torch.bincount(sample.flatten().int(), minlength=NUM_LEVELS))
    # Columns kept outside round to zero, and make no error that columns before them would correct.
    taken = col_scale.index_fill(0, outliers, OUTSIDE_STEP)
    qweight = round_with_feedback(inside, factor, row_scale, taken, pull)
    fitted = fit_row_scale(inside, qweight, col_scale, factor, row_scale)
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
    weight: Tensor, qweight: Tensor, col_scale: Tensor, factor: Tensor, default: Tensor
) -> Tensor:
    """The row scales of least output error for given integers, ``<w_n, q_n> / <q_n, q_n>`` in the norm of ``L L^T``.

    Args:
        weight: ``(N, K)``.
        qweight: ``(N, K)`` int8.
        col_scale: ``(K,)``.
        factor: ``(K, K)`` lower Cholesky factor.
        default: ``(N,)``, for rows without a nonzero integer.

    Returns:
        ``(N,)`` float32, values that bfloat16 holds.
    """
    lower = factor.float()
    columns = (qweight.float() * col_scale) @ lower
    energy = columns.square().sum(1)
    fitted = ((weight @ lower) * columns).sum(1) / energy.clamp_min(1e-30)
    return to_bfloat16_values(torch.where((energy > 0) & (fitted > 0), fitted, default))


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
        values: ``(n,)`` float32, weights times ``L_kk`` of their column: in units of their step at a row scale of 1.
        rows: ``(n,)`` int32, the rows that they are from.
        shape: of the layer.
    """

    values: Tensor
    rows: Tensor
    shape: tuple[int, int]


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
    values = weight.detach()[row, col].float() * pivots[col]
    return WeightSample(values, row.int(), (rows, cols))


def waterfilling_bits(
    weight: Tensor, eigenvalues: Tensor, sensitivity: Tensor, distortion: float
) -> float:
    """The fewest bits per weight for a Gaussian matrix with this row energy at this distortion, by reverse water-filling.

    The matrix is taken as Gaussian with independent entries, of variance ``v_n = mean_k w_nk^2`` in row n; errors are
    weighted by ``s_n`` and by the inputs' second moment, whose eigenvalues are ``h_k``. The components have variance
    ``s_n v_n h_k``; a water level theta gives each ``max(0, log2(s_n v_n h_k / theta) / 2)`` bits and distortion
    ``min(theta, s_n v_n h_k)``. Rows of like energy are taken together, in ``ROW_CLASSES`` classes.

    Args:
        weight: ``(N, K)``.
        eigenvalues: ``(K,)`` of the inputs' second moment.
        sensitivity: ``(N,)``, weights of the rows' errors.
        distortion: mean over the weights of the weighted error, ``sum_n s_n (e_n H e_n^T) / (N K)``.

    Source: Cover and Thomas, Elements of Information Theory, 10.3.3.
    """
    energy = (sensitivity.double() * weight.float().square().mean(1).double()).sort()[0]
    classes = energy.tensor_split(min(ROW_CLASSES, len(energy)))
    means = torch.stack([part.mean() for part in classes])
    counts = torch.tensor([len(part) for part in classes], dtype=torch.float64)
    ascending, order = torch.outer(means, eigenvalues.double().clamp_min(1e-30)).flatten().sort()
    times = counts[:, None].expand(-1, len(eigenvalues)).flatten()[order]
    # The distortion if the level were at each component in turn; it grows with the level.
    above = times.flip(0).cumsum(0).flip(0)
    below = (ascending * times).cumsum(0) - ascending * times
    total = distortion * weight.numel()
    if total >= float((ascending * times).sum()):
        return 0.0
    first = int(torch.searchsorted(below + ascending * above, total))
    first = min(first, len(ascending) - 1)
    level = (total - float(below[first])) / float(above[first])
    return float(((ascending[first:] / level).log2() * times[first:]).sum()) / 2 / weight.numel()


def predicted_entropy(normalized: Tensor, scale: float) -> float:
    """Order-0 entropy, in bits, of values rounded to multiples of ``scale``, within the levels of int8."""
    levels = (normalized / scale).round_().clamp_(-MAX_LEVEL, MAX_LEVEL).int() + MAX_LEVEL
    counts = torch.bincount(levels, minlength=2 * MAX_LEVEL + 1)
    return entropy_of_counts(counts)
