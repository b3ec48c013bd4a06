"""Recipe ``rate``: steps, rounding, scales, forecasts, and the bits that no quantizer can do without."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcext
import reference
from dcext.quantize import rate
from dcext.quantize.feedback import MAX_LEVEL, round_with_feedback
from dcext.quantize.output_moment import (
    ROW_BLOCK,
    row_energies,
    row_factor,
)
from dcext.quantize.quantized import to_bfloat16_values
from dcext.quantize.rate import (
    HEADROOM,
    MOST_SPREAD,
    OUTLIER_STEPS,
    ROW_CLASSES,
    SAMPLE_WEIGHTS,
    Steps,
    fit_row_scale,
    plan_steps,
    predicted_entropy,
    restore_order,
    round_to_steps,
    rounding_order,
    sample_weights,
    spread_factor,
    waterfilling_bits,
)
from reference import BIT_PRICE, UNIT, UNIT_BFLOAT16, correlated_factor, seeded

COLS = 70


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=seeded(seed))


def skewed_rows(rows: int, seed: int = 0) -> torch.Tensor:
    """Squared derivatives by output, a few decades apart."""
    return torch.exp(2 * torch.randn(rows, generator=seeded(seed)))


def some_rows(rows: int) -> torch.Tensor:
    """Row scales around 1."""
    return to_bfloat16_values(skewed_rows(rows) ** -0.125)


def unit_moment(rows: int) -> torch.Tensor:
    """That of outputs whose errors matter alike and independently."""
    return torch.eye(ROW_BLOCK).expand(-(-rows // ROW_BLOCK), -1, -1)


def some_moment(rows: int, seed: int = 0) -> torch.Tensor:
    """Blocks of a second moment with strong correlations."""
    blocks = -(-rows // ROW_BLOCK)
    factor = torch.stack([correlated_factor(ROW_BLOCK, seed + i) for i in range(blocks)])
    return (factor @ factor.mT).float()


@pytest.fixture
def even_steps(monkeypatch):
    """Steps that do not depend on how wide rows and columns spread."""
    monkeypatch.setattr(rate, "spread_factor", torch.ones_like)


def planned(weight: torch.Tensor, scale: float) -> tuple[torch.Tensor, Steps]:
    """A factor for this matrix, and its steps."""
    factor = correlated_factor(weight.shape[1])
    rows = {"a": some_rows(weight.shape[0])}
    return factor, plan_steps({"a": weight}, factor, rows, scale)


# Steps


def test_steps_grow_with_the_root_of_the_spread():
    """Every weight adds ``(row_scale_n col_scale_k L_kk)^2 s_n``, in proportion to how wide its row
    and its column spread: the scales are rounded to bfloat16.
    """
    factor = correlated_factor(COLS)
    rows = {"a": some_rows(40), "b": some_rows(25)}
    weights = {name: gaussian(len(value), COLS) * 1e-4 for name, value in rows.items()}
    steps = plan_steps(weights, factor, rows, 0.2)
    assert steps.capped == 0
    pivots = factor.diagonal()
    scaled = {n: (w.double() / rows[n].double()[:, None] * pivots) for n, w in weights.items()}
    by_col = torch.cat(list(scaled.values())).square().mean(0).sqrt()
    for name in weights:
        by_row = scaled[name].square().mean(1).sqrt()
        step = steps.row_scale[name].double()[:, None] * steps.col_scale * pivots
        share = (step / rows[name][:, None] / 0.2).square()
        expected = torch.outer(by_row / by_row.mean(), by_col / by_col.mean())
        assert (((share / expected).log() / 4).abs() <= 1.01 * UNIT_BFLOAT16).all()
        assert steps.outliers[name].numel() == 0


def test_spread_factor():
    factors = spread_factor(torch.tensor([1.0, 4.0, 0.0, 3.0, 1e6]))
    assert factors.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, math.sqrt(5)], rel=1e-4)
    assert spread_factor(torch.ones(3)).tolist() == [1, 1, 1]
    assert spread_factor(torch.zeros(3)).tolist() == [1 / MOST_SPREAD] * 3
    assert spread_factor(torch.tensor([1e-3] * 99 + [1e3]))[-1] == MOST_SPREAD


def test_one_table_takes_fewer_bits_with_steps_that_grow_with_the_spread():
    """The entropy of all integers at the same squared error, rows being of very different size."""
    values = gaussian(200, 500) * torch.logspace(-1, 1, 200, base=2)[:, None]
    bits = {}
    for name, power in (("alike", 0.0), ("ours", 0.5), ("in proportion", 1.0)):
        spread = values.square().mean(1).sqrt()
        steps = 0.5 * (spread_factor(spread) if power == 0.5 else (spread / spread.mean()) ** power)
        steps /= steps.square().mean().sqrt() / 0.5  # the error of rounding is steps^2 / 12
        bits[name] = reference.entropy((values / steps[:, None]).round())
    limit = float((gaussian(200, 500) / 0.5).std().log2()) + 0.5 * math.log2(2 * math.pi * math.e)
    assert bits["ours"] < min(bits["alike"], bits["in proportion"])
    # Half of what the common table costs is left: see spread_factor.
    assert bits["ours"] - limit == pytest.approx((bits["alike"] - limit) / 2, abs=0.03)


def plain_spread(values: list[float]) -> list[float]:
    """``sqrt(v / mean v)`` within its limits."""
    mean = sum(values) / len(values)
    return [min(max((v / mean) ** 0.5, 1 / MOST_SPREAD), MOST_SPREAD) for v in values]


def plain_plan(
    weights: dict, factor: torch.Tensor, rows: dict, adjusted: dict, scale: float
) -> tuple[list, dict]:
    """Steps before their rounding to bfloat16, those without limits of range, and outlier columns,
    one column of one layer at a time. ``adjusted`` holds row scales as they were rounded.
    """
    spreads = []
    for k in range(factor.shape[0]):
        squares = [
            (w[:, k].double() / rows[n].double() * factor[k, k]).square().tolist()
            for n, w in weights.items()
        ]
        spreads.append((sum(map(sum, squares)) / sum(map(len, squares))) ** 0.5)
    steps, free, outliers = [], [], {name: [] for name in weights}
    for k, grown in enumerate(plain_spread(spreads)):
        wanted = scale / float(factor[k, k]) * grown
        step = wanted
        for name, weight in weights.items():
            least = float((weight[:, k] / adjusted[name]).abs().max()) / HEADROOM
            if least > OUTLIER_STEPS * wanted:
                outliers[name].append(k)
            else:
                step = max(step, least)
        steps.append(step)
        free.append(wanted)
    return steps, free, outliers


@pytest.mark.parametrize("scale", [0.001, 0.01, 0.03, 0.3])
def test_plan_steps_is_the_plain_loop(scale):
    factor = correlated_factor(COLS)
    weights = {"a": gaussian(40, COLS, 1), "b": gaussian(30, COLS, 2) * 2}
    weights["a"][:, [3, 50]] *= 20
    rows = {"a": torch.ones(40), "b": some_rows(30)}
    steps = plan_steps(weights, factor, rows, scale)
    for name, weight in weights.items():
        spread = (weight.double() / rows[name].double()[:, None] * factor.diagonal()).square()
        grown = torch.tensor(plain_spread(spread.mean(1).sqrt().tolist()), dtype=torch.float64)
        exact = rows[name].double() * grown
        assert ((steps.row_scale[name] / exact - 1).abs() <= UNIT_BFLOAT16 + 90 * UNIT).all()
    expected, free, outliers = plain_plan(weights, factor, rows, steps.row_scale, scale)
    assert {name: index.tolist() for name, index in steps.outliers.items()} == outliers
    exact = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(steps.col_scale, to_bfloat16_values(steps.col_scale))
    assert ((steps.col_scale / exact - 1).abs() <= UNIT_BFLOAT16 + 90 * UNIT).all()
    assert steps.capped == sum(a > b for a, b in zip(expected, free, strict=True))
    for name, weight in weights.items():
        levels = weight.abs() / steps.row_scale[name][:, None] / steps.col_scale
        levels[:, outliers[name]] = 0
        assert levels.max() <= HEADROOM * (1 + 2 * UNIT_BFLOAT16) < MAX_LEVEL


@pytest.mark.parametrize(
    ("steps_needed", "is_outlier"),
    [(0.9, False), (0.9 * OUTLIER_STEPS, False), (1.1 * OUTLIER_STEPS, True)],
)
def test_outlier_columns_are_those_whose_step_would_cost_more(even_steps, steps_needed, is_outlier):
    """A layer with an outlier leaves the shared step of that column to the layers without."""
    weights = {"a": torch.full((2, 3), 0.1), "b": torch.full((2, 3), 0.1)}
    weights["a"][1, 1] = -HEADROOM * steps_needed
    rows = {"a": torch.ones(2), "b": torch.ones(2)}
    steps = plan_steps(weights, torch.eye(3, dtype=torch.float64), rows, 1.0)
    assert steps.outliers["a"].tolist() == ([1] if is_outlier else [])
    assert steps.outliers["a"].dtype == torch.int32
    assert steps.outliers["b"].tolist() == []
    grown = steps_needed if steps_needed > 1 and not is_outlier else 1.0
    assert steps.col_scale.tolist() == pytest.approx([1.0, grown, 1.0], rel=UNIT_BFLOAT16)
    assert steps.capped == (grown > 1)


def test_rounding_order_puts_the_strongest_inputs_last():
    moment = torch.diag(torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0]))
    assert rounding_order(moment).tolist() == [1, 3, 2, 0, 4]


@pytest.mark.parametrize("has_outliers", [False, True])
def test_restore_order_undoes_a_permutation(has_outliers):
    weight = gaussian(30, COLS)
    outliers = [3, 20, 35, 50]
    weight[:, outliers] *= 1000 if has_outliers else 1
    order = torch.randperm(COLS, generator=seeded(1))
    factor, steps = planned(weight[:, order], 0.2)
    quantized = round_to_steps("a", weight[:, order], factor, steps, unit_moment(30))
    col_scale = steps.col_scale[order.argsort()]
    restored = restore_order(quantized, order, col_scale)
    assert restored.col_scale is col_scale
    assert restored.qweight.is_contiguous()
    assert torch.equal(restored.dequantize()[:, order], quantized.dequantize())
    if has_outliers:
        places = order.argsort()[outliers].tolist()
        assert places != sorted(places)  # the columns have to be sorted, too
        assert restored.outlier_index.tolist() == outliers
        assert restored.outlier_index.dtype == torch.int32
        assert restored.outlier_weight.is_contiguous()
    else:
        assert restored.outlier_index is None


# Rounding


@pytest.mark.parametrize("scale", [0.2, 0.5, 2.0])
def test_round_to_steps_keeps_the_bound_of_error_feedback(scale):
    """Each ``(A^T (W - W^) L)_ni`` is below 0.95 steps times ``A_nn L_ii``: half a step, and at most
    0.45 for a shorter code.
    """
    weight = gaussian(100, COLS)
    factor, steps = planned(weight, scale)
    before, moment = weight.clone(), some_moment(100)
    quantized = round_to_steps("a", weight, factor, steps, moment)
    assert torch.equal(weight, before)
    assert quantized.outlier_index is None
    step = steps.row_scale["a"].double()[:, None] * steps.col_scale.double()
    by_row = row_factor(moment, 100)
    target, slack = reference.feedback_targets(weight, quantized.qweight * step, factor, by_row)
    bound = 0.95 * step + slack
    assert ((target - quantized.qweight * step).abs() <= bound).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_round_to_steps_takes_shorter_codes_where_they_pay(even_steps, scale):
    """In squared errors in steps plus what their bits are worth, against nearest rounding with the
    same feedback.
    """
    weight = gaussian(300, COLS)
    factor = correlated_factor(COLS)
    rows = {"a": torch.ones(300)}
    steps = plan_steps({"a": weight}, factor, rows, scale)
    costs = []
    for q in (
        round_to_steps("a", weight, factor, steps, unit_moment(300)).qweight,
        round_with_feedback(weight, factor, rows["a"], steps.col_scale),
    ):
        error = reference.output_error(weight, q * steps.col_scale, factor @ factor.T)
        costs.append(error / scale**2 + BIT_PRICE * reference.entropy(q) * q.numel())
    assert costs[0] < costs[1]


def with_outliers() -> tuple[torch.Tensor, torch.Tensor, Steps]:
    weight = gaussian(100, COLS)
    weight[:, [3, 30, 60]] *= 1000
    return weight, *planned(weight, 0.2)


def test_outlier_columns_are_zero_and_kept_in_bfloat16():
    weight, factor, steps = with_outliers()
    quantized = round_to_steps("a", weight, factor, steps, some_moment(100))
    index = [3, 30, 60]
    assert quantized.outlier_index.tolist() == index
    assert quantized.outlier_index.dtype == torch.int32
    assert not quantized.qweight[:, index].any()
    kept = quantized.outlier_weight.float()
    assert (kept - weight[:, index]).abs().max() < 0.02 * weight[:, index].abs().max()
    plain = dataclasses.replace(quantized, outlier_weight=weight[:, index].bfloat16())

    def loss(approximation: torch.Tensor) -> float:
        return float(((weight - approximation).double() @ factor).square().sum())

    assert loss(quantized.dequantize()) < loss(
        plain.dequantize()
    )  # they make up for the others' errors
    assert torch.equal(quantized.dequantize()[:, index], kept)


def test_columns_before_an_outlier_do_not_correct_what_it_keeps(even_steps):
    """Whole numbers in column 0, whose only correction would be for column 1, which is kept."""
    weight = torch.tensor(
        [[1.0, 1e6, 0.25], [2.0, 1e6, 0.25], [-3.0, -1e6, 0.25], [0.0, 1e6, 0.25]]
    )
    factor = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 8.0, 1.0]], dtype=torch.float64)
    steps = plan_steps({"a": weight}, factor, {"a": torch.ones(4)}, 1.0)
    quantized = round_to_steps("a", weight, factor, steps, unit_moment(4))
    assert quantized.outlier_index.tolist() == [1]
    assert quantized.qweight.tolist() == [[1, 0, 0], [2, 0, 0], [-3, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (7, 130), (70, 20)])
def test_fit_row_scale_is_least_squares(shape):
    rows, cols = shape
    weight = gaussian(rows, cols) + 0.1
    factor, by_row = correlated_factor(cols), row_factor(some_moment(rows), rows)
    col_scale = torch.rand(cols, generator=seeded(1)) + 0.5
    qweight = (weight / col_scale * 3).round().clamp(-127, 127).to(torch.int8)
    qweight[0, 0] = 1
    fitted = fit_row_scale(weight, qweight, col_scale, factor, torch.ones(rows), by_row)
    exact = reference.fit_row_scale(weight, qweight, col_scale, factor, by_row)
    assert (exact > 0).all()
    assert torch.equal(fitted, to_bfloat16_values(fitted))
    # Products of float32, whose terms cancel by less than 10; the condition of the system is below
    # that of the moment, 10 / 0.1.
    assert ((fitted / exact - 1).abs() <= UNIT_BFLOAT16 + 100 * 20 * (cols + 4) * UNIT).all()


def test_fit_row_scale_leaves_alone_what_has_no_fit():
    weight = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]])
    qweight = torch.tensor([[1, 0], [0, 0], [1, 2]], dtype=torch.int8)
    default = torch.tensor([2.0, 3.0, 4.0])
    factor, by_row = torch.eye(2, dtype=torch.float64), unit_moment(3).double()
    fitted = fit_row_scale(weight, qweight, torch.ones(2), factor, default, by_row)
    assert torch.equal(fitted, default)


# Forecasts


def test_sample_of_a_small_layer_is_all_of_it():
    weight, pivots = gaussian(30, COLS).bfloat16(), correlated_factor(COLS).diagonal().float()
    sample = sample_weights(weight, pivots, seed=0)
    scaled = weight.float() * pivots
    by_col = spread_factor(scaled.square().mean(0).sqrt())
    assert torch.equal(sample.values.reshape(30, COLS), scaled / by_col)
    assert torch.equal(sample.row_spread, scaled.square().mean(1).sqrt())
    assert torch.equal(sample.rows, torch.arange(30).repeat_interleave(COLS))
    assert sample.shape == (30, COLS)


def test_normalized_sample_is_in_units_of_its_steps():
    """Those that are planned for it, but for their rounding to bfloat16: rows are alike here, so
    that columns spread by what the sample knows.
    """
    weight, factor, rows = gaussian(30, COLS), correlated_factor(COLS), torch.full((30,), 0.5)
    sample = sample_weights(weight, factor.diagonal().float(), seed=0)
    steps = plan_steps({"a": weight}, factor, {"a": rows}, 1.0)
    exact = weight / steps.row_scale["a"][:, None] / steps.col_scale
    ratio = sample.normalized(rows).reshape(30, COLS) / exact
    assert ((ratio - 1).abs() <= 2.1 * UNIT_BFLOAT16).all()


def test_sample_of_a_large_layer(even_steps):
    """Weights that tell their place: the sample is of the seed alone, from everywhere, and in the
    right rows.
    """
    weight = torch.arange(300 * 400).reshape(300, 400).float()
    pivots = torch.ones(400)
    torch.manual_seed(1)
    first = sample_weights(weight, pivots, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = sample_weights(weight, pivots, seed=5)
    other = sample_weights(weight, pivots, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.values.numel() == SAMPLE_WEIGHTS
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.values, other.values)
    assert torch.equal(first.values.long() // 400, first.rows)
    counts = torch.bincount(first.rows, minlength=300)
    assert ((counts - SAMPLE_WEIGHTS / 300).abs() < 6 * (SAMPLE_WEIGHTS / 300) ** 0.5).all()


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 300), st.integers(0, 10**6))
def test_predicted_entropy_is_that_of_the_rounded_integers(scale, count, seed):
    values = gaussian(1, count, seed)[0] * 10
    before = values.clone()
    integers = (values / scale).round().clamp(-127, 127).to(torch.int8)
    predicted = predicted_entropy(values, scale)
    assert torch.equal(values, before)
    assert predicted == pytest.approx(dcext.entropy(integers), abs=1e-12)
    assert predicted == pytest.approx(reference.entropy(integers), abs=1e-12)


def waterfilling_case(seed: int, rows: int = 6, cols: int = 9) -> tuple:
    """Energies of rows, the second moment's eigenvalues, and the mean of the components."""
    factor = correlated_factor(cols, seed)
    energies = skewed_rows(rows, seed).double()
    eigenvalues = torch.linalg.eigvalsh(factor @ factor.T)
    return energies, eigenvalues, float(energies.mean() * eigenvalues.mean())


