"""libzstd called directly: the sources that the extension embeds, built as a shared library, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import fetch

LITERAL_COMPRESSION_MODE = 1002  # ZSTD_c_literalCompressionMode = ZSTD_c_experimentalParam5
COMPRESSION_LEVEL = 100  # ZSTD_c_compressionLevel
ENABLE = 1  # ZSTD_ps_enable


@functools.cache
def library() -> ctypes.CDLL:
    """Builds (once per version of the sources) and loads the library."""
    sources = fetch.zstd_lib_dir()
    target = fetch.cache_dir() / "libzstd-1.5.7-bench.so"
    if not target.exists():
        files = [
            str(f)
            for part in ("common", "compress", "decompress")
            for f in sorted((sources / part).glob("*.[cS]"))
        ]
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / "libzstd.so"
            command = [
                "cc",
                "-O3",
                "-shared",
                "-fPIC",
                "-w",
                "-DZSTD_LEGACY_SUPPORT=0",
                *files,
                "-o",
                str(built),
            ]
            subprocess.run(command, check=True)
            os.rename(built, target)
    zstd = ctypes.CDLL(str(target))
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in [
        ("ZSTD_minCLevel", ctypes.c_int, []),
        ("ZSTD_compressBound", size, [size]),
        ("ZSTD_isError", ctypes.c_uint, [size]),
        ("ZSTD_createCCtx", pointer, []),
        ("ZSTD_freeCCtx", size, [pointer]),
        ("ZSTD_CCtx_setParameter", size, [pointer, ctypes.c_int, ctypes.c_int]),
        ("ZSTD_compress2", size, [pointer, pointer, size, ctypes.c_char_p, size]),
        ("ZSTD_decompress", size, [pointer, size, ctypes.c_char_p, size]),
    ]:
        function = getattr(zstd, name)
        function.restype, function.argtypes = result, arguments
    return zstd


def compress_literals_only(data: bytes) -> bytes:
    """One frame of Huffman-coded literals, without a search for matches."""
    zstd = library()
    context = zstd.ZSTD_createCCtx()
    try:
        zstd.ZSTD_CCtx_setParameter(context, COMPRESSION_LEVEL, zstd.ZSTD_minCLevel())
        checked(zstd.ZSTD_CCtx_setParameter(context, LITERAL_COMPRESSION_MODE, ENABLE))
        out = ctypes.create_string_buffer(zstd.ZSTD_compressBound(len(data)))
        size = checked(
            zstd.ZSTD_compress2(context, ctypes.addressof(out), len(out), data, len(data))
        )
        return out.raw[:size]
    finally:
        zstd.ZSTD_freeCCtx(context)


def decompress_into(frame: bytes, address: int, nbytes: int) -> None:
    """Decodes one frame to memory at `address`, in one shot."""
    found = checked(library().ZSTD_decompress(address, nbytes, frame, len(frame)))
    if found != nbytes:
        raise RuntimeError(f"expected {nbytes} bytes, found {found}")


def checked(code: int) -> int:
    """A libzstd result, or an exception."""
    if library().ZSTD_isError(code):
        raise RuntimeError(f"libzstd: error {code}")
    return code
