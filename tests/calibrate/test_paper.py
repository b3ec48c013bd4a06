"""Recipes without error feedback, ``paper`` and ``data-free``, and what all recipes return."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcext
import reference
from dcext.quantize.data_free import round_data_free
from dcext.quantize.paper import (
    ALPHAS,
    alpha_cost,
    alpha_trial,
    importance_scale,
    prune,
    quantize_paper,
    quantize_scaled,
)
from dcext.quantize.quantized import QuantizedWeight, output_snr_db, to_bfloat16_values
from reference import UNIT, UNIT_BFLOAT16, correlated_factor, seeded

SPARSITIES = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
NEAREST = torch.zeros(128)


def some_weight(rows: int = 64, cols: int = 90, seed: int = 0) -> torch.Tensor:
    """Normal entries with a few large ones, as trained matrices have."""
    weight = torch.randn(rows, cols, generator=seeded(seed)) * 0.02
    return weight * (1 + 3 * (torch.rand(rows, cols, generator=seeded(seed + 1)) < 0.01))


def outlier_activations(cols: int = 90, seed: int = 0) -> torch.Tensor:
    """``max|X_i|`` as LLM.int8() found it: log-normal, and one channel in fifty 20 times larger."""
    absmax = torch.exp(0.5 * torch.randn(cols, generator=seeded(seed)) + 1)
    absmax[::50] *= 20
    return absmax


# Scaling


@pytest.mark.parametrize("alpha", ALPHAS)
def test_importance_scale(alpha):
    absmax = outlier_activations()
    absmax[4] = 0
    before = absmax.clone()
    scale = importance_scale(absmax, alpha)
    expected = absmax.double() ** alpha
    expected[4] = 1
    assert torch.equal(absmax, before)
    assert scale.dtype == torch.float32
    # One rounding to bfloat16, and those of power and reciprocal.
    assert ((scale / expected - 1).abs() <= UNIT_BFLOAT16 * (1 + UNIT_BFLOAT16) + 8 * UNIT).all()
    if alpha == 0:
        assert (scale == 1).all()


def test_col_scale_is_what_bfloat16_holds():
    """Else a checkpoint stores 32 bits for each."""
    absmax = 1 + torch.arange(90) / 90
    col_scale = quantize_paper(some_weight(), absmax, 1.0, 0.0).col_scale
    assert torch.equal(col_scale, to_bfloat16_values(col_scale))


def test_importance_scale_of_the_smallest_inputs_is_positive():
    scale = importance_scale(torch.tensor([1e-45, 1e-39, 3e38]), 1.0)
    assert (scale > 0).all()
    assert torch.isfinite(1 / scale).all()


def check_integers(weight: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, step: torch.Tensor):
    """``q = round(W diag(s) / step)``, up to the three float32 roundings of that product and
    quotient.
    """
    exact = weight.double() * scale.double() / float(step)
    slack = 3 * UNIT * exact.abs()
    assert (
        reference.round_levels(exact.abs() - slack, NEAREST) <= (q * exact.sign()).double()
    ).all()
    assert (
        (q * exact.sign()).double() <= reference.round_levels(exact.abs() + slack, NEAREST)
    ).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from(ALPHAS), st.integers(0, 10**6))
def test_quantize_scaled_has_one_absmax_step(rows, cols, alpha, seed):
    weight = some_weight(rows, cols, seed)
    scale = importance_scale(outlier_activations(cols, seed), alpha)
    before = weight.clone()
    qweight, row_scale = quantize_scaled(weight, scale)
    largest = float((weight.double() * scale.double()).abs().max())
    assert torch.equal(weight, before)
    assert row_scale.shape == (rows,)
    assert (row_scale == row_scale[0]).all()
    assert float(row_scale[0]) == pytest.approx(largest / 127, rel=2.1 * UNIT)
    assert qweight.dtype == torch.int8
    assert qweight.int().abs().max() == 127
    check_integers(weight, scale, qweight, row_scale[0])


# Pruning


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_prune_is_the_plain_sort(rows, cols, sparsity, by_row, seed):
    """Small whole numbers: most scores are ties, and none is rounded."""
    qweight = torch.randint(-3, 4, (rows, cols), generator=seeded(seed)).to(torch.int8)
    absmax = torch.randint(0, 4, (cols,), generator=seeded(seed + 1)).float()
    before = qweight.clone()
    pruned = prune(qweight, absmax, sparsity, "row" if by_row else "tensor")
    assert torch.equal(qweight, before)
    if by_row:
        expected = torch.cat([reference.prune(row[None], absmax, sparsity) for row in qweight])
    else:
        expected = reference.prune(qweight, absmax, sparsity)
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_prune_leaves_the_exact_share(sparsity, granularity):
    """Zeros that were there already are part of it; of equal scores the first go."""
    qweight, _ = quantize_scaled(some_weight(), torch.ones(90))
    absmax = outlier_activations()
    pruned = prune(qweight, absmax, sparsity, granularity)
    parts = [pruned] if granularity == "tensor" else list(pruned)
    for part, whole in zip(parts, [qweight] if granularity == "tensor" else qweight, strict=True):
        zeros = int((part == 0).sum())
        assert zeros == max(round(sparsity * part.numel()), int((whole == 0).sum()))
    kept = pruned != 0
    assert torch.equal(pruned[kept], qweight[kept])


def test_prune_takes_the_lowest_scores_of_all():
    qweight, _ = quantize_scaled(some_weight(), torch.ones(90))
    absmax = outlier_activations()
    pruned = prune(qweight, absmax, 0.4)
    score = qweight.double().abs() * absmax.double()
    was_pruned = (pruned == 0) & (qweight != 0)
    assert was_pruned.any()
    assert score[was_pruned].max() <= score[pruned != 0].min() * (1 + 2 * UNIT)


def test_prune_ties_go_by_position():
    qweight = torch.tensor([[2, -2, 2], [2, 2, -2]], dtype=torch.int8)
    ones = torch.ones(3)
    assert prune(qweight, ones, 0.5).tolist() == [[0, 0, 0], [2, 2, -2]]
    assert prune(qweight, ones, 0.34, "row").tolist() == [[0, -2, 2], [0, 2, -2]]


# All of it


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_quantize_paper_is_scale_quantize_prune(alpha, sparsity, granularity):
    weight, absmax = some_weight(), outlier_activations()
    scale = absmax.pow(-alpha).bfloat16().double().reciprocal()
    step = float((weight * scale).abs().max()) / 127
    nearest = (weight.double() * scale / step).round().to(torch.int8)
    parts = [nearest] if granularity == "tensor" else nearest.split(1)
    expected = torch.cat([reference.prune(part, absmax, sparsity) for part in parts])
    quantized = quantize_paper(weight, absmax, alpha, sparsity, granularity)
    assert torch.equal(quantized.qweight, expected)
    assert quantized.row_scale.tolist() == pytest.approx([step] * 64, rel=4 * UNIT)
    if alpha == 0:
        assert quantized.col_scale is None
    else:
        assert quantized.col_scale.tolist() == pytest.approx((1 / scale).tolist(), rel=2 * UNIT)
    assert quantized.outlier_index is None


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_quantize_paper_moves_no_weight_by_more_than_half_a_step(alpha):
    weight, absmax = some_weight(), outlier_activations()
    quantized = quantize_paper(weight, absmax, alpha, 0.0)
    step = quantized.row_scale[:, None] * torch.ones(90)
    if quantized.col_scale is not None:
        step = step * quantized.col_scale
    slack = 6 * UNIT * weight.abs()  # roundings on the way there and back
    assert ((weight - quantized.dequantize()).abs() <= 0.5 * step + slack).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_trial_is_entropy_and_relative_output_error(alpha, sparsity):
    weight, absmax = some_weight(), outlier_activations()
    factor = correlated_factor(90)
    moment = factor @ factor.T
    bits, error = alpha_trial(weight, absmax, moment, alpha, sparsity)
    quantized = quantize_paper(weight, absmax, alpha, sparsity)
    assert bits == pytest.approx(reference.entropy(quantized.qweight), abs=1e-12)
    noise = reference.output_error(weight, quantized.dequantize(), moment)
    signal = reference.output_error(weight, torch.zeros_like(weight), moment)
    # Two quadratic forms in float32: sums of 90 and 90 * 64 products, of terms that cancel by the
    # condition, 100.
    assert error == pytest.approx(noise / signal, rel=100 * 2 * (90 + 64) * UNIT)


def test_alpha_trial_of_zero_weights():
    bits, error = alpha_trial(torch.zeros(3, 4), torch.ones(4), torch.eye(4).double(), 0.5, 0.0)
    assert (bits, error) == (0, 0)


@settings(deadline=None)
@given(st.floats(0.1, 8), st.floats(1e-9, 10))
def test_alpha_cost_is_a_bit_for_six_decibels(bits, error):
    assert alpha_cost(bits + 1, error / 4) == pytest.approx(alpha_cost(bits, error))
    assert alpha_cost(bits, error) < alpha_cost(bits + 1e-3, error)
    assert alpha_cost(bits, error) < alpha_cost(bits, error * 1.01)
    assert math.isfinite(alpha_cost(bits, 0.0))


# What the knobs do


def large_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Large enough for the code table not to matter; no weight is so large that it alone sets the
    scale.
    """
    return torch.randn(256, 500, generator=seeded(0)) * 0.02, outlier_activations(500)


