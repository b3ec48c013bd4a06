"""A linear layer whose INT8 weights are stored compressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcext import ops  # noqa: F401  (registers linear)
from dcext.checks import check_type
from dcext.codec import encode
from dcext.config import ACTIVATIONS
from dcext.nn.compressed import CompressedModule
from dcext.quantize import quantize_absmax
from dcext.weights.host_stream import StreamedWeight
from dcext.weights.indexed import IndexedWeight
from dcext.weights.packed import PackedWeight

_linear = torch.ops.dcext.linear.default
_linear_streamed = torch.ops.dcext.linear_streamed.default


def _plus_outliers(y: Tensor, x: Tensor, index: Tensor | None, weight: Tensor | None) -> Tensor:
    if index is None or weight is None:
        return y
    columns = x.index_select(-1, index).float()
    return y + (columns @ weight.float().t()).to(y.dtype)


class CompressedLinear(CompressedModule):
    """A frozen product with a matrix: ``y = row_scale * (qweight @ (x * col_scale)) + bias``.

    A few columns whose weights do not fit in int8 may be kept in bfloat16 beside the payload, which has zeros there;
    their products, ``outlier_weight @ x[outlier_index]``, are float32 sums added to the output.

    With ``activations="int8"`` each token is quantized to int8 first (W8A8; int32 sums, exact); with ``"none"`` it is
    not (W8A16; float32 sums in a fixed order). Outputs are the same bits for every codec, number of threads and
    instruction set. Panels of weights are decoded into the L2 cache and multiplied there, packed ones straight from
    their codes (W8A8), so memory carries the stored bytes only.

    On a GPU (``.to("cuda")``) frames are decoded by the GPU and multiplied by Triton kernels, packed weights inside the
    product; W8A8 sums are the CPU's, outputs differ from its by the rounding of outlier columns.

    What linear layers of torch (``DCLinear``) and of transformers (``DCConv1D``) have in common.
    """

    bias: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        payload: Tensor,
        row_scale: Tensor,
        col_scale: Tensor | None = None,
        bias: Tensor | None = None,
        activations: str = "int8",
        dtype: torch.dtype = torch.float32,
        outliers: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Takes over an encoded ``qweight``.

        Args:
            payload: 1-D uint8 from ``dcext.encode``. Not copied.
            row_scale: ``(out_features,)``, or ``(1,)`` for all rows.
            col_scale: ``(in_features,)`` or None.
            bias: ``(out_features,)`` or None.
            activations: ``"int8"`` or ``"none"``.
            dtype: of the float layer that this one stands for.
            outliers: ascending column indices ``(n,)`` int32 and their weights ``(out_features, n)`` bfloat16, or None.

        Raises:
            FormatError: the payload's header or chunk table is corrupt.
        """
        super().__init__(payload, row_scale, col_scale, dtype)
        self._take_others(bias, activations, outliers)

    def _take_others(
        self, bias: Tensor | None, activations: str, outliers: tuple[Tensor, Tensor] | None
    ) -> None:
        """What comes beside the matrix, as for ``__init__``."""
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"DCLinear: activations: expected one of {ACTIVATIONS}, got {activations!r}"
            )
        self.activations = activations
        self._parameters.pop("bias", None)
        bias = None if bias is None else self._checked("bias", bias, self.shape[0])
        self.register_buffer("bias", bias)
        index, weight = (None, None) if outliers is None else self._checked_outliers(*outliers)
        self.register_buffer("outlier_index", index)
        self.register_buffer("outlier_weight", weight)
        self._mark_loaded()

    def _checked_outliers(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        expected = (self.shape[0], index.numel())
        if index.dim() != 1 or index.dtype != torch.int32 or index.numel() == 0:
            raise ValueError(
                f"DCLinear: outlier_index: expected 1-D int32, not empty, got {tuple(index.shape)} {index.dtype}"
            )
        if weight.shape != expected or weight.dtype != torch.bfloat16:
            raise ValueError(
                f"DCLinear: outlier_weight: expected {expected} bfloat16, got {tuple(weight.shape)} {weight.dtype}"
            )
        if index[0] < 0 or index[-1] >= self.shape[1] or bool((index[1:] <= index[:-1]).any()):
            raise ValueError(
                f"DCLinear: outlier_index: expected ascending columns in [0, {self.shape[1]}), got others"
            )
        return index.contiguous(), weight.detach().contiguous()

    @property
    def in_features(self) -> int:
        """Columns of ``qweight``."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of ``qweight``."""
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: ``(..., in_features)`` float32, bfloat16 or float16 where the layer is; on a GPU with
                ``activations="none"`` not float32.

        Returns:
            ``(..., out_features)``, dtype of ``x``. A token with NaN or infinity gives NaN (W8A8).
        """
        # Looking buffers up as attributes takes as long as a small layer's product.
        return self._product(x, self._buffers["bias"])

    def scale_(self, factor: float) -> None:
        """As every compressed module's, outlier columns included."""
        super().scale_(factor)
        if self.outlier_weight is not None:
            self.outlier_weight.mul_(factor)

    def multiply(self, x: Tensor) -> Tensor:
        """``forward`` without the bias."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.backing
        if weight is not None:
            return self._product_with(x, bias, weight)
        own = self._buffers
        y = _linear(x, own["payload"], own["row_scale"], own["col_scale"], bias, self.activations)
        return _plus_outliers(y, x, own["outlier_index"], own["outlier_weight"])

    def _product_with(
        self, x: Tensor, bias: Tensor | None, weight: IndexedWeight | PackedWeight | StreamedWeight
    ) -> Tensor:
        scales = (self.row_scale, self.col_scale, bias)
        index, columns = self.outlier_index, self.outlier_weight
        if isinstance(weight, StreamedWeight):
            y = _linear_streamed(x, weight.handle, weight.unit, *scales, self.activations)
            return _plus_outliers(y, x, index, columns)
        block = self.prefetched_by
        if block is not None and self.decoded is None and not block.in_use:
            raise RuntimeError(
                "DCLinear: expected a call of its decoder block, which brings the weights to the device (dcext.offload), "
                "got a call of the layer alone"
            )
        from dcext.kernels.int8_gemm import int8_linear  # imports triton
        from dcext.kernels.packed import packed_linear

        if not isinstance(weight, IndexedWeight):
            y = packed_linear(x, weight, *scales, self.activations)
            return _plus_outliers(y, x, index, columns)
        qweight = weight.qweight() if self.decoded is None else self.decoded
        outliers = None if index is None or columns is None else (index, columns)
        return int8_linear(x, qweight, *scales, outliers, self.activations)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of payload, scales and outlier columns, as a checkpoint stores them."""
        outliers = (self.outlier_index, self.outlier_weight)
        return super().stored_nbytes + sum(t.nbytes for t in outliers if t is not None)

    def dequantize(self) -> Tensor:
        """The weights that the module stands for: ``(out_features, in_features)`` in ``self.dtype``."""
        weight = super().dequantize()
        if self.outlier_index is not None and self.outlier_weight is not None:
            weight[:, self.outlier_index.long()] = self.outlier_weight.to(weight.dtype)
        return weight

    def extra_repr(self) -> str:
        """As ``nn.Linear``'s, then how the weights are stored."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, activations={self.activations}, {super().extra_repr()}"


class DCLinear(CompressedLinear, nn.Linear):  # type: ignore[override, misc]
    """A frozen ``nn.Linear`` whose weights are compressed; see ``CompressedLinear``.

    Make one with ``from_float`` or ``from_qweight``.
    """

    @classmethod
    def from_qweight(
        cls,
        qweight: Tensor,
        row_scale: Tensor,
        col_scale: Tensor | None = None,
        bias: Tensor | None = None,
        codec: str = "auto",
        activations: str = "int8",
        *,
        level: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DCLinear:
        """Encodes quantized weights.

        Args:
            qweight: ``(out_features, in_features)`` int8.
            row_scale: ``(out_features,)``, one per output feature.
            col_scale: ``(in_features,)``, multiplies the activations before they are quantized; None for ones.
            bias: ``(out_features,)`` or None.
            codec: as for ``dcext.encode``.
            activations: ``"int8"`` or ``"none"``.
            level: as for ``dcext.encode``.
            dtype: of the float layer that this one stands for.

        Raises:
            TypeError, ValueError: a shape, dtype or name is not as above.
        """
        return cls(encode(qweight, codec, level), row_scale, col_scale, bias, activations, dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        granularity: str = "row",
        codec: str = "auto",
        level: int | None = None,
        activations: str = "int8",
    ) -> DCLinear:
        """Quantizes an ``nn.Linear`` to INT8 (absmax per ``"row"`` or per ``"tensor"``) and encodes it.

        Raises:
            TypeError: another kind of module.
            ValueError: its weights hold NaN or infinity, or a name is unknown.
        """
        check_type("DCLinear.from_float: linear", linear, nn.Linear, "a torch.nn.Linear")
        qweight, row_scale = quantize_absmax(linear.weight, granularity)
        bias = linear.bias
        return cls.from_qweight(
            qweight,
            row_scale,
            None,
            bias,
            codec,
            activations,
            level=level,
            dtype=linear.weight.dtype,
        )
