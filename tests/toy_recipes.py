"""Two recipes as somebody else would write them: importing this file makes them known."""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.calibrate.coded import CodedLayer, code_layer
from dcext.calibrate.driver import Calibrated
from dcext.calibrate.group_recipe import GroupRecipe
from dcext.calibrate.job import Job
from dcext.config import CompressionConfig
from dcext.quantize.quantized import QuantizedWeight, output_snr_db, to_bfloat16_values
from dcext.quantize.recipe import Recipe, register
from dcext.quantize.statistics import InputStatistics

MOST = 64


def round_to_powers(weight: Tensor) -> QuantizedWeight:
    """The nearest of 0 and +-1, 2, 4 .. 64 steps; a step for each row of ``(N, K)``."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    row_scale = to_bfloat16_values(torch.where(largest > 0, largest / MOST, 1.0))
    steps = (weight / row_scale[:, None]).clamp(-MOST, MOST)
    powers = steps.abs().clamp(min=1).log2().round().exp2()
    levels = torch.where(steps.abs() < 0.5, 0, steps.sign() * powers)
    return QuantizedWeight(levels.to(torch.int8), row_scale)


def compress(job: Job) -> list[dict[str, float]]:
    """Without data: layers one by one."""
    total = job.num_weights()
    for name, weight in job.layers():
        job.emit(name, code_layer(name, round_to_powers(weight), job.config, "toy"))
        job.progress(name, weight.numel() / total)
    return []


class ToyCalibrated(GroupRecipe):
    """Measures the error of the outputs; later layers see the compressed ones."""

    feeds_back = True

    def __init__(self, config: CompressionConfig) -> None:
        self._config = config

    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics
    ) -> dict[str, CodedLayer]:
        coded = {}
        for name, weight in weights.items():
            quantized = round_to_powers(weight)
            coded[name] = code_layer(name, quantized, self._config, "toy-calibrated")
            coded[name].report.output_snr_db = output_snr_db(
                weight, quantized.dequantize(), statistics.second_moment
            )
        return coded

    def fall_back(self, name: str, weight: Tensor, reason: str) -> CodedLayer:
        quantized = round_to_powers(weight)
        quantized.fallback = reason
        return code_layer(name, quantized, self._config, "toy-calibrated")


def compress_calibrated(job: Job) -> list[dict[str, float]]:
    """With a text: one pass over the blocks."""
    with Calibrated.of(job) as model:
        model.run(ToyCalibrated(job.config), model.later())
    return []


register(Recipe("toy", compress))
register(Recipe("toy-calibrated", compress_calibrated, calibrated=True))