def coded(alpha: float, sparsity: float) -> tuple[float, int]:
    """Entropy, and bytes as stored."""
    qweight = quantize_paper(*large_case(), alpha, sparsity).qweight
    return dcext.entropy(qweight), dcext.encode(qweight, "zstd").nbytes


def test_entropy_and_size_fall_with_alpha():
    results = [coded(alpha, 0.0) for alpha in ALPHAS]
    for (bits, nbytes), (next_bits, next_nbytes) in itertools.pairwise(results):
        assert next_bits < bits
        assert next_nbytes < nbytes


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_entropy_and_size_fall_with_sparsity(alpha):
    results = [coded(alpha, sparsity) for sparsity in SPARSITIES]
    natural = quantize_paper(*large_case(), alpha, 0.0)
    zeros = float((natural.qweight == 0).double().mean())
    for i, ((bits, nbytes), (next_bits, next_nbytes)) in enumerate(itertools.pairwise(results)):
        if SPARSITIES[i + 1] > zeros:
            assert next_bits < bits
            assert next_nbytes < nbytes
        else:
            assert (next_bits, next_nbytes) == (bits, nbytes)


# Without data


def row_sizes(rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, within a factor of 25."""
    return torch.exp(torch.randn(rows, generator=seeded(seed))).clamp(0.2, 5)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 5.0), st.integers(0, 10**6))
def test_data_free_meets_its_entropy(target, seed):
    """The step is found to 0.1 %, 0.0015 bit; rounded to bfloat16 the same way in all rows, it
    moves by 0.0056 bit.
    """
    weight = torch.randn(120, 200, generator=seeded(seed)) * row_sizes(120, seed)[:, None]
    before = weight.clone()
    quantized = round_data_free(weight, target)
    assert torch.equal(weight, before)
    assert quantized.col_scale is None
    assert quantized.outlier_index is None
    assert torch.equal(quantized.row_scale, to_bfloat16_values(quantized.row_scale))
    levels = weight.double() / quantized.row_scale.double()[:, None]
    assert ((levels - quantized.qweight).abs() <= 0.5 + 128 * UNIT).all()
    assert dcext.entropy(quantized.qweight) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize(("kind", "target"), [("uniform", 3.64), ("uniform", 5.0), ("normal", 6.0)])
def test_data_free_meets_its_entropy_for_light_tails_too(kind, target):
    """Uniform weights, such as ``nn.Linear`` starts with, and targets close to all of int8."""
    draw = torch.rand if kind == "uniform" else torch.randn
    weight = draw(120, 200, generator=seeded(0)) - (kind == "uniform") / 2
    assert dcext.entropy(round_data_free(weight, target).qweight) == pytest.approx(target, abs=0.02)


def test_data_free_steps_follow_the_root_of_the_rows():
    weight = torch.randn(50, 400, generator=seeded(0)) * row_sizes(50)[:, None]
    scale = round_data_free(weight, 2.0).row_scale.double()
    root = weight.double().square().mean(1).sqrt().sqrt()
    ratio = scale / root
    assert ratio.max() / ratio.min() <= (1 + 1.01 * UNIT_BFLOAT16) ** 2


@pytest.mark.parametrize("target", [7.5, 9.0])
def test_data_free_clips_nothing_where_int8_is_too_small(target):
    weight = torch.randn(60, 200, generator=seeded(0))
    weight[7, 3] = 1000
    quantized = round_data_free(weight, target)
    assert quantized.qweight.int().abs().max() <= 127
    error = (weight - quantized.dequantize()).abs()
    assert (error <= quantized.row_scale[:, None] * 0.5 * (1 + 300 * UNIT)).all()


def test_data_free_rows_of_zeros():
    weight = torch.randn(40, 50, generator=seeded(0))
    weight[[0, 17]] = 0
    quantized = round_data_free(weight, 3.0)
    assert not quantized.qweight[[0, 17]].any()
    assert torch.isfinite(quantized.row_scale).all()
    assert (quantized.row_scale > 0).all()
    nothing = round_data_free(torch.zeros(3, 4), 3.0)
    assert not nothing.qweight.any()
    assert nothing.row_scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_free_refuses_what_is_not_finite(value):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(
        ValueError, match="round_data_free: weight: expected finite values, got NaN"
    ):
        round_data_free(weight, 3.0)


# What recipes return


def test_dequantize_is_the_form_of_every_recipe():
    q = torch.randint(-127, 128, (6, 9), generator=seeded(0)).to(torch.int8)
    row_scale, col_scale = torch.rand(6), torch.rand(9)
    index = torch.tensor([1, 7], dtype=torch.int32)
    kept = torch.randn(6, 2, generator=seeded(1)).bfloat16()
    rows = torch.diag(row_scale.double())
    assert torch.equal(QuantizedWeight(q, row_scale).dequantize(), q.float() * row_scale[:, None])
    scaled = QuantizedWeight(q, row_scale, col_scale).dequantize()
    exact = rows @ q.double() @ torch.diag(col_scale.double())
    assert ((scaled - exact).abs() <= 2 * UNIT * exact.abs()).all()
    mixed = QuantizedWeight(q, row_scale, col_scale, index, kept).dequantize()
    assert torch.equal(mixed[:, [1, 7]], kept.float())
    others = [0, 2, 3, 4, 5, 6, 8]
    assert torch.equal(mixed[:, others], scaled[:, others])


@settings(deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_bfloat16_values_are_the_nearest(value):
    (nearest,) = to_bfloat16_values(torch.tensor([value])).tolist()
    step = 2.0 ** (math.frexp(value)[1] - 8)  # 8 significant bits
    assert nearest == round(value / step) * step


def test_output_snr():
    weight = torch.randn(10, 30, generator=seeded(0))
    rounded = weight.bfloat16().float()
    factor = correlated_factor(30)
    moment = factor @ factor.T
    signal = reference.output_error(weight, torch.zeros(10, 30), moment)
    expected = 10 * math.log10(signal / reference.output_error(weight, rounded, moment))
    # Quadratic forms in float32: sums of 30 and 300 products, that cancel by the condition, 100.
    tolerance = 10 / math.log(10) * 2 * 100 * (30 + 300) * UNIT
    assert output_snr_db(weight, rounded, moment) == pytest.approx(expected, abs=tolerance)
    assert output_snr_db(weight, weight, moment) == math.inf
