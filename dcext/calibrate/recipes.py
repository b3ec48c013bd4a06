"""The recipes that calibrate, as what happens to one group of layers that read the same input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dcext.calibrate.sensitivity import Sensitivity
from dcext.codec import decode, encode, entropy, payload_info
from dcext.config import CompressionConfig
from dcext.nn.compressed import storage_form
from dcext.quantize.control import RateController
from dcext.quantize.cost import cost_model
from dcext.quantize.data_free import round_data_free
from dcext.quantize.feedback import cholesky_factor
from dcext.quantize.output_moment import row_energies, row_factor, row_scales, weighted_error
from dcext.quantize.paper import ALPHAS, alpha_cost, alpha_trial, quantize_paper
from dcext.quantize.quantized import QuantizedWeight, output_snr_db
from dcext.quantize.rate import (
    MOST_POWER,
    restore_order,
    rounding_order,
    waterfilling_bits,
)
from dcext.quantize.report import LayerReport
from dcext.quantize.rounding import quantize_absmax
from dcext.quantize.statistics import InputStatistics
from dcext.weights.origin import to_weight_memory

UNREACHED = "no calibration token reached the layer"
# A fallback is rounded with fewer bits by what its scales take, but by no more than this many per weight: matrices of
# few columns are small and easily ruined.
MOST_SCALE_BITS = 0.5


@dataclass
class CodedLayer:
    """A layer's quantized weight and the payload that codes it. Read back from a folder, it has no integers."""

    payload: Tensor
    quantized: QuantizedWeight
    report: LayerReport

    def dequantize(self) -> Tensor:
        """The approximation of the weight, ``(N, K)`` float32."""
        if self.quantized.qweight.numel():
            return self.quantized.dequantize()
        return replace(self.quantized, qweight=decode(self.payload)).dequantize()


def code_layer(
    name: str,
    quantized: QuantizedWeight,
    config: CompressionConfig,
    recipe: str,
    *,
    owns_col_scale: bool = True,
) -> CodedLayer:
    """Encodes a quantized matrix and describes the result; error figures are left to the caller."""
    payload = to_weight_memory(encode(quantized.qweight, config.codec, config.level))
    stored = payload.nbytes + storage_form(quantized.row_scale).nbytes
    if quantized.col_scale is not None and owns_col_scale:
        stored += storage_form(quantized.col_scale).nbytes
    outliers = 0
    if quantized.outlier_index is not None and quantized.outlier_weight is not None:
        outliers = quantized.outlier_index.numel()
        stored += quantized.outlier_index.nbytes + quantized.outlier_weight.nbytes
    rows, cols = quantized.qweight.shape
    report = LayerReport(
        name,
        (rows, cols),
        recipe,
        stored,
        entropy(quantized.qweight),
        zero_share=float((quantized.qweight == 0).float().mean()),
        outlier_columns=outliers,
        fallback=quantized.fallback,
    )
    if config.codec == "packed":
        report.packed_width, report.packed_exceptions = packed_figures(payload)
    return CodedLayer(payload, quantized, report)


def packed_figures(payload: Tensor) -> tuple[float, float]:
    """Bits of a code (8 in raw chunks), mean over the weights, and the share of weights that are exceptions."""
    chunks = payload_info(payload)["chunks"]
    weights = [rows * cols for rows, cols in (chunk["shape"] for chunk in chunks)]
    bits = [(chunk["width"] or 8) * n for chunk, n in zip(chunks, weights, strict=True)]
    exceptions = sum(chunk["exceptions"] for chunk in chunks)
    return sum(bits) / sum(weights), exceptions / sum(weights)


