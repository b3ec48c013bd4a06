"""What is known of each codec beside how it codes: an entry each, read by recipes, plans and measurements.

The bytes are made and read in ``csrc/codec``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from dcext.quantize.cost import ENTROPY_COST, PACKED_COST, CostModel


@dataclass(frozen=True)
class Extent:
    """Counts of a payload that the size of its index depends on.

    Attributes:
        rows: of the matrix.
        chunks: of the payload.
        blocks: of at most ``footprint.BLOCK_WEIGHTS`` weights, in all chunks.
        exceptions: weights without a code, in all chunks.
    """

    rows: int
    chunks: int
    blocks: int
    exceptions: int


def _no_index(extent: Extent) -> int:
    return 0


@dataclass(frozen=True)
class Codec:
    """One codec.

    Attributes:
        name: as in ``dcext.encode`` and in tiers.
        layer_bits: stored bits per weight of layers as recipe ``rate`` makes them for it, at its usual target.
        embedding_bits: stored bits per weight of embeddings, which are INT8 per row.
        cost: what a bit costs and buys in it, to recipe ``rate``.
        parts: allocations on a device beside a payload, flags of failures among them.
        index_nbytes: bytes on a device of what says where parts of a payload lie; an upper bound.
        exception_every: one of so many weights has no code, in layers that recipe ``rate`` makes for it; 0 where all have.
        decoded_whole: whether a device decodes a matrix before it multiplies, rather than while it does.
    """

    name: str
    layer_bits: float
    embedding_bits: float
    cost: CostModel = ENTROPY_COST
    parts: int = 2
    index_nbytes: Callable[[Extent], int] = _no_index
    exception_every: int = 0
    decoded_whole: bool = False


def _packed_index(extent: Extent) -> int:
    """``dcext.weights.packed``: 40 bytes for tiles of 16 and of 64 rows, 4 for a row, 6 for an exception."""
    tiles = sum(extent.rows // size + extent.chunks for size in (16, 64))
    return 40 * tiles + 4 * (extent.rows + 1) + 6 * extent.exceptions


def _zstd_index(extent: Extent) -> int:
    """``csrc/codec/seek_index.h``."""
    return 448 * extent.blocks


_registered: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Makes what is known of a codec available by its name.

    Raises:
        ValueError: there is one of that name.
    """
    if codec.name in _registered:
        raise ValueError(f"register: expected a new codec, got a second {codec.name!r}")
    _registered[codec.name] = codec


def codec_named(name: str) -> Codec:
    """The codec of a name; ``"auto"``, which is raw or zstd, counts as zstd.

    Raises:
        KeyError: it is not one of ``codec_names``.
    """
    return _registered["zstd" if name == "auto" else name]


def codec_names() -> tuple[str, ...]:
    """All codecs that a layer can have, plain INT8 first."""
    return tuple(_registered)


def arrivals() -> list[tuple[str, ...]]:
    """Sets of codecs that layers may arrive in on a device: none, some that are coded, or all.

    What is decoded whole comes last of those that are coded, plain INT8 last of all.
    """
    coded = sorted(codec_names()[1:], key=lambda name: codec_named(name).decoded_whole)
    found = [
        names[::-1] for count in range(len(coded) + 1) for names in combinations(coded[::-1], count)
    ]
    return [*found, (*coded, codec_names()[0])]


# Bits: layers at a ratio of 2.2, packed ones at 4.25 bits (they are other integers, so a real model has one of both
# cheaply).
register(Codec("raw", layer_bits=8.0, embedding_bits=8.0))
register(
    Codec(
        "packed",
        layer_bits=4.25,
        embedding_bits=8.0,
        cost=PACKED_COST,
        parts=8,
        index_nbytes=_packed_index,
        exception_every=500,
    )
)
register(
    Codec(
        "zstd",
        layer_bits=3.64,
        embedding_bits=6.9,
        parts=3,
        index_nbytes=_zstd_index,
        decoded_whole=True,
    )
)
