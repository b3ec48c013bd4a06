"""Rate control: the one scale of all steps that makes a model as large as it should be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dcext.quantize.rate import predicted_entropy

FIRST_EXCESS_BITS = 0.04  # of stored size over the predicted entropy, before the first layer has told: coder, feedback
GRID_LOG2 = tuple(
    k / 4 for k in range(-28, 17)
)  # scales over a layer's rms at which its entropy is measured
MOST_EXCESS_BITS = 1.0  # of a layer, that is expected of the next ones
LEAST_BITS, MOST_BITS = 0.3, 7.5  # entropy-coded: targets beyond these are refused


@dataclass
class RateCurve:
    """A layer's bits over the scale.

    Attributes:
        log2_start: where the curve's own scale is 1; its points are ``log2`` of that.
        points: evenly spaced, ascending.
        bits: ``(points,)`` float64, bits per weight at each, not rising.
        weights: of the layer.
        overhead_bits: bits per weight that do not depend on the scale.
    """

    log2_start: float
    points: tuple[float, ...]
    bits: Tensor
    weights: int
    overhead_bits: float


class Forecast(Protocol):
    """What is known of a layer before it is rounded."""

    def curve(self) -> RateCurve:
        """Its bits over the scale."""
        ...


@dataclass
class LayerForecast:
    """What is known of an entropy-coded layer before it is rounded.

    Attributes:
        sample: some of its weights, in units of their steps at ``scale = 1``.
        weights: how many it has.
        overhead_bits: bits per weight that do not depend on the scale: scales, headers.
    """

    sample: Tensor
    weights: int
    overhead_bits: float

    def curve(self) -> RateCurve:
        """Its entropy, measured once at the points of ``GRID_LOG2``, which are relative to the sample's rms."""
        rms = float(self.sample.square().mean().sqrt()) or 1.0
        bits = [predicted_entropy(self.sample, rms * 2.0**k) for k in GRID_LOG2]
        # Below some scale int8 cannot hold the weights and entropy falls again; such scales are never wanted.
        falling = torch.tensor(bits, dtype=torch.float64).flip(0).cummax(0)[0].flip(0)
        return RateCurve(math.log2(rms), GRID_LOG2, falling, self.weights, self.overhead_bits)


class Excess:
    """What stored layers take beyond a forecast, in bits per weight, as the layers done tell it for those to come.

    It is bounded. A small layer takes several bits more for its header, and ten if its columns are nearly all kept in
    bfloat16: expected of all others too, that would leave them nothing, and whole layers would become zero.
    """

    def __init__(self, first: float = FIRST_EXCESS_BITS) -> None:
        """Args: first: expected before a layer has told."""
        self._first = first
        self.bits = 0.0
        self.weights = 0

    @property
    def expected(self) -> float:
        """Bits per weight."""
        mean = self.bits / self.weights if self.weights else self._first
        return min(mean, MOST_EXCESS_BITS)

    def record(self, bits: float, weights: int) -> None:
        """Adds a layer of so many weights that took so many bits more than was forecast."""
        self.bits += bits
        self.weights += weights


class RateController:
    """Chooses the scale for the layers still to come, from forecasts and from what the layers done turned out to take.

    The scale is that at which the remaining layers fill what the target leaves, so errors of the forecast are evened
    out while they are small, and all layers keep very nearly the same slope.
    """

    def __init__(
        self,
        forecasts: Mapping[str, Forecast],
        target_bits: float,
        limits: tuple[float, float] = (LEAST_BITS, MOST_BITS),
        first_excess_bits: float = FIRST_EXCESS_BITS,
    ) -> None:
        """Starts with no layer done.

        Args:
            forecasts: by layer.
            target_bits: stored bits per weight that all of them shall have together.
            limits: least and most that the codec can reach.
            first_excess_bits: of stored size over forecasts, before the first layer has told.

        Raises:
            ValueError: a target that the codec cannot reach.
        """
        least, most = limits
        if not least <= target_bits <= most:
            raise ValueError(
                f"target_bits: expected {least} to {most} bits per weight, got {target_bits:.3f}"
            )
        self._excess = Excess(first_excess_bits)
        self._curves = {name: forecast.curve() for name, forecast in forecasts.items()}
        self._budget = target_bits * sum(curve.weights for curve in self._curves.values())

    def scale(self) -> float:
        """The scale for the next layers."""
        curves = list(self._curves.values())
        starts = torch.tensor([curve.log2_start for curve in curves], dtype=torch.float64)
        bits = torch.stack([curve.bits for curve in curves])
        weights = torch.tensor([curve.weights for curve in curves], dtype=torch.float64)
        fixed = torch.tensor([curve.overhead_bits for curve in curves], dtype=torch.float64)
        points = curves[0].points
        budget = self._budget - float(((fixed + self._excess.expected) * weights).sum())
        low, high = float(starts.min()) + points[0], float(starts.max()) + points[-1]
        while high - low > 1e-4:
            middle = (low + high) / 2
            if float((_interpolate(points, bits, middle - starts) * weights).sum()) > budget:
                low = middle
            else:
                high = middle
        return 2.0**high

    def left_bits(self, names: Collection[str]) -> float | None:
        """Bits that some layers may take beside what does not depend on the scale, if they are the last; else None."""
        if not self._curves.keys() <= set(names):
            return None
        fixed = sum(curve.overhead_bits * curve.weights for curve in self._curves.values())
        return self._budget - fixed

    def record(self, name: str, scale: float, stored_nbytes: int) -> None:
        """Tells what a layer took in the end, rounded at ``scale``."""
        curve = self._curves.pop(name)
        self._budget -= 8 * stored_nbytes
        at = torch.tensor([math.log2(scale) - curve.log2_start], dtype=torch.float64)
        predicted = float(_interpolate(curve.points, curve.bits[None], at)) + curve.overhead_bits
        self._excess.record(8 * stored_nbytes - predicted * curve.weights, curve.weights)

    def skip(self, name: str, stored_nbytes: int) -> None:
        """Takes a layer out that was not rounded at any scale; its bytes still count."""
        self._curves.pop(name)
        self._budget -= 8 * stored_nbytes

    def state(self) -> dict[str, float]:
        """What ``restore`` needs."""
        return {
            "budget": self._budget,
            "weights_done": self._excess.weights,
            "excess_bits": self._excess.bits,
        }

    def restore(self, state: dict[str, float], done: list[str]) -> None:
        """Goes on from a ``state`` taken when the layers ``done`` had been recorded."""
        self._budget = state["budget"]
        self._excess.weights = int(state["weights_done"])
        self._excess.bits = state["excess_bits"]
        for name in done:
            self._curves.pop(name, None)


def _interpolate(points: tuple[float, ...], bits: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of each curve ``(layers, points)`` at its own ``log2`` of the scale over its start."""
    density = 1 / (points[1] - points[0])
    position = ((at - points[0]) * density).clamp(0, len(points) - 1.001)
    index = position.long()
    left = bits.gather(1, index[:, None])[:, 0]
    right = bits.gather(1, index[:, None] + 1)[:, 0]
    return left + (right - left) * (position - index)
