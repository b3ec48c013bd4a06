"""What a bit costs and buys in each codec: how recipe ``rate`` forecasts, plans and rounds for it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from dcext.quantize.control import (
    FIRST_EXCESS_BITS,
    LEAST_BITS,
    MOST_BITS,
    Forecast,
    LayerForecast,
)
from dcext.quantize.packed_rate import (
    CHUNK_BITS,
    LEAST_PACKED_BITS,
    MOST_PACKED_BITS,
    PackedForecast,
    PackedPlan,
    panel_rows,
    plan_packed,
    round_packed,
)
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.rate import Steps, WeightSample, plan_steps, round_to_steps

HEADER_BITS = 8 * 64
ENTROPY_CHUNK_BITS = 8 * 64  # of the only chunk that most layers have: table entry and padding


class CostModel(Protocol):
    """One codec, as recipe ``rate`` sees it. ``scale`` is the model's one number that sets its size.

    Attributes:
        limits: least and most stored bits per weight that may be asked for.
        first_excess_bits: what stored sizes are expected to have above forecasts.
    """

    limits: tuple[float, float]
    first_excess_bits: float

    def forecast(self, sample: WeightSample, row_scale: Tensor, scale_bits: float) -> Forecast:
        """Bits of a layer over the scale.

        Args:
            sample: some of its weights.
            row_scale: ``(N,)`` from ``output_moment.row_scales``.
            scale_bits: that its scales take, in all.
        """
        ...

    def plan(
        self, weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
    ) -> Any:
        """Steps of layers that read the same input, with ``col_scale``; arguments as of ``rate.plan_steps``."""
        ...

    def round(
        self, name: str, weight: Tensor, factor: Tensor, plan: Any, moment: Tensor
    ) -> QuantizedWeight:
        """Rounds a layer as planned; arguments as of ``rate.round_to_steps``."""
        ...


class EntropyCost:
    """Payloads whose integers take their entropy: zstd."""

    limits = (LEAST_BITS, MOST_BITS)
    first_excess_bits = FIRST_EXCESS_BITS

    def forecast(self, sample: WeightSample, row_scale: Tensor, scale_bits: float) -> LayerForecast:
        """As ``CostModel``."""
        weights = sample.shape[0] * sample.shape[1]
        overhead = (HEADER_BITS + ENTROPY_CHUNK_BITS + scale_bits) / weights
        return LayerForecast(sample.normalized(row_scale), weights, overhead)

    def plan(
        self, weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
    ) -> Steps:
        """As ``CostModel``."""
        return plan_steps(weights, factor, rows, scale)

    def round(
        self, name: str, weight: Tensor, factor: Tensor, plan: Steps, moment: Tensor
    ) -> QuantizedWeight:
        """As ``CostModel``."""
        return round_to_steps(name, weight, factor, plan, moment)


class PackedCost:
    """Packed payloads: a width for each panel, and exceptions."""

    limits = (LEAST_PACKED_BITS, MOST_PACKED_BITS)
    first_excess_bits = 0.0

    def forecast(
        self, sample: WeightSample, row_scale: Tensor, scale_bits: float
    ) -> PackedForecast:
        """As ``CostModel``."""
        rows, cols = sample.shape
        chunks = -(-rows // panel_rows(rows, cols))
        overhead = (HEADER_BITS + chunks * CHUNK_BITS + scale_bits) / (rows * cols)
        return PackedForecast(sample, row_scale, overhead)

    def plan(
        self, weights: dict[str, Tensor], factor: Tensor, rows: dict[str, Tensor], scale: float
    ) -> PackedPlan:
        """As ``CostModel``."""
        return plan_packed(weights, factor, rows, scale)

    def round(
        self, name: str, weight: Tensor, factor: Tensor, plan: PackedPlan, moment: Tensor
    ) -> QuantizedWeight:
        """As ``CostModel``."""
        return round_packed(name, weight, factor, plan, moment)


def cost_model(codec: str) -> CostModel:
    """That of a codec of ``CompressionConfig``."""
    return PackedCost() if codec == "packed" else EntropyCost()
