"""A packed payload on a device, with the index that kernels need to find its tiles and exceptions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcext.errors import FormatError

BLOCK_ROWS, GROUP_COLS, PIECE_BYTES, TABLE_BYTES = 16, 32, 64, 64
WIDTHS = (2, 3, 4, 5, 6)
RAW_WIDTH = 8  # stands in the index for a tile that is stored raw
TILE_BLOCKS = (1, 4)  # blocks of rows that one program of a kernel may take

_MAX_COLS = 2**16  # of a packed tile; sums of as many products fit in int32 in any order
_MAGIC, _VERSION, _CODEC_PACKED = b"DCEXTPL\n", 1, 2
_ENCODING_RAW, _ENCODING_PACKED = 0, 2
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2"),
        ("codec", "u1"),
        ("reserved", "V5"),
        ("rows", "<u8"),
        ("cols", "<u8"),
        ("panel_rows", "<u4"),
        ("slab_cols", "<u4"),
        ("nbytes", "<u8"),
        ("num_chunks", "<u4"),
        ("end", "V12"),
    ]
)
_CHUNK = np.dtype(
    [
        ("offset", "<u8"),
        ("nbytes", "<u4"),
        ("frame_nbytes", "<u4"),
        ("encoding", "u1"),
        ("width", "u1"),
        ("end", "V14"),
    ]
)


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
            payload: 1-D uint8 on the CPU, codec packed, one slab; its checksums are taken as verified.
            device: where the weight shall rest.

        Raises:
            FormatError: header, chunk table or exceptions contradict the format.
            ValueError: another codec, more than one slab, or not a 1-D uint8 tensor on the CPU.
        """
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.device.type != "cpu":
            raise ValueError(
                "PackedWeight: payload: expected a 1-D torch.uint8 tensor on the CPU, got "
                f"{payload.dim()}-D {payload.dtype} on {payload.device}"
            )
        data = payload.contiguous().numpy()
        header, chunks = _parse(data)
        rows, cols = int(header["rows"]), int(header["cols"])
        panels = [
            _Panel(data, chunk, row, min(int(header["panel_rows"]), rows - row), cols)
            for chunk, row in zip(chunks, range(0, rows, int(header["panel_rows"])), strict=True)
        ]
        tiles = {
            blocks: torch.tensor([tile for panel in panels for tile in panel.tiles(blocks)])
            for blocks in TILE_BLOCKS
        }
        exceptions = _exceptions([panel.exceptions() for panel in panels])
        if exceptions is not None:
            exceptions = Exceptions(*(tensor.to(device) for tensor in exceptions.tensors()))
        return cls(
            (rows, cols),
            payload.to(device, copy=True),
            {blocks: index.to(device) for blocks, index in tiles.items()},
            exceptions,
        )

    @property
    def device(self) -> torch.device:
        """Where the weight rests."""
        return self.payload.device

    @property
    def nbytes(self) -> int:
        """Bytes on the device, payload and index."""
        tensors = [self.payload, *self.tiles.values()]
        if self.exceptions is not None:
            tensors += self.exceptions.tensors()
        return sum(tensor.nbytes for tensor in tensors)


