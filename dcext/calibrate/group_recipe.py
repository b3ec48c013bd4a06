"""What a calibrated recipe does with one group of layers that read the same input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from dcext.calibrate.coded import CodedLayer
from dcext.quantize.statistics import InputStatistics


class GroupRecipe(ABC):
    """Called by ``BlockRun`` for each group of layers, in the order in which the model runs them.

    Attributes:
        feeds_back: whether later layers are calibrated on the outputs of the compressed ones.
        groups: names of layers that read the same input, by the first of them; None where they are found while the model
            runs.
    """

    feeds_back = False
    groups: dict[str, list[str]] | None = None

    def statistics(self, in_features: int) -> InputStatistics:
        """What is to be learnt of a layer's inputs, of ``in_features`` columns; still empty."""
        return InputStatistics(in_features)

    def try_group(self, weights: dict[str, Tensor], statistics: InputStatistics) -> None:
        """Learns from a group in a trial pass, in which nothing is quantized; arguments as of ``quantize_group``."""
        raise NotImplementedError(f"{type(self).__name__}: expected no trial pass")

    @abstractmethod
    def quantize_group(
        self, weights: dict[str, Tensor], statistics: InputStatistics
    ) -> dict[str, CodedLayer]:
        """Quantizes and encodes layers that read the same input.

        Args:
            weights: by layer, ``(N, K)`` float32.
            statistics: of that input.
        """

    @abstractmethod
    def fall_back(self, name: str, weight: Tensor, reason: str) -> CodedLayer:
        """Rounds a layer, ``(N, K)`` float32, that calibration says nothing usable about, and reports why."""

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on where this recipe is now, JSON-ready."""
        return {}

    def restore(self, state: dict[str, Any], done: list[str]) -> None:
        """Goes on from a ``state`` taken when the layers ``done`` were coded."""
        assert not state, "a recipe that has a state restores it"
