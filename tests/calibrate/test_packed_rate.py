"""Recipe ``rate`` for packed payloads: tables, widths, scales, refinement, and the size that is met."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_calibrate import JobInterruptedError, assert_same, calibration, wide_llama

import dcext
import reference
from dcext.quantize.control import RateController
from dcext.quantize.cost import PACKED_COST
from dcext.quantize.feedback import BIT_PRICE, round_with_feedback
from dcext.quantize.output_moment import ROW_BLOCK, row_factor
from dcext.quantize.packed_rate import (
    CENTERS,
    EXCEPTION_BITS,
    EXCEPTION_ROW_BITS,
    EXCEPTION_TIME_BITS,
    HEADROOM,
    LIMITS,
    MOST_PACKED_BITS,
    WIDTHS,
    Histogram,
    PackedForecast,
    distinct,
    fit_grid,
    fit_options,
    histogram,
    lloyd_levels,
    nearest_table,
    panel_histograms,
    panel_rows,
    plan_packed,
    round_packed,
)
from dcext.quantize.rate import sample_weights
from dcext.quantize.refine import refine
from dcext.recipes.rate import DEFAULT_PACKED_BITS
from reference import correlated_factor, seeded

SHAPES = [(1, 1), (17, 3), (16, 40), (300, 100), (576, 576), (100, 5000), (40, 20000), (33, 9000)]


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=seeded(seed))


def some_moment(rows: int, seed: int = 0) -> torch.Tensor:
    """Blocks of a second moment with strong correlations."""
    blocks = -(-rows // ROW_BLOCK)
    factor = torch.stack([correlated_factor(ROW_BLOCK, seed + i) for i in range(blocks)])
    return (factor @ factor.mT).float()


# What the encoder does with the integers


@pytest.mark.parametrize("shape", SHAPES)
def test_panels_are_the_encoders(shape):
    payload = dcext.encode(torch.zeros(shape, dtype=torch.int8), codec="packed")
    assert dcext.payload_info(payload)["panel_rows"] == panel_rows(*shape)


@pytest.mark.parametrize("shape", [(64, 96), (300, 100), (576, 576)])
@pytest.mark.parametrize("spread", [0.5, 3, 6, 12])
def test_stored_size_is_the_one_planned_for(shape, spread):
    weights = gaussian(*shape) * spread
    qweight = weights.round().clamp(-127, 127).to(torch.int8)
    payload = dcext.encode(qweight, codec="packed")
    assert payload.numel() == reference.packed_nbytes(qweight, panel_rows(*shape))


# Tables


def bell(spread: float = 2.5, most: float = 6) -> torch.Tensor:
    """``(1, BINS)``, a density with one top and few bins, so that Lloyd's iteration has one fixed point."""
    energy = torch.exp(-0.5 * (CENTERS / spread).square()) + 0.1 * torch.exp(-CENTERS.abs())
    return (energy * (CENTERS.abs() < most))[None]


def table_error(energy: torch.Tensor, levels: torch.Tensor) -> float:
    distance = (CENTERS[:, None] - levels.flatten()).abs().amin(1)
    return float((energy[0] * distance.square()).sum())


def least_error(energy: torch.Tensor, count: int) -> float:
    """Over all ways to cut the bins into cells, each rounded to its centroid."""
    held = energy[0].nonzero()[:, 0]
    mass, center = energy[0][held], CENTERS[held]

    def cell(first: int, last: int) -> float:
        level = (mass[first:last] * center[first:last]).sum() / mass[first:last].sum()
        return float((mass[first:last] * (center[first:last] - level).square()).sum())

    cost = {(a, b): cell(a, b) for a, b in itertools.combinations(range(len(held) + 1), 2)}
    return min(
        sum(cost[a, b] for a, b in itertools.pairwise((0, *cuts, len(held))))
        for cuts in itertools.combinations(range(1, len(held)), count - 1)
    )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_lloyd_levels_are_the_best_of_all(count):
    energy = bell()
    levels = lloyd_levels(energy, torch.tensor([[math.inf]]).double(), count)
    assert table_error(energy, levels) == pytest.approx(least_error(energy, count), rel=1e-3)


