"""Lossless coding of one int8 matrix. The bytes are specified in ``csrc/format/PAYLOAD.md``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcext import _C
from dcext.checks import check_type

CODECS = ("auto", "raw", "zstd", "packed")


def encode(
    qweight: Tensor, codec: str = "auto", level: int | None = None, slab_cols: int | None = None
) -> Tensor:
    """Encodes a matrix of weights. The same matrix and arguments always give the same bytes.

    Args:
        qweight: ``(out_features, in_features)`` int8 on the CPU, any values, at least one element. Not modified.
        codec: ``"raw"`` (8 bits each), ``"zstd"`` (entropy-coded), ``"packed"`` (codes of fixed width, multiplied as
            they lie), or ``"auto"``: raw or zstd, what a sample favours.
        level: for ``"zstd"``: None codes literals only, the best choice for weights, which have no repeats; 1 to 22
            are Zstandard's own levels, for matrices with real repeats.
        slab_cols: columns of a tile; None for all, so that rows lie in one piece. Smaller slabs let a tensor-parallel
            rank read its columns alone.

    Returns:
        The payload: 1-D uint8, its length a multiple of 64.

    Raises:
        TypeError: ``qweight`` is not int8.
        ValueError: shape, codec, level or slab_cols is not as above.
    """
    check_type("encode: qweight", qweight, Tensor, "an int8 Tensor")
    check_type("encode: codec", codec, str, "a codec's name")
    check_type("encode: level", level, (int, type(None)), "None or 1..22")
    if level is not None and level < 1:
        raise ValueError(f"encode: level: expected None or 1..22, got {level}")
    return torch.ops.dcext.encode(qweight, codec, level or 0, slab_cols or 0)


def decode(
    payload: Tensor,
    num_threads: int | None = None,
    out: Tensor | None = None,
    *,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    verify: bool = True,
) -> Tensor:
    """Decodes a payload, or a rectangle of it; only the chunks that are needed are read.

    Args:
        payload: 1-D uint8, contiguous, on the CPU. Not modified.
        num_threads: threads to use, None for all of the pool (``set_num_threads``).
        out: ``(rows, cols)`` int8 destination with contiguous rows, or None for a new tensor.
        rows: half-open range of output features, None for all.
        cols: half-open range of input features, None for all.
        verify: compare each chunk with its checksum.

    Returns:
        ``out``, or a new ``(out_features, in_features)`` int8 tensor.

    Raises:
        FormatError: the payload is corrupt, truncated or of another version. ``out`` is then undefined.
        TypeError, ValueError: an argument is not as above.
    """
    check_type("decode: payload", payload, Tensor, "a uint8 Tensor")
    out_features, in_features = _C.payload_shape(payload)
    row_begin, row_end = rows or (0, out_features)
    col_begin, col_end = cols or (0, in_features)
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"decode: num_threads: expected None or at least 1, got {num_threads}")
    if out is None:
        shape = (max(row_end - row_begin, 0), max(col_end - col_begin, 0))
        out = torch.empty(shape, dtype=torch.int8)
    _C.decode_into(payload, out, [row_begin, row_end, col_begin, col_end], num_threads or 0, verify)
    return out


def seek_index(payload: Tensor, *, verify: bool = True) -> Tensor | None:
    """Finds where thousands of threads can start to decode a payload (``csrc/codec/seek_index.h``).

    Takes about as long as decoding. The index is never stored: it is made from any payload when that is loaded.

    Args:
        payload: 1-D uint8, contiguous, on the CPU, of codec ``"raw"`` or ``"zstd"``.
        verify: compare each chunk with its checksum first.

    Returns:
        ``(blocks, 448)`` uint8, a row for each 128 KiB of coded bytes; or None where a frame has matches, as those of
        levels 1 to 22 may, which only ``decode`` can follow.

    Raises:
        FormatError: the payload is corrupt.
        TypeError, ValueError: the payload is not as above.
    """
    return _C.seek_index(payload, verify)


def payload_info(payload: Tensor) -> dict[str, Any]:
    """Describes a payload from its header and chunk table; the chunks are not read.

    Returns:
        ``shape``, ``codec``, ``level`` (0: literals only), ``panel_rows``, ``slab_cols``, ``nbytes``, and ``chunks``:
        a list of dicts with ``row``, ``col``, ``shape``, ``encoding``, ``pairs``, ``low_bits``, ``width``
        (packed: bits of a code), ``offset``, ``nbytes``, ``frame_nbytes`` (the zstd frame, which starts at ``offset``)
        and ``exceptions``.

    Raises:
        FormatError: header or chunk table is corrupt, truncated or of another version.
    """
    check_type("payload_info: payload", payload, Tensor, "a uint8 Tensor")
    return _C.payload_info(payload)


def verify_payload(payload: Tensor) -> None:
    """Compares every stored byte with its checksum, without decoding.

    Raises:
        FormatError: the first difference found: chunk, expected and found.
    """
    check_type("verify_payload: payload", payload, Tensor, "a uint8 Tensor")
    _C.verify_payload(payload)


def entropy(qweight: Tensor) -> float:
    """Order-0 entropy of a tensor of int8 values, in bits per value: what no code of single values can beat.

    Args:
        qweight: int8, any shape, at least one element.

    Raises:
        TypeError: ``qweight`` is not int8.
    """
    check_type("entropy: qweight", qweight, Tensor, "an int8 Tensor")
    if qweight.dtype != torch.int8:
        raise TypeError(f"entropy: qweight: expected torch.int8, got {qweight.dtype}")
    counts = torch.bincount(qweight.reshape(-1).view(torch.uint8).int(), minlength=256).double()
    p = counts[counts > 0] / qweight.numel()
    return float(-(p * p.log2()).sum())
