"""What a bit costs and buys in each codec: how recipe ``rate`` forecasts, plans and rounds for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    panel_rows,
    plan_packed,
    round_packed,
)
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.rate import WeightSample, plan_steps, round_to_steps

HEADER_BITS = 8 * 64
ENTROPY_CHUNK_BITS = 8 * 64  # of the only chunk that most layers have: table entry and padding


@dataclass(frozen=True)
class CostModel:
    """One codec, as recipe ``rate`` sees it.

    Attributes:
        limits: least and most stored bits per weight that may be asked for.
        first_excess_bits: what stored sizes are expected to have above forecasts.
        forecast: bits of a layer over the model's scale, from a sample of its weights, ``(N,)`` row scales from
            ``output_moment.row_scales`` and the bits that its scales take in all.
        plan: scales of layers that read the same input; arguments as of ``rate.plan_steps``.
        round: rounds one of them as planned; arguments as of ``rate.round_to_steps``.
    """

    limits: tuple[float, float]
    first_excess_bits: float
    forecast: Callable[[WeightSample, Tensor, float], Forecast]
    plan: Callable[[dict[str, Tensor], Tensor, dict[str, Tensor], float], Any]
    round: Callable[[str, Tensor, Tensor, Any, Tensor], QuantizedWeight]


def _forecast_entropy(sample: WeightSample, row_scale: Tensor, scale_bits: float) -> LayerForecast:
    weights = sample.shape[0] * sample.shape[1]
    overhead = (HEADER_BITS + ENTROPY_CHUNK_BITS + scale_bits) / weights
    return LayerForecast(sample.normalized(row_scale), weights, overhead)


def _forecast_packed(sample: WeightSample, row_scale: Tensor, scale_bits: float) -> PackedForecast:
    rows, cols = sample.shape
    chunks = -(-rows // panel_rows(rows, cols))
    overhead = (HEADER_BITS + chunks * CHUNK_BITS + scale_bits) / (rows * cols)
    return PackedForecast(sample, row_scale, overhead)


ENTROPY_COST = CostModel(
    (LEAST_BITS, MOST_BITS), FIRST_EXCESS_BITS, _forecast_entropy, plan_steps, round_to_steps
)
PACKED_COST = CostModel(
    (LEAST_PACKED_BITS, MOST_PACKED_BITS), 0.0, _forecast_packed, plan_packed, round_packed
)
