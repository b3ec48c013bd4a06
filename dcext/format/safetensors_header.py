"""The header of a safetensors file, written byte for byte and read without trust."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcext.errors import FormatError
from dcext.format.manifest import MAX_SIZE, is_size, parse_json_object, shorten

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ALIGNMENT = 64
METADATA_KEY = "__metadata__"
MAX_DIMENSIONS = 64  # of a torch tensor that operators accept
MAX_HEADER_NBYTES = 100_000_000  # the bound of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` and ``nbytes`` in ``file``."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def dump_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds ``tensors`` in this order; its size is a multiple of 64."""
    entries: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def header_nbytes(file: str, data: memoryview) -> int:
    """Size of length and header together, checked against the file.

    Raises:
        FormatError: the file is too short for what it states.
    """
    if len(data) < 8:
        raise FormatError(f"{file}: header: expected at least 8 bytes, found {len(data)}")
    (length,) = struct.unpack("<Q", data[:8])
    most = min(MAX_HEADER_NBYTES, len(data) - 8)
    if length > most:
        raise FormatError(f"{file}: header length: expected at most {most}, found {length}")
    return 8 + length


def parse_header(file: str, data: memoryview) -> dict[str, TensorInfo]:
    """Reads where the tensors of a file lie. Nothing is allocated by stated sizes.

    Raises:
        FormatError: not JSON, unknown dtype, sizes that disagree with shape, offsets with holes or out of bounds.
    """
    begin = header_nbytes(file, data)
    entries = parse_json_object(bytes(data[8:begin]), f"{file}: header")
    metadata: Any = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{file}: metadata: expected strings, found {shorten(metadata)}")
    infos = {name: _parse_entry(file, name, entry, begin) for name, entry in entries.items()}
    end = begin
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise FormatError(
                f"{file}: tensor {shorten(name)}: expected data at byte {end}, found {info.offset}"
            )
        end += info.nbytes
    if end != len(data):
        raise FormatError(f"{file}: expected {end} bytes, found {len(data)}")
    return infos


def metadata_of(data: memoryview) -> dict[str, str]:
    """The metadata of a file whose header ``parse_header`` accepted."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(bytes(data[8 : 8 + length])).get(METADATA_KEY, {})


def _parse_entry(file: str, name: str, entry: Any, begin: int) -> TensorInfo:
    place = f"{file}: tensor {shorten(name)}"
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(
            f"{place}: dtype: expected one of {', '.join(DTYPES)}, found {shorten(dtype)}"
        )
    if not _are_sizes(shape, MAX_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise FormatError(
            f"{place}: expected shape and data_offsets, found {shorten(shape)} and {shorten(offsets)}"
        )
    nbytes = span = DTYPES[dtype].itemsize
    for size in shape:
        nbytes *= size
        span *= max(size, 1)  # strides are computed from the other sizes where one is zero
    if span > MAX_SIZE:
        raise FormatError(
            f"{place}: expected at most {MAX_SIZE} bytes, found more for shape {shorten(shape)}"
        )
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            f"{place}: expected {nbytes} bytes for shape {shorten(shape)}, "
            f"found {offsets[1] - offsets[0]}"
        )
    return TensorInfo(file, DTYPES[dtype], tuple(shape), begin + offsets[0], nbytes)


def _are_sizes(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(is_size(item) for item in value)


def data_ptr_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. The tensor must outlive it."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
