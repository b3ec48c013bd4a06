"""Recipe ``int8``: rounding to nearest with absmax scales; of any recipe, what lies outside the blocks."""

from __future__ import annotations

from torch import Tensor

from dcext.calibrate.coded import CodedLayer, code_layer
from dcext.config import CompressionConfig
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.recipe import Recipe, register
from dcext.quantize.rounding import quantize_absmax

NAME = "int8"


def code_int8(name: str, weight: Tensor, granularity: str, config: CompressionConfig) -> CodedLayer:
    """Quantizes and encodes a matrix ``(N, K)``; ``granularity`` is ``"row"`` or ``"tensor"``.

    Raises:
        ValueError: NaN or infinity in the layer of that name.
    """
    try:
        quantized = QuantizedWeight(*quantize_absmax(weight, granularity))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return code_layer(name, quantized, config, NAME)


register(Recipe(NAME))
