"""What weights take on a device beside their payloads: what says where their parts lie. Upper bounds, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Of a seek index (csrc/codec/seek_index.h): so much for each zstd block of at most 128 KiB of content, which never is
# more than its weights.
BLOCK_INDEX_NBYTES, BLOCK_WEIGHTS = 448, 128 << 10
# Of a packed weight's index (dcext.weights.packed): tiles of 16 and of 64 rows, rows, exceptions.
TILE_NBYTES, TILE_ROWS = 40, (16, 64)
ROW_NBYTES, EXCEPTION_NBYTES = 4, 6
PART_NBYTES = 256  # alignment of a part, in a slot as in an allocation
PARTS = {"raw": 2, "zstd": 3, "packed": 8}  # flags of failures among them


def index_nbytes(codec: str, rows: int, chunks: int, blocks: int, exceptions: int) -> int:
    """Bytes beside a payload.

    Args:
        codec: of the payload.
        rows: of the matrix.
        chunks: of the payload.
        blocks: of codec zstd, in all chunks.
        exceptions: of codec packed, in all chunks.
    """
    nbytes = PARTS[codec] * PART_NBYTES
    if codec == "zstd":
        nbytes += BLOCK_INDEX_NBYTES * blocks
    if codec == "packed":
        tiles = sum(rows // size + chunks for size in TILE_ROWS)
        nbytes += TILE_NBYTES * tiles + ROW_NBYTES * (rows + 1) + EXCEPTION_NBYTES * exceptions
    return nbytes


def payload_index_nbytes(info: Mapping[str, Any]) -> int:
    """Bytes beside a payload that ``dcext.payload_info`` describes; see ``index_nbytes``.

    Frames of a zstd level may have matches, which a device does not decode: they are resident there as plain INT8.
    """
    rows, cols = info["shape"]
    chunks = info["chunks"]
    exceptions = sum(chunk["exceptions"] for chunk in chunks)
    blocks = sum(-(-math.prod(chunk["shape"]) // BLOCK_WEIGHTS) for chunk in chunks)
    nbytes = index_nbytes(info["codec"], rows, len(chunks), blocks, exceptions)
    if info["codec"] == "zstd" and info["level"] != 0:
        plain = rows * cols + PART_NBYTES * (len(chunks) + PARTS["raw"])
        nbytes = max(nbytes, plain - info["nbytes"])
    return nbytes
