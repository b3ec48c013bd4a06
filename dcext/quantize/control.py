"""Rate control: the one scale of all steps that makes a model as large as it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcext.quantize.rate import predicted_entropy

FIRST_EXCESS_BITS = 0.04  # of stored size over the predicted entropy, before the first layer has told: coder, feedback
GRID_LOG2 = tuple(
    k / 4 for k in range(-28, 17)
)  # scales over a layer's rms at which its entropy is measured
LEAST_BITS, MOST_BITS = 0.3, 7.5  # targets beyond these are refused


@dataclass
class LayerForecast:
    """What is known of a layer before it is rounded.

    Attributes:
        sample: some of its weights, in units of their steps at ``scale = 1``.
        weights: how many it has.
        overhead_bits: bits per weight that do not depend on the scale: scales, headers.
    """

    sample: Tensor
    weights: int
    overhead_bits: float


class RateController:
    """Chooses the scale for the layers still to come, from forecasts and from what the layers done turned out to take.

    The scale is that at which the remaining layers fill what the target leaves, so errors of the forecast are evened
    out while they are small, and all layers keep very nearly the same slope.
    """

    def __init__(self, forecasts: dict[str, LayerForecast], target_bits: float) -> None:
        """Takes forecasts by layer, and the stored bits per weight that all of them shall have together.

        Raises:
            ValueError: a target that int8 levels cannot reach.
        """
        if not LEAST_BITS <= target_bits <= MOST_BITS:
            raise ValueError(
                f"target_bits: expected {LEAST_BITS} to {MOST_BITS} bits per weight, got {target_bits:.3f}"
            )
        self._curves = {name: _EntropyCurve(f) for name, f in forecasts.items()}
        self._budget = target_bits * sum(f.weights for f in forecasts.values())
        self._weights_done = 0
        self._excess_bits = 0.0

    def scale(self) -> float:
        """The scale for the next layers."""
        curves = list(self._curves.values())
        starts = torch.tensor([curve.log2_rms for curve in curves], dtype=torch.float64)
        bits = torch.stack([curve.bits for curve in curves])
        weights = torch.tensor([curve.weights for curve in curves], dtype=torch.float64)
        fixed = torch.tensor([curve.overhead_bits for curve in curves], dtype=torch.float64)
        excess = self._excess_bits / self._weights_done if self._weights_done else FIRST_EXCESS_BITS
        budget = self._budget - float(((fixed + excess) * weights).sum())
        low, high = float(starts.min()) + GRID_LOG2[0], float(starts.max()) + GRID_LOG2[-1]
        while high - low > 1e-4:
            middle = (low + high) / 2
            if float((_interpolate(bits, middle - starts) * weights).sum()) > budget:
                low = middle
            else:
                high = middle
        return 2.0**high

    def record(self, name: str, scale: float, stored_nbytes: int) -> None:
        """Tells what a layer took in the end, rounded at ``scale``."""
        curve = self._curves.pop(name)
        self._budget -= 8 * stored_nbytes
        at = torch.tensor([math.log2(scale) - curve.log2_rms], dtype=torch.float64)
        predicted = float(_interpolate(curve.bits[None], at)) + curve.overhead_bits
        self._excess_bits += 8 * stored_nbytes - predicted * curve.weights
        self._weights_done += curve.weights

    def skip(self, name: str, stored_nbytes: int) -> None:
        """Takes a layer out that was not rounded at any scale; its bytes still count."""
        self._curves.pop(name)
        self._budget -= 8 * stored_nbytes

    def state(self) -> dict[str, float]:
        """What ``restore`` needs."""
        return {
            "budget": self._budget,
            "weights_done": self._weights_done,
            "excess_bits": self._excess_bits,
        }

    def restore(self, state: dict[str, float], done: list[str]) -> None:
        """Goes on from a ``state`` taken when the layers ``done`` had been recorded."""
        self._budget = state["budget"]
        self._weights_done = int(state["weights_done"])
        self._excess_bits = state["excess_bits"]
        for name in done:
            self._curves.pop(name, None)


class _EntropyCurve:
    """A layer's entropy over the scale, measured once at the points of ``GRID_LOG2``."""

    def __init__(self, forecast: LayerForecast) -> None:
        rms = float(forecast.sample.square().mean().sqrt()) or 1.0
        self.log2_rms = math.log2(rms)
        self.weights = forecast.weights
        self.overhead_bits = forecast.overhead_bits
        bits = [predicted_entropy(forecast.sample, rms * 2.0**k) for k in GRID_LOG2]
        # Below some scale int8 cannot hold the weights and entropy falls again; such scales are never wanted.
        self.bits = torch.tensor(bits, dtype=torch.float64).flip(0).cummax(0)[0].flip(0)


def _interpolate(bits: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of each curve ``(layers, points)`` at its own ``log2(scale / rms)``."""
    position = ((at - GRID_LOG2[0]) * 4).clamp(0, len(GRID_LOG2) - 1.001)
    index = position.long()
    left = bits.gather(1, index[:, None])[:, 0]
    right = bits.gather(1, index[:, None] + 1)[:, 0]
    return left + (right - left) * (position - index)
