"""A packed payload on a device, with the index that kernels need to find its tiles and exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcext.codec import payload_info, verify_payload

BLOCK_ROWS, GROUP_COLS, PIECE_BYTES, TABLE_BYTES = 16, 32, 64, 64
RAW_WIDTH = 8  # stands in the index for a tile that is stored raw
TILE_BLOCKS = (1, 4)  # blocks of rows that one program of a kernel may take


@dataclass(frozen=True)
class Exceptions:
    """Weights that the tables do not hold, row after row (CSR), columns ascending.

    Attributes:
        row_ptr: ``(rows + 1,)`` int32, where each row's begin.
        column: ``(n,)`` int32.
        delta: ``(n,)`` int16, the weight less the one that its code 0 stands for.
    """

    row_ptr: Tensor
    column: Tensor
    delta: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its attributes, in order."""
        return self.row_ptr, self.column, self.delta


@dataclass(frozen=True)
class PackedWeight:
    """One ``qweight`` as its packed payload, for ``dcext.kernels.packed.packed_linear``.

    Attributes:
        shape: ``(out_features, in_features)``.
        payload: 1-D uint8 on the device, the payload's bytes.
        tiles: for each number of blocks in ``TILE_BLOCKS``, a ``(tiles, 5)`` int64 index of tiles of so many times 16
            rows: offset of the codes (or of the raw weights), offset of the table, first row, rows, width.
        exceptions: None where there are none.
    """

    shape: tuple[int, int]
    payload: Tensor
    tiles: dict[int, Tensor]
    exceptions: Exceptions | None

    @classmethod
    def from_payload(cls, payload: Tensor, device: torch.device | str = "cuda") -> PackedWeight:
        """Copies a payload to a device and indexes it.

        Args:
            payload: 1-D uint8 on the CPU, codec packed, one slab. Every byte is verified.
            device: where the weight is to be resident.

        Raises:
            FormatError: the payload is corrupt, truncated or of another version.
            ValueError: another codec, more than one slab, or not a 1-D uint8 tensor on the CPU.
        """
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.device.type != "cpu":
            raise ValueError(
                "PackedWeight: payload: expected a 1-D torch.uint8 tensor on the CPU, got "
                f"{payload.dim()}-D {payload.dtype} on {payload.device}"
            )
        payload = payload.contiguous()
        info = payload_info(payload)
        verify_payload(payload)
        if info["codec"] != "packed" or info["slab_cols"] != info["shape"][1]:
            raise ValueError(
                f"PackedWeight: payload: expected codec packed and one slab of {info['shape'][1]} columns, "
                f"got {info['codec']} and slabs of {info['slab_cols']}"
            )
        panels = [_Panel(payload.numpy(), chunk) for chunk in info["chunks"]]
        tiles = {
            blocks: torch.tensor([tile for panel in panels for tile in panel.tiles(blocks)])
            for blocks in TILE_BLOCKS
        }
        exceptions = _exceptions([panel.exceptions() for panel in panels])
        if exceptions is not None:
            exceptions = Exceptions(*(tensor.to(device) for tensor in exceptions.tensors()))
        return cls(
            info["shape"],
            payload.to(device, copy=True),
            {blocks: index.to(device) for blocks, index in tiles.items()},
            exceptions,
        )

    @property
    def device(self) -> torch.device:
        """Where the weight is resident."""
        return self.payload.device

    @property
    def nbytes(self) -> int:
        """Bytes on the device, payload and index."""
        tensors = [self.payload, *self.tiles.values()]
        if self.exceptions is not None:
            tensors += self.exceptions.tensors()
        return sum(tensor.nbytes for tensor in tensors)


class _Panel:
    """One verified chunk: where its parts lie. ``data`` is the whole payload."""

    def __init__(self, data: np.ndarray, chunk: dict[str, Any]) -> None:
        self.row, (self.rows, self.cols) = chunk["row"], chunk["shape"]
        self.offset, self.num_exceptions = chunk["offset"], chunk["exceptions"]
        is_raw = chunk["encoding"] == "raw"
        self.width = RAW_WIDTH if is_raw else chunk["width"]
        self.blocks = -(-self.rows // BLOCK_ROWS)
        groups = -(-self.cols // GROUP_COLS)
        self.block_bytes = BLOCK_ROWS * self.cols if is_raw else groups * self.width * PIECE_BYTES
        self.codes = self.offset if is_raw else self.offset + TABLE_BYTES
        self.chunk = data[self.offset : self.offset + chunk["nbytes"]]

    def tiles(self, blocks: int) -> list[tuple[int, int, int, int, int]]:
        """Offset of the codes, offset of the table, first row, rows and width of each tile."""
        return [
            (
                self.codes + block * self.block_bytes,
                self.offset,
                self.row + block * BLOCK_ROWS,
                min(blocks * BLOCK_ROWS, self.rows - block * BLOCK_ROWS),
                self.width,
            )
            for block in range(0, self.blocks, blocks)
        ]

    def exceptions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many each row has, their columns, and their distances from the weight of code 0."""
        if self.num_exceptions == 0:
            return np.zeros(self.rows, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.int16)
        counts_begin = TABLE_BYTES + self.blocks * self.block_bytes
        columns_begin = counts_begin + 2 * BLOCK_ROWS * self.blocks
        values_begin = columns_begin + 2 * self.num_exceptions
        counts = self.chunk[counts_begin:columns_begin].view("<u2")
        columns = self.chunk[columns_begin:values_begin].view("<u2")
        values = self.chunk[values_begin:].view(np.int8).astype(np.int16)
        return counts[: self.rows], columns, values - self.chunk[:1].view(np.int8)


def _exceptions(panels: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Exceptions | None:
    counts, columns, deltas = (np.concatenate(parts) for parts in zip(*panels, strict=True))
    if columns.size == 0:
        return None
    row_ptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if row_ptr[-1] >= 2**31:
        raise ValueError(f"PackedWeight: expected fewer than 2^31 exceptions, got {row_ptr[-1]}")
    return Exceptions(
        torch.from_numpy(row_ptr.astype(np.int32)),
        torch.from_numpy(columns.astype(np.int32)),
        torch.from_numpy(deltas),
    )
