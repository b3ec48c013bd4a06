"""NVIDIA's nvCOMP as a peer: batches of Zstandard frames and of ANS streams, by its C interface through ctypes.

The C interface only queues work on a stream, so that CUDA events time the decoding alone; the Python package allocates
and waits in each call. Signatures are those of nvCOMP 6, and another major version is refused.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from common import DEVICE, ROOT, synchronize
from torch import Tensor

MAJOR = 6
ALIGNMENT = 16  # of buffers: the most that zstd and ANS ask for
ANS_CHUNK_NBYTES = 64 << 10  # nvCOMP's own default
UNKNOWN_TYPE = 0xFF  # NVCOMP_TYPE_BITS: read from the stream
_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p


class UnavailableError(RuntimeError):
    """There is no nvCOMP that can be called; the message says why."""


class _Properties(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32)]


class _Options(ctypes.Structure):
    """64 bytes passed by value: of zstd the backend alone, of ANS backend (or type) and data type; zeros are defaults."""

    _fields_ = [
        ("backend", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("reserved", ctypes.c_char * 56),
    ]


def find_library() -> Path:
    """``DCEXT_NVCOMP``, the kit's, or that of an installed ``nvidia-libnvcomp`` package."""
    named = os.environ.get("DCEXT_NVCOMP")
    if named:
        return Path(named)
    kit = ROOT / "build/gpu-kit/nvcomp" / f"libnvcomp.so.{MAJOR}"
    if kit.is_file():
        return kit
    try:
        spec = importlib.util.find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:
        spec = None
    for folder in spec.submodule_search_locations or [] if spec else []:
        installed = Path(folder) / "lib64" / f"libnvcomp.so.{MAJOR}"
        if installed.is_file():
            return installed
    raise UnavailableError("no nvCOMP: neither DCEXT_NVCOMP, nor bench/gpu/kit.sh's, nor a package")


