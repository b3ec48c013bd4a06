"""Streaming without overlap, to compare with: a layer's weights are read when it is called, and it waits for them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dcext
from dcext.nn.compressed import CompressedModule
from dcext.weights.host_stream import Origin
from whole.disk import READ_NBYTES, READERS, huge_pages

PAGE = mmap.PAGESIZE


class SynchronousReader:
    """Reads payloads as ``disk.bytes_per_s`` does, into one buffer, and counts their bytes."""

    def __init__(self, largest_nbytes: int) -> None:
        """Args: largest_nbytes: of a payload."""
        self.memory = huge_pages(largest_nbytes + 2 * PAGE)
        self.files: dict[str, int] = {}
        self.threads = ThreadPoolExecutor(READERS)
        self.nbytes = 0

    def read(self, origin: Origin) -> Tensor:
        """A payload, not verified; the next call overwrites it."""
        info = origin.reader.info(origin.name)
        path = str(origin.reader.directory / info.file)
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
        begin = info.offset // PAGE * PAGE
        end = -(-(info.offset + info.nbytes) // PAGE) * PAGE
        places = range(begin, end, READ_NBYTES)
        read = partial(self._read, self.files[path], begin)
        done = sum(self.threads.map(read, places, [min(p + READ_NBYTES, end) for p in places]))
        if done < info.offset + info.nbytes - begin:
            raise OSError(f"{path}: expected {info.nbytes} bytes at {info.offset}, got fewer")
        self.nbytes += info.nbytes
        return torch.frombuffer(
            self.memory, dtype=torch.uint8, offset=info.offset - begin, count=info.nbytes
        )

    def _read(self, file: int, origin: int, begin: int, end: int) -> int:
        return os.preadv(file, [self.memory[begin - origin : end - origin]], begin)


def make_synchronous(model: Any) -> Callable[[], dict[str, Any]]:
    """Makes the streamed layers of a model read their weights themselves; returns what counts their bytes."""
    layers = [
        m for m in model.modules() if isinstance(m, dcext.DCLinear) and m.is_in_file and m.origin
    ]
    reader = SynchronousReader(max(layer.payload.nbytes for layer in layers))
    for layer in layers:
        layer.register_forward_pre_hook(partial(_fetch, reader))
        layer.register_forward_hook(partial(_leave, layer.payload, layer.backing))
    return lambda: {"used_nbytes": reader.nbytes}


def _fetch(reader: SynchronousReader, layer: CompressedModule, _inputs: Any) -> None:
    if layer.origin is not None:
        layer.set_payload(reader.read(layer.origin))


def _leave(view: Tensor, weight: Any, layer: nn.Module, _inputs: Any, _output: Any) -> None:
    layer.stream_from(view, weight)
