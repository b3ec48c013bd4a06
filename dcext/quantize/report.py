"""What compression did to each layer, for people and for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One compressed layer.

    Attributes:
        name: in the model.
        shape: ``(out_features, in_features)``.
        recipe: that made its integers.
        stored_nbytes: all bytes that it takes in a checkpoint, but for a bias; a shared ``col_scale`` counts once.
        entropy_bits: order-0 entropy of the integers, per weight.
        output_snr_db: power of the outputs over that of their error on the calibration text; None without one.
        zero_share: share of integers that are zero.
        pruned_share: share of weights that are zero and would not be, rounded to nearest at the same scales.
        outlier_columns: columns kept in bfloat16.
        expected_loss: half of the weighted output error, ``sum_n s_n e_n H e_n^T / 2``: by how much it raises the loss, in
            nats per token, to second order. Recipe ``rate`` makes it the same for all weights.
        waterfilling_bits: fewest bits per weight at this error for a Gaussian matrix; None where not computed.
        alpha: of recipe ``paper``.
        packed_width: of codec ``packed``: bits of a code, mean over the weights, 8 where stored raw.
        packed_exceptions: of codec ``packed``: share of weights that its tables do not hold.
        fallback: what was done where the recipe could not be followed, and why; None where it was.
    """

    name: str
    shape: tuple[int, int]
    recipe: str
    stored_nbytes: int
    entropy_bits: float
    output_snr_db: float | None = None
    zero_share: float = 0.0
    pruned_share: float = 0.0
    outlier_columns: int = 0
    expected_loss: float | None = None
    waterfilling_bits: float | None = None
    alpha: float | None = None
    packed_width: float | None = None
    packed_exceptions: float | None = None
    fallback: str | None = None

    @property
    def weights(self) -> int:
        """``out_features * in_features``."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """``8 * stored_nbytes / weights``."""
        return 8 * self.stored_nbytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``bits_per_weight``, JSON-ready."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


@dataclass
class CompressionReport:
    """All layers of a model, and what the recipe tried.

    Attributes:
        layers: in the order in which they were compressed.
        target_bits: stored bits per weight that recipes ``rate`` and ``data-free`` were to reach over their layers.
        alphas: recipe ``paper``: every alpha that was tried, with the model's bits and output error (dB).
    """

    layers: list[LayerReport] = field(default_factory=list)
    target_bits: float | None = None
    alphas: list[dict[str, float]] = field(default_factory=list)

    def bits_per_weight(self, recipe: str | None = None) -> float:
        """Stored bits per weight over all layers, or over those of one recipe; 0 where there are none."""
        chosen = [layer for layer in self.layers if recipe in (None, layer.recipe)]
        weights = sum(layer.weights for layer in chosen)
        return 8 * sum(layer.stored_nbytes for layer in chosen) / weights if weights else 0.0

    def mean(self, attribute: str) -> float | None:
        """Mean of an attribute over the weights of the layers that have it; None where no layer has."""
        pairs = [(getattr(layer, attribute), layer.weights) for layer in self.layers]
        known = [(value, weights) for value, weights in pairs if value is not None]
        total = sum(weights for _, weights in known)
        return sum(value * weights for value, weights in known) / total if total else None

    @property
    def waterfilling_gap_bits(self) -> float | None:
        """Stored bits above the water-filling reference, over the layers that have one."""
        known = [layer for layer in self.layers if layer.waterfilling_bits is not None]
        return _weighted((x.bits_per_weight - (x.waterfilling_bits or 0), x.weights) for x in known)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target_bits": self.target_bits,
            "waterfilling_gap_bits": self.waterfilling_gap_bits,
            "alphas": self.alphas,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> CompressionReport:
        """The inverse of ``to_dict``."""
        layers = []
        for row in value["layers"]:
            fields = {key: item for key, item in row.items() if key != "bits_per_weight"}
            layers.append(LayerReport(**{**fields, "shape": tuple(fields["shape"])}))
        return cls(layers, value["target_bits"], value["alphas"])


def _weighted(pairs: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(pairs)
    total = sum(weights for _, weights in pairs)
    return sum(value * weights for value, weights in pairs) / total if total else None
