"""A large layer as recipe ``rate`` quantizes it for codec ``packed``."""

from __future__ import annotations

import torch
from torch import Tensor

from dcext.quantize.feedback import cholesky_factor
from dcext.quantize.packed_rate import PackedForecast, plan_packed, round_packed
from dcext.quantize.rate import sample_weights
from dcext.recipes.rate import DEFAULT_PACKED_BITS

SPREAD = 0.25  # standard deviation of the logarithm of rows' and columns' spread: real layers have 0.15 to 0.5
CORRELATED = 0.5  # share of the inputs' power in CORRELATED_RANK directions
CORRELATED_RANK = 256
ROW_BLOCK = 64  # of the outputs' second moment


def packed_rate_weights(rows: int, cols: int, bits: float = DEFAULT_PACKED_BITS) -> Tensor:
    """Integers ``(rows, cols)`` int8 of Gaussian weights with rows and columns of different spread, for correlated inputs.

    Args:
        rows: out_features.
        cols: in_features.
        bits: per weight, without scales; the forecast's, which sampling leaves a little uncertain.
    """
    generator = torch.Generator().manual_seed(0)

    def lognormal(size: int) -> Tensor:
        return (SPREAD * torch.randn(size, generator=generator)).exp()

    weight = torch.randn(rows, cols, generator=generator) * lognormal(rows)[:, None]
    weight *= lognormal(cols)
    directions = torch.randn(cols, CORRELATED_RANK, generator=generator, dtype=torch.float64)
    moment = directions @ directions.t() * (CORRELATED / CORRELATED_RANK)
    moment.diagonal().add_(1 - CORRELATED)
    factor = cholesky_factor(moment)
    output_moment = torch.eye(ROW_BLOCK).repeat(-(-rows // ROW_BLOCK), 1, 1)
    row_scale = torch.ones(rows)
    sample = sample_weights(weight, factor.diagonal().float(), seed=0)
    curve = PackedForecast(sample, row_scale, 0.0).curve()
    index = int((curve.bits - bits).abs().argmin())
    scale = 2.0 ** (curve.log2_start + curve.points[index])
    plan = plan_packed({"layer": weight}, factor, {"layer": row_scale}, scale)
    quantized = round_packed("layer", weight, factor, plan, output_moment)
    return quantized.qweight
