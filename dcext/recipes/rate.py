"""Recipe ``rate``: equal slope over all layers, column steps from the inputs, error feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcext.calibrate.coded import CodedLayer, code_layer, pruned_share, unusable
from dcext.calibrate.driver import Calibrated
from dcext.calibrate.group_recipe import GroupRecipe
from dcext.calibrate.job import Job
from dcext.calibrate.sensitivity import Sensitivity
from dcext.codec import CODECS
from dcext.codecs import codec_named
from dcext.config import CompressionConfig
from dcext.quantize.control import RateController
from dcext.quantize.data_free import round_data_free
from dcext.quantize.feedback import cholesky_factor
from dcext.quantize.output_moment import row_energies, row_factor, row_scales, weighted_error
from dcext.quantize.quantized import output_snr_db
from dcext.quantize.rate import MOST_POWER, restore_order, rounding_order, waterfilling_bits
from dcext.quantize.recipe import Recipe, register
from dcext.quantize.statistics import InputStatistics

NAME = "rate"
SENSITIVITY_SHARE = 0.35  # of all work
# Loses as much packed as entropy-coded at the ratio of 2.2: on SmolLM2-135M a divergence of 0.078 nats per token W8A16 and
# 0.094 W8A8, against 0.083 and 0.093 (bench/results/quality.json).
DEFAULT_PACKED_BITS = 4.25
# A fallback is rounded with fewer bits by what its scales take, but by no more than this many per weight: matrices of
# few columns are small and easily ruined.
MOST_SCALE_BITS = 0.5


def compress(job: Job) -> list[dict[str, float]]:
    """Measures how sensitive the loss is to each layer, then quantizes them block by block."""
    with Calibrated.of(job) as model:
        later = model.later(rate_statistics)
        recipe = RateRecipe(job.config, model.sensitivity(later, SENSITIVITY_SHARE))
        model.run(recipe, later, 1 - SENSITIVITY_SHARE)
    return []


def rate_statistics(in_features: int) -> InputStatistics:
    """What recipe ``rate`` learns of a layer's inputs."""
    return InputStatistics(in_features, with_values=False, most_power=MOST_POWER)


class RateRecipe(GroupRecipe):
    """Recipe ``rate``: equal slope over all layers, column steps from the inputs, error feedback."""

    feeds_back = True  # later layers are calibrated on the outputs of the compressed ones

    def __init__(self, config: CompressionConfig, sensitivity: Sensitivity) -> None:
        """Makes the forecasts for ``config.target_bits``."""
        self._config = config
        self._cost = codec_named(config.codec).cost
        self.groups: dict[str, list[str]] | None = {g[0]: g for g in sensitivity.groups}
        self._rows = {}
        forecasts = {}
        for group in sensitivity.groups:
            for name in group:
                if name not in sensitivity.samples or name not in sensitivity.output:
                    continue
                sample = sensitivity.samples[name]
                rows, cols = sample.shape
                factor = row_factor(sensitivity.output[name], rows)
                self._rows[name] = row_scales(factor, rows)
                scale_bits = 16 * (rows + (cols if name == group[0] else 0))
                forecasts[name] = self._cost.forecast(sample, self._rows[name], scale_bits)
        self._moments = sensitivity.output
        self._controller = RateController(
            forecasts, config.bits, self._cost.limits, self._cost.first_excess_bits
        )

    def statistics(self, in_features: int) -> InputStatistics:
        return rate_statistics(in_features)

    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics
    ) -> dict[str, CodedLayer]:
        reason = unusable(statistics)
        if reason is None and not weights.keys() <= self._rows.keys():
            reason = "no finite gradient or statistics in the sensitivity pass"
        if reason is not None:
            return {name: self.fall_back(name, weight, reason) for name, weight in weights.items()}
        moment = statistics.second_moment
        order = rounding_order(moment)
        factor = cholesky_factor(moment[order][:, order])
        scale = self._controller.scale()
        rows = {name: self._rows[name] for name in weights}
        ordered = {name: weight[:, order] for name, weight in weights.items()}
        steps = self._cost.plan(ordered, factor, rows, scale)
        left_bits = self._controller.left_bits(weights)
        if left_bits is not None:
            steps.fill(left_bits)
        col_scale = steps.col_scale[order.argsort()]
        eigenvalues = torch.linalg.eigvalsh(moment.float())
        coded = {}
        for i, (name, weight) in enumerate(weights.items()):
            quantized = self._cost.round(name, ordered[name], factor, steps, self._moments[name])
            quantized = restore_order(quantized, order, col_scale)
            if statistics.tokens < weight.shape[1]:
                quantized.fallback = (
                    f"second moment of rank {statistics.tokens} at most, for {weight.shape[1]} inputs: "
                    "damped, give more calibration text"
                )
            layer = code_layer(name, quantized, self._config, NAME, owns_col_scale=i == 0)
            self._describe(layer, weight, moment, eigenvalues)
            self._controller.record(name, scale, layer.report.stored_nbytes)
            coded[name] = layer
        return coded

    def _describe(
        self, layer: CodedLayer, weight: Tensor, moment: Tensor, eigenvalues: Tensor
    ) -> None:
        approximation = layer.quantized.dequantize()
        outputs = self._moments[layer.report.name]
        loss = weighted_error(weight - approximation, moment, outputs)
        layer.report.output_snr_db = output_snr_db(weight, approximation, moment)
        layer.report.pruned_share = pruned_share(weight, layer.quantized)
        layer.report.expected_loss = loss / 2
        layer.report.waterfilling_bits = waterfilling_bits(
            row_energies(weight, outputs), eigenvalues, loss / weight.numel()
        )

    def fall_back(self, name: str, weight: Tensor, reason: str) -> CodedLayer:
        coded = fall_back(name, weight, self._config, reason)
        if name in self._rows:
            self._controller.skip(name, coded.report.stored_nbytes)
        return coded

    def state(self) -> dict[str, Any]:
        return self._controller.state()

    def restore(self, state: dict[str, Any], done: list[str]) -> None:
        self._controller.restore(state, done)


def fall_back(name: str, weight: Tensor, config: CompressionConfig, reason: str) -> CodedLayer:
    """Rounds a layer without data at the target, its scales counted, and says why in its report."""
    scale_bits = min(16 / weight.shape[1], MOST_SCALE_BITS)
    quantized = round_data_free(weight, config.bits - scale_bits)
    quantized.fallback = f"{reason}: rounded without data"
    return code_layer(name, quantized, config, NAME)


register(
    Recipe(
        NAME,
        compress,
        calibrated=True,
        takes=frozenset({"target"}),
        default_bits={"packed": DEFAULT_PACKED_BITS},
        limits={codec: codec_named(codec).cost.limits for codec in CODECS},
        note="best",
    )
)
