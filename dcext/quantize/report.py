"""What compression did to each layer, for people and for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

EXCLUDED = "excluded by the caller"
VECTOR = "vectors: norms, biases, scales"


@dataclass(frozen=True)
class LeftFloat:
    """A parameter that was not compressed.

    Attributes:
        name: in the model.
        weights: number of its elements.
        nbytes: bytes of them.
        reason: why it was not.
    """

    name: str
    weights: int
    nbytes: int
    reason: str


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
        left: parameters that stay float, each with the reason.
        config: the settings, as ``CompressionConfig.to_dict`` gives them.
    """

    layers: list[LayerReport] = field(default_factory=list)
    target_bits: float | None = None
    alphas: list[dict[str, float]] = field(default_factory=list)
    left: list[LeftFloat] = field(default_factory=list)
    config: dict[str, Any] | None = None

    @property
    def compressed_weights(self) -> int:
        """Weights that are compressed; those that several modules share count once."""
        return sum(layer.weights for layer in self.layers)

    @property
    def total_weights(self) -> int:
        """All weights of the model, biases of compressed layers left out."""
        return self.compressed_weights + sum(left.weights for left in self.left)

    @property
    def coverage(self) -> float:
        """Compressed weights over all; 1 for a model without weights."""
        return self.compressed_weights / self.total_weights if self.total_weights else 1.0

    @property
    def matrix_coverage(self) -> float:
        """The same without vectors, and without what the caller excluded."""
        meant = sum(left.weights for left in self.left if left.reason not in (VECTOR, EXCLUDED))
        total = self.compressed_weights + meant
        return self.compressed_weights / total if total else 1.0

    def left_by_reason(self) -> dict[str, int]:
        """Weights that stay float, by the reason, most first."""
        totals: dict[str, int] = {}
        for left in self.left:
            totals[left.reason] = totals.get(left.reason, 0) + left.weights
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def describe_coverage(self) -> str:
        """One line for people: how much is compressed, and by reason what is not."""
        text = (
            f"{self.compressed_weights:,} of {self.total_weights:,} weights compressed "
            f"({100 * self.coverage:.1f} %)"
        )
        parts = [f"{weights:,} {reason}" for reason, weights in self.left_by_reason().items()]
        return text + (f"; float: {'; '.join(parts)}" if parts else "")

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per weight of the whole model, what stays float included; 0 for a model without weights."""
        nbytes = sum(layer.stored_nbytes for layer in self.layers)
        nbytes += sum(left.nbytes for left in self.left)
        return 8 * nbytes / self.total_weights if self.total_weights else 0.0

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
            "config": self.config,
            "target_bits": self.target_bits,
            "waterfilling_gap_bits": self.waterfilling_gap_bits,
            "alphas": self.alphas,
            "compressed_weights": self.compressed_weights,
            "total_weights": self.total_weights,
            "model_bits_per_weight": self.model_bits_per_weight,
            "left": [asdict(left) for left in self.left],
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> CompressionReport:
        """The inverse of ``to_dict``."""
        layers = []
        for row in value["layers"]:
            fields = {key: item for key, item in row.items() if key != "bits_per_weight"}
            layers.append(LayerReport(**{**fields, "shape": tuple(fields["shape"])}))
        left = [LeftFloat(**row) for row in value.get("left", [])]
        return cls(layers, value["target_bits"], value["alphas"], left, value.get("config"))


def _weighted(pairs: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(pairs)
    total = sum(weights for _, weights in pairs)
    return sum(value * weights for value, weights in pairs) / total if total else None