def test_lloyd_levels_know_nothing_of_what_is_beyond_the_limit():
    energy, limits = bell(most=60), torch.tensor([[4.0, math.inf]]).double()
    inside = energy * (CENTERS.abs() <= 4)
    near, all_of_it = lloyd_levels(energy, limits, 4)[0]
    assert table_error(inside, near) == pytest.approx(least_error(inside, 4), rel=0.02)
    assert all_of_it[-1] > near[-1]


@pytest.mark.parametrize("width", WIDTHS)
def test_lloyd_levels_of_a_normal_density_are_those_of_max(width):
    """Distortion over variance of Max's quantizers (Jayant and Noll, Digital Coding of Waveforms, table 4.4); 6: Lloyd's."""
    published = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000640}
    spread = 25.0
    energy = torch.exp(-0.5 * (CENTERS / spread).square())[None]
    levels = lloyd_levels(energy, torch.tensor([[math.inf]]).double(), 2**width)
    share = table_error(energy, levels) / spread**2 / float(energy.sum())
    assert share == pytest.approx(published[width], rel=0.06)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-140, 140), min_size=1, max_size=64))
def test_distinct_levels(values):
    levels = torch.tensor(sorted(values), dtype=torch.float64)[None]
    found = distinct(levels)[0]
    assert (found.diff() >= 1).all()
    assert found.abs().max() <= 127
    assert torch.equal(found, found.round())
    rounded = levels[0].round()
    if len(set(rounded.tolist())) == len(rounded) and rounded.abs().max() <= 127:
        assert torch.equal(found, rounded)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(-127, 127), min_size=1, max_size=64), st.floats(0.3, 140))
def test_nearest_table_is_the_nearest_level_of_every_half(levels, limit):
    ordered = torch.tensor(sorted(levels), dtype=torch.float64)
    table, exceptional = nearest_table(ordered[None, None], torch.tensor([[limit]]).double())
    for center, value, is_exception in zip(
        CENTERS.tolist(), table[0, 0].tolist(), exceptional[0, 0].tolist(), strict=True
    ):
        if abs(center) > limit:
            assert value == min(max(round(center), -127), 127)
            assert is_exception == (value not in levels)
        else:
            assert abs(value - center) == min(abs(level - center) for level in levels)
            assert value in levels
            assert not is_exception


# Widths


def some_panels(seed: int = 0) -> Histogram:
    """Three panels of values at the bins' centers, where their errors are exact."""
    panels = []
    for i in range(3):
        values = (gaussian(16, 50, seed + i) * 20 * 2).floor() / 2 + 0.25
        worth = torch.rand(16, generator=seeded(seed + 9 + i)) * 4.0**i
        panels.append(histogram(values, worth, torch.ones(50), 20.0))
    return panels[0] + panels[1] + panels[2]


def test_options_say_what_their_tables_do():
    panels = some_panels()
    options = fit_options(panels)
    assert options.width.tolist() == [width for width in WIDTHS for _ in LIMITS]
    for p, o in itertools.product(range(3), range(len(options.width))):
        table = options.nearest[p, o].double()
        error = (panels.energy[p] * (CENTERS - table).square()).sum()
        assert float(options.error[p, o]) == pytest.approx(float(error))
        limit = LIMITS[o % len(LIMITS)] * 20.0
        beyond = CENTERS.abs() > limit
        levels = set(table[~beyond].tolist())
        assert len(levels) <= 2 ** int(options.width[o])
        exceptions = sum(
            float(n)
            for n, b, v in zip(panels.count[p], beyond, table.tolist(), strict=True)
            if b and v not in levels
        )
        bits = 800 * int(options.width[o]) + EXCEPTION_BITS * exceptions
        bits += 16 * EXCEPTION_ROW_BITS * (exceptions > 0)
        # A level in whose cell no bin lies is not to be seen from the table.
        assert float(options.exceptions[p, o]) <= exceptions
        assert float(options.stored_bits[p, o]) <= bits
        if float(options.exceptions[p, o]) == exceptions:
            assert float(options.stored_bits[p, o]) == bits


