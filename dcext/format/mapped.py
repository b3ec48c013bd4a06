"""Tensors of safetensors files as views of mapped memory: pages that the system may drop and read again."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from dcext.errors import FormatError
from dcext.format.safetensors_header import TensorInfo, metadata_of, parse_header


def map_file(path: Path) -> memoryview:
    """A file, mapped read-only; it stays mapped while the view or anything taken from it lives."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def tensor_view(data: memoryview, info: TensorInfo) -> Tensor:
    """A tensor of a mapped file: no copy, read-only (writing to it is undefined).

    One that does not lie at a multiple of its element size, as only other writers' do, is copied.
    """
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(data[info.offset : info.offset + info.nbytes], dtype=torch.uint8)
    if info.offset % info.dtype.itemsize != 0:
        flat = flat.clone()
    return flat.view(info.dtype).reshape(info.shape)


class SafetensorsFile:
    """A whole safetensors file, mapped; its header is checked, its data are not."""

    def __init__(self, path: Path) -> None:
        """Opens it.

        Raises:
            FormatError: the header is damaged or disagrees with the size of the file.
            OSError: the file cannot be opened.
        """
        self._data = map_file(path)
        self._infos = parse_header(path.name, self._data)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._infos)

    def get(self, name: str) -> Tensor:
        """A tensor, as ``tensor_view`` gives it.

        Raises:
            KeyError: no such tensor.
        """
        return tensor_view(self._data, self._infos[name])

    def metadata(self, key: str) -> str:
        """A string from the header's metadata.

        Raises:
            FormatError: there is none of that name.
        """
        metadata = metadata_of(self._data)
        if key not in metadata:
            raise FormatError(f"metadata: expected {key!r}, found {sorted(metadata)}")
        return metadata[key]
