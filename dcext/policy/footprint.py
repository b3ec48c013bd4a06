"""What weights take on a device beside their payloads: what says where their parts lie. Upper bounds, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dcext.codecs import Extent, codec_named

BLOCK_WEIGHTS = (
    128 << 10
)  # a zstd block has as much content at most, which never is more than its weights
PART_NBYTES = 256  # alignment of a part, in a slot as in an allocation


def index_nbytes(codec: str, extent: Extent) -> int:
    """Bytes beside a payload of a codec."""
    known = codec_named(codec)
    return known.parts * PART_NBYTES + known.index_nbytes(extent)


def payload_index_nbytes(info: Mapping[str, Any]) -> int:
    """Bytes beside a payload that ``dcext.payload_info`` describes; see ``index_nbytes``.

    Frames of a zstd level may have matches, which a device does not decode: they are resident there as plain INT8.
    """
    rows, cols = info["shape"]
    chunks = info["chunks"]
    exceptions = sum(chunk["exceptions"] for chunk in chunks)
    blocks = sum(-(-math.prod(chunk["shape"]) // BLOCK_WEIGHTS) for chunk in chunks)
    nbytes = index_nbytes(info["codec"], Extent(rows, len(chunks), blocks, exceptions))
    if info["level"] != 0:
        plain = rows * cols + PART_NBYTES * (len(chunks) + codec_named("raw").parts)
        nbytes = max(nbytes, plain - info["nbytes"])
    return nbytes
