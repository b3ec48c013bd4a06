"""What a disk gives: reads beside the page cache, as many and as large as dcext's own. Standard library only."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

READ_NBYTES = 2 << 20
HUGE_PAGE_NBYTES = 2 << 20
READERS = 4  # csrc/runtime/read_threads.h: kReadThreads


def files_in(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    return sorted(folder.glob("*.safetensors"))


def evict(paths: Sequence[Path]) -> None:
    """Lets the page cache forget files, so that whoever reads them next pays for it, in time and in memory."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def bytes_per_s(paths: Sequence[Path], seconds: float) -> float | None:
    """Bytes per second of ``READERS`` threads that read files over and over, ``READ_NBYTES`` at a time, with O_DIRECT.

    Args:
        paths: not empty files.
        seconds: how long; reads under way then are waited for, and counted.

    Returns:
        None where the file system has no such reads.
    """
    with ExitStack() as stack:
        files = []
        try:
            for path in paths:
                files.append(os.open(path, os.O_RDONLY | os.O_DIRECT))
                stack.callback(os.close, files[-1])
        except OSError:
            return None
        reads = _Shared(_places(files))
        done = [0] * READERS
        memory = huge_pages(READERS * READ_NBYTES)
        buffers = [memory[i * READ_NBYTES :][:READ_NBYTES] for i in range(READERS)]
        begin = time.perf_counter()
        readers = [
            threading.Thread(target=_read, args=(reads, buffers[i], begin + seconds, done, i))
            for i in range(READERS)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return sum(done) / (time.perf_counter() - begin) or None


def huge_pages(nbytes: int) -> memoryview:
    """Memory that starts at a huge page, and consists of them where the system gives any.

    A disk that fills 4 KiB pages was seen at 1.1 GB/s, and at 3.1 GB/s with these.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory, the default, has none
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_NBYTES, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    skipped = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_NBYTES
    aligned = memoryview(memory)[skipped : skipped + nbytes]
    aligned[::4096] = bytes(len(aligned[::4096]))  # has them all made
    return aligned


def storage_nbytes() -> int:
    """Bytes that this process has had read from storage so far: proc(5)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _places(files: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Descriptors and offsets, without end."""
    for file in cycle(files):
        for offset in range(0, os.fstat(file).st_size, READ_NBYTES):
            yield file, offset


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator[tuple[int, int]]) -> None:
        self.items = items
        self.lock = threading.Lock()

    def take(self) -> tuple[int, int]:
        with self.lock:
            return next(self.items)


def _read(reads: _Shared, buffer: memoryview, end: float, done: list[int], index: int) -> None:
    try:
        while time.perf_counter() < end:
            file, offset = reads.take()
            done[index] += os.preadv(file, [buffer], offset)
    except OSError:  # no such reads here: nothing is counted
        done[index] = 0
