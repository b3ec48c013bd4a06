"""Rate control: the one scale of all steps that makes a model as large as it should be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dcext.quantize.rate import predicted_entropy

FIRST_EXCESS_BITS = 0.04  # of stored size over the predicted entropy, before the first layer has told: coder, feedback
SEARCH_STEPS = 60
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
        self._remaining = dict(forecasts)
        self._budget = target_bits * sum(f.weights for f in forecasts.values())
        self._weights_done = 0
        self._excess_bits = 0.0

    def scale(self) -> float:
        """The scale for the next layers."""
        low, high = 1e-12, 1e12
        for _ in range(SEARCH_STEPS):
            middle = (low * high) ** 0.5
            if self._forecast(middle) > self._budget:
                low = middle
            else:
                high = middle
            if high < low * 1.0005:
                break
        return high

    def record(self, name: str, scale: float, stored_nbytes: int) -> None:
        """Tells what a layer took in the end, rounded at ``scale``."""
        forecast = self._remaining.pop(name)
        self._budget -= 8 * stored_nbytes
        predicted = predicted_entropy(forecast.sample, scale) + forecast.overhead_bits
        self._excess_bits += 8 * stored_nbytes - predicted * forecast.weights
        self._weights_done += forecast.weights

    def skip(self, name: str, stored_nbytes: int) -> None:
        """Takes a layer out that was not rounded at any scale; its bytes still count."""
        self._remaining.pop(name)
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
            self._remaining.pop(name, None)

    def _forecast(self, scale: float) -> float:
        excess = self._excess_bits / self._weights_done if self._weights_done else FIRST_EXCESS_BITS
        return sum(
            (predicted_entropy(f.sample, scale) + f.overhead_bits + excess) * f.weights
            for f in self._remaining.values()
        )