WATERFILLING_BITS = 1e-9  # sums in float64


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 2.0))
def test_waterfilling_bits_is_the_exact_level(seed, share):
    energies, eigenvalues, mean = waterfilling_case(seed)
    bits = waterfilling_bits(energies, eigenvalues, share * mean)
    expected = reference.waterfilling_bits(energies, eigenvalues, share * mean)
    assert bits == pytest.approx(expected, abs=WATERFILLING_BITS)


def test_waterfilling_bits_above_the_level_is_the_closed_form():
    energies, eigenvalues, _ = waterfilling_case(0)
    log_mean = float(torch.outer(energies, eigenvalues).log2().mean())
    level = 0.01 * float(energies.min() * eigenvalues[0])
    for distortion in (level, level / 2, level / 1024):  # half the distortion is half a bit
        bits = waterfilling_bits(energies, eigenvalues, distortion)
        expected = 0.5 * (log_mean - math.log2(distortion))
        assert bits == pytest.approx(expected, abs=WATERFILLING_BITS)


def test_waterfilling_bits_falls_with_the_distortion_to_zero():
    energies, eigenvalues, mean = waterfilling_case(1)
    shares = [1e-9, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999, 1.001, 7.0]
    bits = [waterfilling_bits(energies, eigenvalues, mean * share) for share in shares]
    assert bits[-2:] == [0, 0]
    assert all(more > less for more, less in itertools.pairwise(bits[:-1]))


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.1, 0.5])
def test_waterfilling_bits_of_many_rows_is_off_by_what_classes_hide(share):
    """A class is taken for its mean, whose logarithm is not below the mean of the logarithms."""
    energies, eigenvalues, mean = waterfilling_case(0, rows=300)
    bits = waterfilling_bits(energies, eigenvalues, share * mean)
    exact = reference.waterfilling_bits(energies, eigenvalues, share * mean)
    classes = energies.sort()[0].tensor_split(ROW_CLASSES)
    hidden = sum(float((part.mean() / part).log2().sum()) for part in classes) / 2 / 300
    assert -WATERFILLING_BITS <= bits - exact <= hidden + WATERFILLING_BITS