class Library:
    """The loaded library.

    Attributes:
        version: such as ``"6.0.0"``.
    """

    def __init__(self, path: Path) -> None:
        """Raises: UnavailableError: it cannot be loaded, or has another major version."""
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UnavailableError(f"nvCOMP: {error}") from None
        properties = _Properties()
        self.call("nvcompGetProperties", [_POINTER], ctypes.byref(properties))
        number = properties.version
        self.version = f"{number // 1000}.{number % 1000 // 100}.{number % 100}"
        if number // 1000 != MAJOR:
            raise UnavailableError(f"nvCOMP: expected version {MAJOR}, found {self.version}")

    def call(self, name: str, types: Sequence[type], *arguments: object) -> None:
        """Calls a function, whose status must be success."""
        function = getattr(self._library, name)
        function.restype, function.argtypes = ctypes.c_int, list(types)
        status = function(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: nvCOMP status {status}")

    def temporary(
        self, name: str, count: int, largest: int, options: _Options, total: int
    ) -> Tensor:
        """Room that a batch takes while it is worked on."""
        nbytes = _SIZE()
        types = [_SIZE, _SIZE, _Options, _POINTER, _SIZE, _POINTER]
        self.call(name, types, count, largest, options, ctypes.byref(nbytes), total, stream())
        return torch.empty(max(nbytes.value, ALIGNMENT), dtype=torch.uint8, device=DEVICE)


def stream() -> int:
    """The current CUDA stream as a pointer."""
    return torch.cuda.current_stream().cuda_stream


def starts(sizes: Sequence[int]) -> list[int]:
    """Where buffers of these sizes begin if they follow each other, aligned; last the size of all."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return offsets


class Buffers:
    """Buffers in one tensor.

    Attributes:
        memory: 1-D uint8 on the GPU.
        offsets: where each begins, in bytes.
        pointers: ``(n,)`` int64 on the GPU.
    """

    def __init__(self, memory: Tensor, offsets: Sequence[int]) -> None:
        self.memory = memory
        self.offsets = list(offsets)
        addresses = torch.tensor(self.offsets, dtype=torch.int64) + memory.data_ptr()
        self.pointers = addresses.to(DEVICE)


class Decompression:
    """A batch of streams and room for what they decode to."""

    def __init__(
        self,
        library: Library,
        algorithm: str,
        source: Buffers,
        source_sizes: Tensor,
        sizes: list[int],
    ) -> None:
        """Allocates.

        Args:
            library: of nvCOMP.
            algorithm: ``"Zstd"`` or ``"ANS"``.
            source: streams.
            source_sizes: their bytes, ``(n,)`` int64.
            sizes: bytes that each decodes to.
        """
        self.library, self.algorithm = library, algorithm
        self.source, self.source_sizes, self.sizes = source, source_sizes.to(DEVICE), sizes
        *offsets, total = starts(sizes)
        self.out = Buffers(torch.empty(total, dtype=torch.uint8, device=DEVICE), offsets)
        self.capacities = torch.tensor(sizes, dtype=torch.int64, device=DEVICE)
        self.found = torch.zeros_like(self.capacities)
        self.statuses = torch.full((len(sizes),), -1, dtype=torch.int32, device=DEVICE)
        self.options = _Options(data_type=UNKNOWN_TYPE if algorithm == "ANS" else 0)
        self.temporary = library.temporary(
            f"nvcompBatched{algorithm}DecompressGetTempSize",
            len(sizes),
            max(sizes),
            self.options,
            sum(sizes),
        )

    def run(self) -> None:
        """Queues the decoding of all on the current stream."""
        types = [_POINTER] * 4 + [_SIZE, _POINTER, _SIZE, _POINTER, _Options, _POINTER, _POINTER]
        self.library.call(
            f"nvcompBatched{self.algorithm}DecompressAsync",
            types,
            self.source.pointers.data_ptr(),
            self.source_sizes.data_ptr(),
            self.capacities.data_ptr(),
            self.found.data_ptr(),
            len(self.sizes),
            self.temporary.data_ptr(),
            self.temporary.numel(),
            self.out.pointers.data_ptr(),
            self.options,
            self.statuses.data_ptr(),
            stream(),
        )

    def results(self) -> list[Tensor]:
        """What the last run decoded, each 1-D uint8.

        Raises:
            RuntimeError: a stream could not be decoded, or not to its size.
        """
        if bool(self.statuses.any()) or not torch.equal(self.found, self.capacities):
            failed = int((self.statuses != 0).sum())
            raise RuntimeError(
                f"nvCOMP {self.algorithm}: {failed} of {len(self.sizes)} streams failed"
            )
        memory, offsets = self.out.memory, self.out.offsets
        return [memory[at : at + size] for at, size in zip(offsets, self.sizes, strict=True)]


def compress_ans(library: Library, content: Tensor) -> tuple[Buffers, Tensor, list[int]]:
    """ANS streams of pieces of ``ANS_CHUNK_NBYTES``.

    Args:
        library: of nvCOMP.
        content: 1-D uint8 on the GPU, aligned.

    Returns:
        Streams, their bytes, and the bytes that each decodes to.
    """
    pieces = content.split(ANS_CHUNK_NBYTES)
    sizes = [piece.numel() for piece in pieces]
    options = _Options()
    largest = _SIZE()
    name = "nvcompBatchedANSCompress"
    types: list[type] = [_SIZE, _Options, _POINTER]
    library.call(f"{name}GetMaxOutputChunkSize", types, max(sizes), options, ctypes.byref(largest))
    stride = starts([largest.value])[-1]
    room = torch.empty(stride * len(sizes), dtype=torch.uint8, device=DEVICE)
    out = Buffers(room, [stride * i for i in range(len(sizes))])
    source = Buffers(content, [ANS_CHUNK_NBYTES * i for i in range(len(sizes))])
    temporary = library.temporary(
        f"{name}GetTempSize", len(sizes), max(sizes), options, content.numel()
    )
    device_sizes = torch.tensor(sizes, dtype=torch.int64, device=DEVICE)
    found = torch.zeros_like(device_sizes)
    statuses = torch.full((len(sizes),), -1, dtype=torch.int32, device=DEVICE)
    types = [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE]
    types += [_POINTER, _POINTER, _Options, _POINTER, _POINTER]
    library.call(
        f"{name}Async",
        types,
        source.pointers.data_ptr(),
        device_sizes.data_ptr(),
        max(sizes),
        len(sizes),
        temporary.data_ptr(),
        temporary.numel(),
        out.pointers.data_ptr(),
        found.data_ptr(),
        options,
        statuses.data_ptr(),
        stream(),
    )
    synchronize()
    if bool(statuses.any()):
        raise RuntimeError("nvCOMP ANS: pieces could not be compressed")
    return out, found, sizes