class _Panel:
    """One chunk: where its parts lie. ``data`` is the whole payload."""

    def __init__(self, data: np.ndarray, chunk: np.void, row: int, rows: int, cols: int) -> None:
        self.row, self.rows, self.cols = row, rows, cols
        self.offset, nbytes = int(chunk["offset"]), int(chunk["nbytes"])
        self.is_raw = int(chunk["encoding"]) == _ENCODING_RAW
        self.width = RAW_WIDTH if self.is_raw else int(chunk["width"])
        self.blocks = -(-rows // BLOCK_ROWS)
        groups = -(-cols // GROUP_COLS)
        self.block_bytes = BLOCK_ROWS * cols if self.is_raw else groups * self.width * PIECE_BYTES
        self.codes = self.offset if self.is_raw else self.offset + TABLE_BYTES
        expected = rows * cols if self.is_raw else TABLE_BYTES + self.blocks * self.block_bytes
        if nbytes < expected or (self.is_raw and nbytes != expected):
            raise FormatError(
                f"PackedWeight: chunk at row {row}: expected {expected} bytes or more, got {nbytes}"
            )
        self.chunk = data[self.offset : self.offset + nbytes]
        self.codes_end = expected

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
        stored = self.chunk[self.codes_end :]
        if stored.size == 0:
            return np.zeros(self.rows, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.int16)
        counts_bytes = 2 * BLOCK_ROWS * self.blocks
        counts = stored[: min(counts_bytes, stored.size // 2 * 2)].view("<u2")
        total = int(counts.sum())
        expected = counts_bytes + 3 * total
        if total == 0 or stored.size != expected or counts[self.rows :].any():
            raise FormatError(
                f"PackedWeight: exceptions at row {self.row}: expected {expected} bytes for {total} of them, "
                f"got {stored.size}"
            )
        columns = stored[counts_bytes : counts_bytes + 2 * total].view("<u2")
        rows = np.repeat(np.arange(self.rows), counts[: self.rows])
        position = rows * self.cols + columns
        if (columns >= self.cols).any() or (np.diff(position) <= 0).any():
            raise FormatError(
                f"PackedWeight: exceptions at row {self.row}: expected ascending columns in [0, {self.cols}), "
                f"got others, up to {int(columns.max())}"
            )
        delta = stored[-total:].view(np.int8).astype(np.int16) - self.chunk[:1].view(np.int8)
        return counts[: self.rows], columns, delta


def _parse(data: np.ndarray) -> tuple[np.void, np.ndarray]:
    """Header and chunk table of a packed payload of one slab."""
    if data.size < _HEADER.itemsize or bytes(data[:8]) != _MAGIC:
        raise FormatError(f"PackedWeight: expected a payload, got {bytes(data[:8])!r}")
    header = data[: _HEADER.itemsize].view(_HEADER)[0]
    if header["version"] != _VERSION or header["codec"] != _CODEC_PACKED:
        raise ValueError(
            f"PackedWeight: expected version {_VERSION} and codec packed ({_CODEC_PACKED}), "
            f"got {header['version']} and {header['codec']}"
        )
    if header["slab_cols"] != header["cols"] or header["cols"] > _MAX_COLS:
        raise ValueError(
            f"PackedWeight: expected one slab of {header['cols']} columns, at most {_MAX_COLS}, "
            f"got slabs of {header['slab_cols']}"
        )
    num_chunks = int(header["num_chunks"])
    panels = -(-int(header["rows"]) // max(int(header["panel_rows"]), 1))
    table_end = _HEADER.itemsize + num_chunks * _CHUNK.itemsize
    if num_chunks != panels or header["nbytes"] != data.size or table_end > data.size:
        raise FormatError(
            f"PackedWeight: expected {panels} chunks in {data.size} bytes, "
            f"got {num_chunks} in {header['nbytes']}"
        )
    chunks = data[_HEADER.itemsize : table_end].view(_CHUNK)
    for chunk in chunks:
        _check(chunk, data.size)
    return header, chunks


def _check(chunk: np.void, nbytes: int) -> None:
    is_packed = chunk["encoding"] == _ENCODING_PACKED and chunk["width"] in WIDTHS
    is_raw = chunk["encoding"] == _ENCODING_RAW and chunk["width"] == 0
    if not is_packed and not is_raw:
        raise FormatError(
            f"PackedWeight: expected a packed chunk of width {WIDTHS[0]} to {WIDTHS[-1]} or a raw one, "
            f"got encoding {chunk['encoding']} of width {chunk['width']}"
        )
    end = int(chunk["offset"]) + int(chunk["nbytes"])
    if chunk["offset"] % PIECE_BYTES or end > nbytes:
        raise FormatError(
            f"PackedWeight: expected chunks at multiples of {PIECE_BYTES} within {nbytes} bytes, "
            f"got bytes {chunk['offset']} to {end}"
        )


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