def test_waterfilling_bits_of_singular_moments_and_zero_rows():
    energies, eigenvalues, _ = waterfilling_case(2)
    energies[[2, 3]] = 0
    eigenvalues[:5] = torch.tensor([-1e-17, 0, 0, 1e-19, 1e-18])
    bits = waterfilling_bits(energies, eigenvalues, 0.01)
    expected = reference.waterfilling_bits(energies, eigenvalues, 0.01)
    assert bits == pytest.approx(expected, abs=WATERFILLING_BITS)


def test_waterfilling_bits_of_nothing_is_zero():
    energies, eigenvalues, _ = waterfilling_case(2)
    assert waterfilling_bits(energies * 0, eigenvalues, 0.0) == 0


def test_rounding_stays_within_a_quarter_bit_of_waterfilling(even_steps):
    """With a code for each column: ``log2(2 pi e / 12) / 2`` at high rate, that of uniform steps;
    finite columns seem less.
    """
    weight = gaussian(3000, COLS)
    factor, outputs = correlated_factor(COLS), unit_moment(3000)
    moment = factor @ factor.T
    steps = plan_steps({"a": weight}, factor, {"a": torch.ones(3000)}, 0.1)
    quantized = round_to_steps("a", weight, factor, steps, outputs)
    distortion = reference.output_error(weight, quantized.dequantize(), moment) / weight.numel()
    eigenvalues = torch.linalg.eigvalsh(moment)
    limit = waterfilling_bits(row_energies(weight, outputs), eigenvalues, distortion)
    by_column = [reference.entropy(column) for column in quantized.qweight.T]
    assert 0 < sum(by_column) / COLS - limit < 0.5 * math.log2(2 * math.pi * math.e / 12)
