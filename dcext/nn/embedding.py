"""An embedding whose INT8 rows are stored compressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcext.checks import check_type
from dcext.codec import decode, encode
from dcext.nn.compressed import CompressedModule
from dcext.quantize import quantize_absmax
from dcext.weights.host_stream import StreamedWeight
from dcext.weights.indexed import IndexedWeight


class DCEmbedding(CompressedModule, nn.Embedding):
    """A frozen ``nn.Embedding``: looks rows up, decoding each panel that is touched once per call.

    On a GPU its rows are resident as plain INT8, since frames are decoded by the 128 KiB and a token needs one row.
    ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` concern training: they keep the values that do nothing.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    _rows: Tensor | None = None

    def __init__(
        self,
        payload: Tensor,
        row_scale: Tensor,
        col_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        """Takes over an encoded ``qweight``; not copied.

        Args:
            payload: 1-D uint8 from ``dcext.encode`` of ``(num_embeddings, embedding_dim)``.
            row_scale: ``(num_embeddings,)``.
            col_scale: ``(embedding_dim,)`` or None.
            dtype: of the rows that are returned.
            padding_idx: kept for those who read it; its row is looked up like any other, as in ``nn.Embedding``.
        """
        super().__init__(payload, row_scale, col_scale, dtype)
        self.padding_idx = padding_idx

    def _move_to(self, device: torch.device) -> None:
        # What is not read there stays on the host: the payload, unless the rows lie in it.
        if self.codec != "raw":
            self._rows = decode(self.payload, verify=False).to(device)
            return
        super()._move_to(device)
        self._rows = self.decode_qweight()

    def _drop_backing(self) -> None:
        super()._drop_backing()
        self._rows = None

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding,
        *,
        granularity: str = "row",
        codec: str = "auto",
        level: int | None = None,
    ) -> DCEmbedding:
        """Quantizes an ``nn.Embedding`` to INT8 (absmax per ``"row"`` or per ``"tensor"``) and encodes it.

        Raises:
            TypeError: another kind of module.
            ValueError: its weights hold NaN or infinity, or it renormalizes rows (``max_norm``).
        """
        expected = "a torch.nn.Embedding"
        check_type("DCEmbedding.from_float: embedding", embedding, nn.Embedding, expected)
        if embedding.max_norm is not None:
            raise ValueError(f"DCEmbedding: max_norm: expected None, got {embedding.max_norm}")
        qweight, row_scale = quantize_absmax(embedding.weight, granularity)
        payload = encode(qweight, codec, level)
        return cls(payload, row_scale, None, embedding.weight.dtype, embedding.padding_idx)

    @property
    def rows_nbytes(self) -> int:
        """Bytes of rows on a device that do not lie in the payload there."""
        is_in_payload = isinstance(self.backing, IndexedWeight) and self.backing.view is not None
        return 0 if self._rows is None or is_in_payload else self._rows.nbytes

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """Rows."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        """Columns."""
        return self.shape[1]

    def forward(self, indices: Tensor) -> Tensor:
        """Looks rows up.

        Args:
            indices: any shape, int64 or int32, where the module is.

        Returns:
            ``(*indices.shape, embedding_dim)`` in ``self.dtype``.

        Raises:
            IndexError: an index outside [0, num_embeddings).
        """
        return self.lookup(indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """``forward``, also where a subclass of ``nn.Embedding`` does more there."""
        if self._rows is not None:
            rows = self._rows[indices].float() * self.row_scale[indices][..., None]
            return (rows if self.col_scale is None else rows * self.col_scale).to(self.dtype)
        weight = self.backing
        if isinstance(weight, StreamedWeight):
            return torch.ops.dcext.embedding_streamed(
                indices,
                weight.handle,
                weight.unit,
                self.row_scale,
                self.col_scale,
                self.embedding_dim,
                self.dtype,
            )
        return torch.ops.dcext.embedding(
            indices, self.payload, self.row_scale, self.col_scale, self.embedding_dim, self.dtype
        )

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ matrix.T`` with float activations, as tied output layers compute it."""
        if self.backing is not None or x.device.type != "cpu":
            return super().multiply(x)
        scales = (self.row_scale, self.col_scale)
        return torch.ops.dcext.linear(x, self.payload, *scales, None, "none")

    def extra_repr(self) -> str:
        """As ``nn.Embedding``'s, then how the rows are stored."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"
