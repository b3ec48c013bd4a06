"""From float weights to the integers that are coded."""

from dcext.quantize.rounding import quantize_absmax

__all__ = ["quantize_absmax"]
