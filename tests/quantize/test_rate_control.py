"""Recipe ``rate``: the size that is met, and what every layer reports."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dcext.quantize.control import LEAST_BITS, MOST_BITS, LayerForecast, RateController
from dcext.quantize.rate import (
    predicted_entropy,
)
from dcext.quantize.report import CompressionReport, LayerReport
from reference import seeded


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=seeded(seed))


def layers_of_all_kinds(count: int = 24) -> tuple[dict, dict]:
    """Forecasts, and the weights themselves, of normal and Laplace layers of several sizes and
    spreads.
    """
    forecasts, weights = {}, {}
    for i in range(count):
        values = torch.randn(4096 * (1 + i % 3), generator=seeded(i)) * 2.0 ** (i % 5)
        if i % 2:
            values = values.sign() * values.square() * 2.0 ** -(i % 5)
        name = f"layer{i}"
        weights[name] = values
        forecasts[name] = LayerForecast(values[:2048], values.numel(), 0.02 * (1 + i % 2))
    return forecasts, weights


def stored_nbytes(name: str, scale: float, forecasts: dict, weights: dict) -> int:
    """What coding takes in the end: another entropy than the sample's, and an excess that is not
    known before.
    """
    excess = 0.03 + 0.02 * math.sin(int(name.removeprefix("layer")))
    bits = predicted_entropy(weights[name], scale) + forecasts[name].overhead_bits + excess
    return round(bits * forecasts[name].weights / 8)


def run_controller(controller: RateController, names: list, forecasts: dict, weights: dict) -> int:
    total = 0
    for name in names:
        scale = controller.scale()
        stored = stored_nbytes(name, scale, forecasts, weights)
        controller.record(name, scale, stored)
        total += stored
    return total


def test_one_layer_kept_in_bfloat16_does_not_starve_the_others():
    forecasts, _ = layers_of_all_kinds()
    controller = RateController(forecasts, 7.0)
    before = controller.scale()
    controller.record("layer0", before, 18 * forecasts["layer0"].weights // 8)
    assert controller.scale() < 8 * before


@pytest.mark.parametrize("target", [1.0, 2.5, 3.64, 5.0])
def test_controller_meets_its_target(target):
    forecasts, weights = layers_of_all_kinds()
    controller = RateController(forecasts, target)
    total = run_controller(controller, list(forecasts), forecasts, weights)
    count = sum(forecast.weights for forecast in forecasts.values())
    assert 8 * total / count == pytest.approx(target, rel=0.005)


@pytest.mark.parametrize(
    ("spread", "target"),
    [
        (1e-8, 3.64),
        (1e-5, 3.64),
        (1e-3, 3.64),
        (0.1, 2.0),
        (1.0, 3.64),
        (1.0, 6.0),
        (1e6, 3.64),
    ],
)
def test_controller_finds_the_scale_of_weights_of_any_size(spread, target):
    values = gaussian(1, 20000)[0] * spread
    controller = RateController({"a": LayerForecast(values, 10**6, 0.1)}, target)
    bits = predicted_entropy(values, controller.scale()) + 0.1
    assert target - 0.06 < bits < target  # the first excess that it expects is 0.04 bit


def test_controller_keeps_nearly_one_scale():
    forecasts, weights = layers_of_all_kinds()
    controller = RateController(forecasts, 3.0)
    first = controller.scale()
    scales = []
    for name in list(forecasts)[:20]:
        scales.append(controller.scale())
        controller.record(name, scales[-1], stored_nbytes(name, scales[-1], forecasts, weights))
    assert max(scales) / min(scales) < 2 ** (2 * 0.05)  # the excess is unknown by 0.05 bit at most
    assert scales[0] == first


def test_controller_learns_the_excess_from_the_first_layer():
    """Half a bit more than forecast moves the scale once; unlearnt, it would go on moving to the
    end.
    """
    forecasts, weights = layers_of_all_kinds()
    controller = RateController(forecasts, 3.0)
    scales = []
    for name, forecast in list(forecasts.items())[:20]:
        scales.append(controller.scale())
        bits = predicted_entropy(weights[name], scales[-1]) + forecast.overhead_bits + 0.5
        controller.record(name, scales[-1], round(bits * forecast.weights / 8))
    first, *others = scales
    assert max(others) / min(others) < others[0] / first


def test_controller_goes_on_from_its_state():
    forecasts, weights = layers_of_all_kinds()
    names = list(forecasts)
    whole, halved = RateController(forecasts, 3.0), RateController(forecasts, 3.0)
    run_controller(whole, names[:10], forecasts, weights)
    halved.restore(json.loads(json.dumps(whole.state())), names[:10])
    assert halved.state() == whole.state()
    assert halved.scale() == whole.scale()
    rest = [run_controller(one, names[10:], forecasts, weights) for one in (whole, halved)]
    assert rest[0] == rest[1]


def test_controller_tells_what_is_left_for_the_last_layers():
    forecasts, weights = layers_of_all_kinds()
    *names, one, other = forecasts
    controller = RateController(forecasts, 3.0)
    assert controller.left_bits([one, other]) is None
    total = run_controller(controller, names, forecasts, weights)
    last = [forecasts[one], forecasts[other]]
    fixed = sum(forecast.overhead_bits * forecast.weights for forecast in last)
    whole = 3.0 * sum(forecast.weights for forecast in forecasts.values())
    assert controller.left_bits([one, other]) == pytest.approx(whole - 8 * total - fixed)
    assert controller.left_bits([one]) is None


def test_controller_makes_up_for_layers_that_are_skipped():
    forecasts, weights = layers_of_all_kinds()
    names = list(forecasts)
    controller = RateController(forecasts, 3.0)
    total = 0
    for name in names[:2]:
        total += forecasts[name].weights
        controller.skip(name, forecasts[name].weights)  # one byte a weight
    total += run_controller(controller, names[2:], forecasts, weights)
    count = sum(forecast.weights for forecast in forecasts.values())
    assert 8 * total / count == pytest.approx(3.0, rel=0.005)


def test_controller_does_not_touch_the_forecasts_it_is_given():
    forecasts, weights = layers_of_all_kinds(4)
    run_controller(RateController(forecasts, 3.0), list(forecasts), forecasts, weights)
    assert len(forecasts) == 4


@pytest.mark.parametrize("target", [LEAST_BITS * 0.99, MOST_BITS * 1.01, math.nan, math.inf])
def test_controller_refuses_targets_out_of_reach(target):
    with pytest.raises(ValueError, match=r"target_bits: expected .* bits per weight, got"):
        RateController({}, target)


# The report


def some_report() -> CompressionReport:
    layers = [
        LayerReport("a", (10, 20), "rate", 100, 3.9, output_snr_db=30.0, waterfilling_bits=3.5),
        LayerReport("b", (10, 60), "rate", 180, 2.3, output_snr_db=10.0, outlier_columns=2),
        LayerReport("head", (5, 40), "int8", 190, 7.1, fallback="why"),
    ]
    return CompressionReport(layers, 3.0, [{"alpha": 0.5, "cost": 1.0}])


def test_report_means_are_over_weights():
    report = some_report()
    assert report.layers[0].bits_per_weight == 4
    assert report.bits_per_weight() == 8 * 470 / 1000
    assert report.bits_per_weight("rate") == 8 * 280 / 800
    assert report.bits_per_weight("paper") == 0
    assert report.mean("output_snr_db") == (30 * 200 + 10 * 600) / 800
    assert report.mean("alpha") is None
    assert report.waterfilling_gap_bits == 0.5
    assert CompressionReport().waterfilling_gap_bits is None


def test_report_survives_json():
    report = some_report()
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
