"""Recipe ``paper``: scaling by activations, INT8 per tensor, pruning (arXiv:2502.15443)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from dcext.calibrate.coded import CodedLayer, code_layer, pruned_share, unusable
from dcext.calibrate.driver import Calibrated
from dcext.calibrate.group_recipe import GroupRecipe
from dcext.calibrate.job import Job
from dcext.config import CompressionConfig
from dcext.quantize.paper import ALPHAS, alpha_cost, alpha_trial, quantize_paper
from dcext.quantize.quantized import QuantizedWeight, output_snr_db
from dcext.quantize.recipe import Recipe, register
from dcext.quantize.rounding import quantize_absmax
from dcext.quantize.statistics import InputStatistics

NAME = "paper"


def compress(job: Job) -> list[dict[str, float]]:
    """Quantizes layers block by block, after a pass that tries alphas where the model has one for all."""
    recipe = PaperRecipe(job.config)
    with Calibrated.of(job) as model:
        later = model.later(InputStatistics)
        if job.config.alpha == "model":
            model.run(recipe, later, 0.5, trial=True)
            recipe.choose_alpha()
            model.run(recipe, later, 0.5)
        else:
            model.run(recipe, later, 1.0)
    return recipe.alphas()


class PaperRecipe(GroupRecipe):
    """Recipe ``paper``: calibrated on the float model; every layer on its own, or one alpha for the model."""

    def __init__(self, config: CompressionConfig) -> None:
        self._config = config
        self.trials: dict[str, list[dict[str, float]]] = {}
        self._alpha = None if isinstance(config.alpha, str) else float(config.alpha)

    def try_group(self, weights: dict[str, Tensor], statistics: InputStatistics) -> None:
        """Measures every alpha on layers that read the same input, without quantizing them."""
        if unusable(statistics) is not None:
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
        reason = unusable(statistics)
        if reason is not None:
            return {name: self.fall_back(name, weight, reason) for name, weight in weights.items()}
        if self._alpha is None:
            self.try_group(weights, statistics)
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
            layer = code_layer(name, quantized, self._config, NAME, owns_col_scale=owns)
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
        return code_layer(name, quantized, self._config, NAME)

    def state(self) -> dict[str, Any]:
        return {"trials": self.trials}

    def restore(self, state: dict[str, Any], done: list[str]) -> None:
        self.trials = state["trials"]


register(
    Recipe(
        NAME,
        compress,
        calibrated=True,
        takes=frozenset({"pruning"}),
        granularity="tensor",
        folds_col_scales=True,
    )
)
