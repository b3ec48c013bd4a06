"""Codec ``packed`` in plain numpy, from PAYLOAD.md alone: slow, checked, and sharing nothing with the library."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import xxhash

BLOCK_ROWS, GROUP_COLS, PIECE = 16, 32, 64
WIDTHS = (2, 3, 4, 5, 6)
RAW = 8  # the "width" of a tile that is stored raw
RAW_ENCODING, PACKED_ENCODING, PACKED_CODEC = 0, 2, 2


def encode_packed(
    qweight: np.ndarray,
    widths: Sequence[int] | None = None,
    panel_rows: int = 64,
    slab_cols: int | None = None,
) -> bytes:
    """A packed payload of an int8 ``(rows, cols)`` matrix.

    Args:
        qweight: the matrix.
        widths: one per panel, 2 to 6 or ``RAW``; None takes what is smallest for every tile.
        panel_rows: rows of a tile, clipped to those of the matrix.
        slab_cols: columns of a tile, None for all.
    """
    rows, cols = qweight.shape
    panel_rows, slab_cols = min(panel_rows, rows), min(slab_cols or cols, cols)
    chunks, stored_widths = [], []
    for panel, row in enumerate(range(0, rows, panel_rows)):
        for col in range(0, cols, slab_cols):
            tile = qweight[row : row + panel_rows, col : col + slab_cols]
            choices = (*WIDTHS, RAW) if widths is None else (widths[panel],)
            chunk, width = min(
                ((encode_chunk(tile, width), width) for width in choices),
                key=lambda chosen: len(chosen[0]),
            )
            chunks.append(chunk)
            stored_widths.append(width)
    return assemble(qweight.shape, panel_rows, slab_cols, chunks, stored_widths)


def reseal(payload: bytearray) -> None:
    """Makes all checksums of a payload hold again, in place, whatever was written into it; sizes must be as before."""
    (num_chunks,) = struct.unpack_from("<I", payload, 48)
    for entry in range(64, 64 + 32 * num_chunks, 32):
        offset, nbytes = struct.unpack_from("<QI", payload, entry)
        extent = bytes(payload[offset : align(offset + nbytes)])
        struct.pack_into("<Q", payload, entry + 24, xxhash.xxh3_64_intdigest(extent))
    head = (payload[:56], payload[64 : align(64 + 32 * num_chunks)])
    hashes = (xxhash.xxh3_64_intdigest(bytes(part)) for part in head)
    struct.pack_into("<Q", payload, 56, xxhash.xxh3_64_intdigest(struct.pack("<QQ", *hashes)))


def assemble(
    shape: tuple[int, int],
    panel_rows: int,
    slab_cols: int,
    chunks: Sequence[bytes],
    widths: Sequence[int],
) -> bytes:
    """Header, chunk table and chunks."""
    extents = [pad(chunk) for chunk in chunks]
    begin = align(64 + 32 * len(chunks))
    offsets = begin + np.cumsum([0] + [len(extent) for extent in extents])
    table = b""
    for chunk, extent, width, offset in zip(chunks, extents, widths, offsets, strict=False):
        encoding, width = (RAW_ENCODING, 0) if width == RAW else (PACKED_ENCODING, width)
        table += struct.pack("<QIIBB6xQ", offset, len(chunk), 0, encoding, width, xxh3(extent))
    table = pad(table)
    head = b"DCEXTPL\n" + struct.pack("<HBBhH", 1, PACKED_CODEC, 0, 0, 0)
    head += struct.pack("<QQIIQII", *shape, panel_rows, slab_cols, offsets[-1], len(chunks), 0)
    head += struct.pack("<Q", head_checksum(head, table))
    return head + table + b"".join(extents)


def decode_packed(payload: bytes) -> np.ndarray:
    """The matrix, ``(rows, cols)`` int8, with every checksum and all padding compared."""
    magic, version, codec, *level = struct.unpack_from("<8sHBBhH", payload)
    rows, cols, panel_rows, slab_cols, nbytes, num_chunks, zero = struct.unpack_from(
        "<QQIIQII", payload, 16
    )
    assert (magic, version, codec, level) == (b"DCEXTPL\n", 1, PACKED_CODEC, [0, 0, 0])
    assert (nbytes, num_chunks, zero) == (
        len(payload),
        -(-rows // panel_rows) * -(-cols // slab_cols),
        0,
    )
    offset = align(64 + 32 * num_chunks)
    assert struct.unpack_from("<Q", payload, 56)[0] == head_checksum(
        payload[:56], payload[64:offset]
    )
    qweight = np.empty((rows, cols), np.int8)
    origins = [
        (row, col) for row in range(0, rows, panel_rows) for col in range(0, cols, slab_cols)
    ]
    for index, (row, col) in enumerate(origins):
        entry = struct.unpack_from("<QIIBBB5sQ", payload, 64 + 32 * index)
        found, size, frame, encoding, width, pairs, zeros, checksum = entry
        assert (found, frame, pairs, zeros) == (offset, 0, 0, bytes(5))
        extent = payload[offset : align(offset + size)]
        assert checksum == xxh3(extent)
        assert extent == pad(extent[:size])
        tile = qweight[row : row + panel_rows, col : col + slab_cols]
        if encoding == RAW_ENCODING:
            assert width == 0
            tile[:] = np.frombuffer(extent[:size], np.int8).reshape(tile.shape)
        else:
            assert encoding == PACKED_ENCODING
            tile[:] = decode_chunk(extent[:size], tile.shape, width)
        offset += len(extent)
    assert offset == nbytes
    return qweight


def encode_chunk(tile: np.ndarray, width: int) -> bytes:
    """Table, codes and exceptions of an int8 tile; the table holds the most frequent weights, ascending."""
    if width == RAW:
        return tile.tobytes()
    values, counts = np.unique(tile, return_counts=True)
    table = np.sort(values[np.argsort(-counts, kind="stable")][: 2**width])
    code_of = np.full(256, -1)
    code_of[table.view(np.uint8)] = np.arange(len(table))
    codes = code_of[np.ascontiguousarray(tile).view(np.uint8)]
    stored_table = table.tobytes().ljust(64, b"\0")
    return stored_table + pack_codes(codes.clip(0), width) + exceptions(tile, codes < 0)


def decode_chunk(chunk: bytes, shape: tuple[int, int], width: int) -> np.ndarray:
    """The int8 tile of that shape."""
    table = np.frombuffer(chunk[:64], np.int8)
    assert not table[2**width :].any()
    blocks, groups = blocks_and_groups(shape)
    end = 64 + blocks * groups * width * PIECE
    tile = table[unpack_codes(chunk[64:end], shape, width)]
    if len(chunk) > end:
        counts = np.frombuffer(chunk, "<u2", BLOCK_ROWS * blocks, end)
        total = int(counts.sum())
        assert total > 0
        assert len(chunk) == end + 2 * len(counts) + 3 * total
        rows = np.repeat(np.arange(len(counts)), counts)
        columns = np.frombuffer(chunk, "<u2", total, end + 2 * len(counts))
        assert (np.diff(rows * 65536 + columns) > 0).all()
        tile[rows, columns] = np.frombuffer(chunk, np.int8, total, len(chunk) - total)
    return tile


def exceptions(tile: np.ndarray, is_exception: np.ndarray) -> bytes:
    """Counts of the rows of all blocks, columns, weights; nothing without exceptions."""
    if not is_exception.any():
        return b""
    counts = np.zeros(BLOCK_ROWS * blocks_and_groups(tile.shape)[0], "<u2")
    counts[: len(tile)] = is_exception.sum(1)
    _, columns = np.nonzero(is_exception)
    return counts.tobytes() + columns.astype("<u2").tobytes() + tile[is_exception].tobytes()


def pack_codes(codes: np.ndarray, width: int) -> bytes:
    """The pieces of a tile's codes."""
    blocks, groups = blocks_and_groups(codes.shape)
    padded = np.zeros((blocks * BLOCK_ROWS, groups * GROUP_COLS), np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    # (block, row, group, v, c) -> (v, block, group, row, c)
    v = padded.reshape(blocks, BLOCK_ROWS, groups, 8, 4).transpose(3, 0, 2, 1, 4)
    pieces, bit = [], 0
    if width >= 4:
        pieces += [v[p] & 15 | (v[p + 4] & 15) << 4 for p in range(4)]
        bit = 4
    if width in (2, 3, 6):
        two = v >> bit & 3
        pieces += [two[p] | two[p + 2] << 2 | two[p + 4] << 4 | two[p + 6] << 6 for p in range(2)]
        bit += 2
    if width in (3, 5):
        pieces.append(np.packbits(v >> bit & 1, axis=0, bitorder="little")[0])
    stacked = np.stack([piece.reshape(blocks, groups, PIECE) for piece in pieces], axis=2)
    assert stacked.shape == (blocks, groups, width, PIECE)
    return stacked.tobytes()


def unpack_codes(stored: bytes, shape: tuple[int, int], width: int) -> np.ndarray:
    """Codes of a tile from its pieces: uint8, of the tile's shape; those that are missing are 0."""
    blocks, groups = blocks_and_groups(shape)
    pieces = np.frombuffer(stored, np.uint8).reshape(blocks, groups, width, BLOCK_ROWS, 4)
    pieces = list(pieces.transpose(2, 0, 1, 3, 4))
    v, bit = np.zeros((8, *pieces[0].shape), np.uint8), 0
    if width >= 4:
        for p in range(4):
            v[p], v[p + 4] = pieces[p] & 15, pieces[p] >> 4
        pieces, bit = pieces[4:], 4
    if width in (2, 3, 6):
        for position in range(8):
            v[position] |= (pieces[position % 2] >> position // 2 * 2 & 3) << bit
        pieces, bit = pieces[2:], bit + 2
    if width in (3, 5):
        for position in range(8):
            v[position] |= (pieces[0] >> position & 1) << bit
    padded = v.transpose(1, 3, 2, 0, 4).reshape(blocks * BLOCK_ROWS, groups * GROUP_COLS)
    assert not padded[shape[0] :].any()
    assert not padded[:, shape[1] :].any()
    return padded[: shape[0], : shape[1]]


def blocks_and_groups(shape: tuple[int, ...]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK_ROWS), -(-shape[1] // GROUP_COLS)


def align(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def pad(data: bytes) -> bytes:
    return data.ljust(align(len(data)), b"\0")


def xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def head_checksum(head: bytes, table: bytes) -> int:
    return xxh3(struct.pack("<QQ", xxh3(head), xxh3(table)))
