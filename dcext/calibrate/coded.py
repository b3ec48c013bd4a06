"""Layers as recipes leave them: integers, payload and report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dcext.codec import decode, encode, entropy, payload_info
from dcext.codecs import codec_named
from dcext.config import CompressionConfig
from dcext.nn.compressed import storage_form
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.report import LayerReport
from dcext.quantize.statistics import InputStatistics
from dcext.weights.origin import to_weight_memory

UNREACHED = "no calibration token reached the layer"


@dataclass
class CodedLayer:
    """A layer's quantized weight and the payload that codes it. Read back from a folder, it has no integers."""

    payload: Tensor
    quantized: QuantizedWeight
    report: LayerReport

    def dequantize(self) -> Tensor:
        """The approximation of the weight, ``(N, K)`` float32."""
        if self.quantized.qweight.numel():
            return self.quantized.dequantize()
        return replace(self.quantized, qweight=decode(self.payload)).dequantize()


def code_layer(
    name: str,
    quantized: QuantizedWeight,
    config: CompressionConfig,
    recipe: str,
    *,
    owns_col_scale: bool = True,
) -> CodedLayer:
    """Encodes a quantized matrix and describes the result; error figures are left to the caller."""
    payload = to_weight_memory(encode(quantized.qweight, config.codec, config.level))
    stored = payload.nbytes + storage_form(quantized.row_scale).nbytes
    if quantized.col_scale is not None and owns_col_scale:
        stored += storage_form(quantized.col_scale).nbytes
    outliers = 0
    if quantized.outlier_index is not None and quantized.outlier_weight is not None:
        outliers = quantized.outlier_index.numel()
        stored += quantized.outlier_index.nbytes + quantized.outlier_weight.nbytes
    rows, cols = quantized.qweight.shape
    report = LayerReport(
        name,
        (rows, cols),
        recipe,
        stored,
        entropy(quantized.qweight),
        zero_share=float((quantized.qweight == 0).float().mean()),
        outlier_columns=outliers,
        fallback=quantized.fallback,
    )
    if codec_named(config.codec).exception_every:
        report.packed_width, report.packed_exceptions = packed_figures(payload)
    return CodedLayer(payload, quantized, report)


def packed_figures(payload: Tensor) -> tuple[float, float]:
    """Bits of a code (8 in raw chunks), mean over the weights, and the share of weights that are exceptions."""
    chunks = payload_info(payload)["chunks"]
    weights = [rows * cols for rows, cols in (chunk["shape"] for chunk in chunks)]
    bits = [(chunk["width"] or 8) * n for chunk, n in zip(chunks, weights, strict=True)]
    exceptions = sum(chunk["exceptions"] for chunk in chunks)
    return sum(bits) / sum(weights), exceptions / sum(weights)


def pruned_share(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Share of the weights that are zero though they are at least half a step from it."""
    steps = quantized.row_scale[:, None]
    if quantized.col_scale is not None:
        steps = steps * quantized.col_scale
    pruned = (quantized.qweight == 0) & (weight.abs() > 0.5 * steps)
    if quantized.outlier_index is not None:
        pruned[:, quantized.outlier_index.long()] = False
    return float(pruned.float().mean())


def unusable(statistics: InputStatistics) -> str | None:
    """Why a layer's statistics cannot be calibrated on; None where they can."""
    if statistics.tokens == 0:
        return UNREACHED
    if not statistics.finite:
        return "NaN or infinity in the layer's inputs"
    if statistics.zero:
        return "all inputs of the layer are zero"
    return None