def pruned_share(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Share of the weights that are zero though they are at least half a step from it."""
    steps = quantized.row_scale[:, None]
    if quantized.col_scale is not None:
        steps = steps * quantized.col_scale
    pruned = (quantized.qweight == 0) & (weight.abs() > 0.5 * steps)
    if quantized.outlier_index is not None:
        pruned[:, quantized.outlier_index.long()] = False
    return float(pruned.float().mean())


def rate_statistics(in_features: int) -> InputStatistics:
    """What recipe ``rate`` learns of a layer's inputs."""
    return InputStatistics(in_features, with_values=False, most_power=MOST_POWER)


class RateRecipe:
    """Recipe ``rate``: equal slope over all layers, column steps from the inputs, error feedback."""

    name = "rate"
    feeds_back = True  # later layers are calibrated on the outputs of the compressed ones

    def __init__(self, config: CompressionConfig, sensitivity: Sensitivity) -> None:
        """Makes the forecasts for ``config.target_bits``."""
        self._config = config
        self._cost = cost_model(config.codec)
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
        """What is to be learnt of a layer's inputs."""
        return rate_statistics(in_features)

    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics
    ) -> dict[str, CodedLayer]:
        """Quantizes and encodes layers that read the same input.

        Args:
            weights: by layer, ``(N, K)`` float32.
            statistics: of that input.
        """
        reason = _unusable(statistics)
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
            layer = code_layer(name, quantized, self._config, self.name, owns_col_scale=i == 0)
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
        """Rounds a layer that calibration says nothing usable about."""
        coded = fall_back(name, weight, self._config, reason)
        if name in self._rows:
            self._controller.skip(name, coded.report.stored_nbytes)
        return coded

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on where this recipe is now."""
        return self._controller.state()

    def restore(self, state: dict[str, Any], done: list[str]) -> None:
        """Goes on from a ``state`` taken when the layers ``done`` were coded."""
        self._controller.restore(state, done)


class PaperRecipe:
    """Recipe ``paper``: calibrated on the float model; every layer on its own, or one alpha for the model."""

    name = "paper"
    feeds_back = False
    groups: dict[str, list[str]] | None = None  # found while the model runs

    def __init__(self, config: CompressionConfig) -> None:
        self._config = config
        self.trials: dict[str, list[dict[str, float]]] = {}
        self._alpha = None if isinstance(config.alpha, str) else float(config.alpha)

    def statistics(self, in_features: int) -> InputStatistics:
        """What is to be learnt of a layer's inputs."""
        return InputStatistics(in_features)

    def try_alphas(self, weights: dict[str, Tensor], statistics: InputStatistics) -> None:
        """Measures every alpha on layers that read the same input, without quantizing them."""
        if _unusable(statistics) is not None:
            return
        moment = statistics.second_moment
        for name, weight in weights.items():
            self.trials[name] = [
                dict(zip(("alpha", "bits", "error"), (alpha, *trial), strict=True))
                | {"weights": weight.numel()}
                for alpha in ALPHAS
                for trial in [
                    alpha_trial(
                        weight,
                        statistics.absmax,
                        moment,
                        alpha,
                        self._config.sparsity,
                        self._config.granularity,
                    )
                ]
            ]

    def choose_alpha(self) -> None:
        """Fixes the model's alpha from the trials of all its layers."""
        table = self.alphas()
        if not table:  # no layer had usable inputs: all of them fall back
            return
        self._alpha = min(table, key=lambda row: row["cost"])["alpha"]

    def alphas(self) -> list[dict[str, float]]:
        """For every alpha: bits, error (dB, mean) and cost over the layers tried."""
        rows = []
        for i, alpha in enumerate(ALPHAS):
            trials = [trial[i] for trial in self.trials.values()]
            total = sum(trial["weights"] for trial in trials)
            if total == 0:
                return []
            bits = sum(t["bits"] * t["weights"] for t in trials) / total
            log_error = (
                sum(math.log2(max(t["error"], 1e-30)) * t["weights"] for t in trials) / total
            )
            rows.append(
                {
                    "alpha": alpha,
                    "entropy_bits": bits,
                    "output_snr_db": -10 * math.log10(2) * log_error,
                    "cost": alpha_cost(bits, 2**log_error),
                }
            )
        return rows

    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics
    ) -> dict[str, CodedLayer]:
        """As ``RateRecipe.quantize_group``."""
        reason = _unusable(statistics)
        if reason is not None:
            return {name: self.fall_back(name, weight, reason) for name, weight in weights.items()}
        if self._alpha is None:
            self.try_alphas(weights, statistics)
        coded = {}
        shared: dict[float, Tensor | None] = {}
        for name, weight in weights.items():
            alpha = self._alpha if self._alpha is not None else self._best_alpha(name)
            quantized = quantize_paper(
                weight,
                statistics.absmax,
                alpha,
                self._config.sparsity,
                self._config.granularity,
            )
            owns = alpha not in shared
            quantized.col_scale = shared.setdefault(alpha, quantized.col_scale)
            layer = code_layer(name, quantized, self._config, self.name, owns_col_scale=owns)
            layer.report.alpha = alpha
            layer.report.pruned_share = pruned_share(weight, quantized)
            layer.report.output_snr_db = output_snr_db(
                weight, quantized.dequantize(), statistics.second_moment
            )
            coded[name] = layer
        return coded

    def _best_alpha(self, name: str) -> float:
        best = min(self.trials[name], key=lambda trial: alpha_cost(trial["bits"], trial["error"]))
        return best["alpha"]

    def fall_back(self, name: str, weight: Tensor, reason: str) -> CodedLayer:
        """Rounds a layer that calibration says nothing usable about: INT8 per tensor, alpha 0, not pruned."""
        qweight, row_scale = quantize_absmax(weight, "tensor")
        reason = f"{reason}: INT8 per tensor, not scaled or pruned"
        quantized = QuantizedWeight(qweight, row_scale, fallback=reason)
        return code_layer(name, quantized, self._config, self.name)

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on where this recipe is now."""
        return {"trials": self.trials}

    def restore(self, state: dict[str, Any], done: list[str]) -> None:
        """Goes on from a ``state``."""
        self.trials = state["trials"]


def fall_back(name: str, weight: Tensor, config: CompressionConfig, reason: str) -> CodedLayer:
    """Rounds a layer without data at the target, its scales counted, and says why in its report."""
    scale_bits = min(16 / weight.shape[1], MOST_SCALE_BITS)
    quantized = round_data_free(weight, config.bits - scale_bits)
    quantized.fallback = f"{reason}: rounded without data"
    return code_layer(name, quantized, config, "rate")


def _unusable(statistics: InputStatistics) -> str | None:
    """Why a layer's statistics cannot be calibrated on; None where they can."""
    if statistics.tokens == 0:
        return UNREACHED
    if not statistics.finite:
        return "NaN or infinity in the layer's inputs"
    if statistics.zero:
        return "all inputs of the layer are zero"
    return None
