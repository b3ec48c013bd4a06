"""What every recipe returns: integers, scales, outlier columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class QuantizedWeight:
    """A matrix ``diag(row_scale) @ qweight @ diag(col_scale)``, with some columns kept in bfloat16 beside it.

    Attributes:
        qweight: ``(N, K)`` int8 in [-127, 127]; zero in outlier columns.
        row_scale: ``(N,)`` float32.
        col_scale: ``(K,)`` float32, or None for ones. Layers that read the same input may share the tensor.
        outlier_index: ``(n,)`` int32, ascending, or None.
        outlier_weight: ``(N, n)`` bfloat16, or None.
        fallback: why the recipe could not be followed for this matrix, and what was done; None where it was.
    """

    qweight: Tensor
    row_scale: Tensor
    col_scale: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_weight: Tensor | None = None
    fallback: str | None = None

    def dequantize(self) -> Tensor:
        """The matrix that is stood for: ``(N, K)`` float32."""
        weight = self.qweight.float() * self.row_scale[:, None]
        if self.col_scale is not None:
            weight *= self.col_scale
        if self.outlier_index is not None and self.outlier_weight is not None:
            weight[:, self.outlier_index.long()] = self.outlier_weight.float()
        return weight


def to_bfloat16_values(vector: Tensor) -> Tensor:
    """The nearest values that bfloat16 holds, as float32: scales are chosen among them, so that they cost 16 bits."""
    return vector.to(torch.bfloat16).float()


def output_snr_db(weight: Tensor, approximation: Tensor, second_moment: Tensor) -> float:
    """Power of the outputs over the power of their error, ``E|W x|^2 / E|(W - W^) x|^2``, in dB.

    Args:
        weight: ``(N, K)``.
        approximation: ``(N, K)``.
        second_moment: ``(K, K)``, ``E[x x^T]``.
    """
    moment = second_moment.float()
    weight = weight.float()
    error = weight - approximation.float()
    signal = float(((weight @ moment) * weight).sum())
    noise = float(((error @ moment) * error).sum())
    if noise <= 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-30) / noise)


def entropy_of_counts(counts: Tensor) -> float:
    """Order-0 entropy in bits of a histogram."""
    counts = counts[counts > 0].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum())