@pytest.mark.parametrize("price", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_choice_is_the_best_of_all(price):
    """Of all combinations of options of three panels, at a price a bit."""
    options = fit_options(some_panels())
    cost = options.error + price * (options.stored_bits + EXCEPTION_TIME_BITS * options.exceptions)
    every = itertools.product(range(cost.shape[1]), repeat=3)
    least = min(sum(float(cost[p, o]) for p, o in enumerate(some)) for some in every)
    chosen = options.choose(price)
    assert float(cost.gather(1, chosen[:, None]).sum()) == pytest.approx(least)


def test_a_higher_price_never_buys_more_bits():
    options = fit_options(some_panels())
    bits = options.stored_bits + EXCEPTION_TIME_BITS * options.exceptions
    taken = [float(bits.gather(1, options.choose(10.0**k)[:, None]).sum()) for k in range(-4, 5)]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > 800 * 3 * 5
    assert taken[-1] == 800 * 3 * 2


# Scales


def planned(weights: dict, scale: float = 0.1):
    cols = next(iter(weights.values())).shape[1]
    factor = correlated_factor(cols)
    rows = {name: torch.ones(len(weight)) for name, weight in weights.items()}
    return factor, plan_packed(weights, factor, rows, scale)


def test_scales_make_rows_and_columns_alike_and_fill_the_grid():
    rows, cols = torch.logspace(-2, 2, 300), torch.logspace(1, -1, 100)
    weight = gaussian(300, 100) * rows[:, None] * cols
    factor, plan = planned({"a": weight})
    height = panel_rows(300, 100)
    steps = weight / plan.row_scale["a"][:, None] / plan.col_scale
    for part in steps.split(height):
        assert float(part.abs().max()) == pytest.approx(HEADROOM, rel=0.02)
        pivots = plan.col_scale * factor.diagonal().float()
        spread = (part * pivots).square().mean(1).sqrt()
        assert ((spread / spread.mean() - 1).abs() < 0.01).all()
    by_col = (weight / plan.row_scale["a"][:, None]).square().mean(0).sqrt() / plan.col_scale
    assert ((by_col / by_col.mean() - 1).abs() < 0.02).all()
    assert not plan.outliers["a"].numel()


def test_grid_of_rows_of_zeros():
    weight = torch.zeros(40, 30)
    assert (fit_grid(weight, torch.ones(40), torch.ones(30)) > 0).all()
    weight[3] = 1.0
    factor, plan = planned({"a": weight})
    found = round_packed("a", weight, factor, plan, some_moment(40))
    assert torch.isfinite(found.dequantize()).all()
    assert not found.dequantize()[4:].abs().max() > 0.05


def with_a_large_weight(size: float) -> torch.Tensor:
    weight = gaussian(1000, 100)
    weight[7, 5] = size
    return weight


def test_columns_that_the_grid_is_too_fine_for(monkeypatch):
    """They get coarser, for all layers, or are kept apart in the layer that has the weight."""
    weights = {"a": gaussian(1000, 100), "b": gaussian(20, 100, 1)}
    free = planned(weights)[1].col_scale
    monkeypatch.setattr("dcext.quantize.packed_rate.MOST_MAGNITUDE", 1.8)
    _, before = planned(weights)
    for size, grown, outliers in ((6.0, True, []), (1e4, False, [5])):
        _, plan = planned({**weights, "a": with_a_large_weight(size)})
        assert plan.outliers["a"].tolist() == outliers
        assert plan.outliers["b"].tolist() == []
        assert (plan.col_scale[5] > 1.2 * before.col_scale[5]) == grown
        assert plan.col_scale[5] > free[5]


def test_outlier_columns_are_zero_and_kept_in_bfloat16(monkeypatch):
    monkeypatch.setattr("dcext.quantize.packed_rate.MOST_MAGNITUDE", 1.8)
    weight = with_a_large_weight(1e4)
    factor, plan = planned({"a": weight})
    quantized = round_packed("a", weight, factor, plan, some_moment(1000))
    assert quantized.outlier_index.tolist() == [5]
    assert not quantized.qweight[:, 5].any()
    kept = quantized.outlier_weight[:, 0].float()
    assert (kept - weight[:, 5]).abs().median() < 0.5
    assert kept[7] == pytest.approx(1e4, rel=0.02)
    assert (quantized.dequantize() - weight)[8:].square().mean() < 0.1


# Rounding


def weighted(weight: torch.Tensor, approximation: torch.Tensor, factor, by_row) -> float:
    """``||A^T (W - W^) L||^2`` in float64, with the full matrix of rows."""
    full = reference.full_matrix(by_row, len(weight))
    return float((full.T @ (weight - approximation).double() @ factor).square().sum())


def rounding_case(rows: int = 100, cols: int = 70, scale: float = 0.3):
    weight, moment = gaussian(rows, cols), some_moment(rows)
    factor, plan = planned({"a": weight}, scale)
    return weight, factor, plan, moment


def test_round_packed_takes_values_of_its_tables():
    weight, factor, plan, moment = rounding_case()
    before = weight.clone()
    quantized = round_packed("a", weight, factor, plan, moment)
    assert torch.equal(weight, before)
    height = panel_rows(*weight.shape)
    for part, table in zip(quantized.qweight.split(height), plan.nearest("a"), strict=True):
        assert set(part.unique().tolist()) <= set(table.tolist())


@pytest.mark.parametrize("shape", [(100, 70), (64, 130), (7, 5)])
def test_refine_lowers_the_error_to_where_no_weight_would_change(shape):
    weight, factor, plan, moment = rounding_case(*shape)
    by_row, height = row_factor(moment, shape[0]), panel_rows(*shape)
    row_scale, col_scale, table = plan.row_scale["a"], plan.col_scale, plan.nearest("a")

    def error(q: torch.Tensor) -> float:
        return weighted(weight, q * row_scale[:, None] * col_scale, factor, by_row)

    args = (factor, by_row, row_scale, col_scale, table, height)
    q = round_with_feedback(
        weight, factor, row_scale, col_scale, None, by_row, nearest=table, panel_rows=height
    )
    errors, kept = [error(q)], q.clone()
    for _ in range(6):
        q = refine(weight, q, *args, 1)
        errors.append(error(q))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    assert torch.equal(refine(weight, kept, *args, 6), q)
    settled = refine(weight, q, *args, 100)
    assert torch.equal(refine(weight, settled, *args, 1), settled)
    steps = row_scale[:, None] * col_scale
    least = error(settled)
    for n, k in itertools.product(range(0, shape[0], 13), range(0, shape[1], 11)):
        for value in set(table[n // height].tolist()):
            other = settled.double()
            other[n, k] = value
            assert weighted(weight, other * steps, factor, by_row) >= least * (1 - 1e-6)


# The size


def test_forecast_is_the_size_that_comes_out():
    """Of a layer, at several scales, against its plan: the sample stands for all of its panels."""
    weight = gaussian(600, 400) * torch.logspace(-1, 1, 600)[:, None]
    factor, ones = correlated_factor(400), torch.ones(600)
    sample = sample_weights(weight, factor.diagonal().float(), seed=0)
    curve = PackedForecast(sample, ones, 0.0).curve()
    assert curve.weights == weight.numel()
    assert (curve.bits.diff() <= 1e-9).all()
    for scale in (0.05, 0.2, 0.8):
        plan = plan_packed({"a": weight}, factor, {"a": ones}, scale)
        panels = panel_histograms(
            weight, plan.row_scale["a"], plan.col_scale, ones, factor.diagonal().float()
        )
        options = fit_options(panels)
        chosen = options.choose(BIT_PRICE * scale**2)
        bits = float(options.stored_bits.gather(1, chosen[:, None]).sum()) / weight.numel()
        at = min(
            range(len(curve.points)),
            key=lambda i: abs(curve.points[i] + curve.log2_start - math.log2(scale)),
        )
        assert float(curve.bits[at]) == pytest.approx(bits, abs=0.15)


def packed(**changes) -> dcext.CompressionConfig:
    return dcext.CompressionConfig(**{"codec": "packed", **changes})


def test_default_size():
    assert packed().bits == DEFAULT_PACKED_BITS
    assert packed(target_ratio=2.0).bits == 4
    assert packed(target_bits=3.0).bits == 3
    assert packed(recipe="data-free").bits == dcext.CompressionConfig().bits == 8 / 2.2


@pytest.mark.parametrize("bits", [1.9, MOST_PACKED_BITS + 0.1])
def test_sizes_out_of_reach_are_refused(bits):
    with pytest.raises(ValueError, match=r"target_bits: expected 2\.1 to 6\.0"):
        RateController({}, bits, PACKED_COST.limits)


@pytest.mark.parametrize("bits", [3.4, 4.2])
def test_rate_meets_its_target(bits):
    """Of a model with some fifty panels: each has its integer width, but for exceptions."""
    model = wide_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    dcext.compress_(model, packed(target_bits=bits), calibration())
    report = model.dcext_report
    assert report.bits_per_weight("rate") == pytest.approx(bits, rel=0.005)
    widths = {layer.packed_width for layer in report.layers if layer.recipe == "rate"}
    assert len(widths) > 2
    assert 0 < report.mean("packed_exceptions") < 0.02


def test_rate_beats_rounding_at_the_same_size():
    reference_model, ids = wide_llama(), calibration(4, 32)
    with torch.no_grad():
        p = reference_model(ids).logits.log_softmax(-1)
    losses = {}
    for recipe in ("rate", "data-free"):
        ours = recipe == "rate"
        model = dcext.compress_(
            wide_llama(), packed(recipe=recipe, target_bits=4.5), calibration() if ours else None
        )
        with torch.no_grad():
            q = model(ids).logits.log_softmax(-1)
        losses[recipe] = float((p.exp() * (p - q)).sum(-1).mean())
    assert losses["rate"] < losses["data-free"]


def test_an_interrupted_job_goes_on_with_the_same_result(tmp_path):
    whole = dcext.compress_(wide_llama(), packed(), calibration())

    def stop(label: str, share: float) -> None:
        if label.startswith("model.layers.1."):
            raise JobInterruptedError

    folder = tmp_path / "resume"
    with pytest.raises(JobInterruptedError):
        dcext.compress_(wide_llama(), packed(), calibration(), progress=stop, resume_dir=folder)
    resumed = dcext.compress_(wide_llama(), packed(), calibration(), resume_dir=folder)
    assert_same(resumed, whole)
    assert resumed.dcext_report == whole.dcext_report


@pytest.mark.parametrize("recipe", ["int8", "data-free"])
def test_other_recipes_encode_what_they_have(recipe):
    model = dcext.compress_(wide_llama(), packed(recipe=recipe))
    plain = dcext.compress_(wide_llama(), dcext.CompressionConfig(recipe=recipe))
    layers = model.dcext_report.layers
    assert all(2 <= layer.packed_width <= 8 for layer in layers)
    if recipe == "int8":
        with torch.no_grad():
            assert torch.equal(model(calibration(1)).logits, plain(calibration(1)).logits)
