"""From float weights to the integers that are coded: pure functions of tensors."""

from dcext.quantize.control import RateController
from dcext.quantize.data_free import round_data_free
from dcext.quantize.feedback import cholesky_factor, round_with_feedback
from dcext.quantize.paper import importance_scale, prune, quantize_paper, quantize_scaled
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.rate import plan_steps, round_to_steps, waterfilling_bits
from dcext.quantize.report import CompressionReport, LayerReport
from dcext.quantize.rounding import quantize_absmax
from dcext.quantize.statistics import InputStatistics

__all__ = [
    "CompressionReport",
    "InputStatistics",
    "LayerReport",
    "QuantizedWeight",
    "RateController",
    "cholesky_factor",
    "importance_scale",
    "plan_steps",
    "prune",
    "quantize_absmax",
    "quantize_paper",
    "quantize_scaled",
    "round_data_free",
    "round_to_steps",
    "round_with_feedback",
    "waterfilling_bits",
]
