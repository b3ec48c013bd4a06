"""How fast are weights decoded and encoded, and how small are they, against peers on the same matrices?

Every row decodes (or encodes) whole matrices of int8 weights; G/s are decoded bytes. The first row of each case is
libzstd itself, one shot on one frame of the whole matrix, one thread: the ratio that others are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import blosc2
import pytest
import torch
import zipnn
import zstandard
from conftest import SMOKE, Timer, gaussian
from libzstd import compress_literals_only, decompress_into

import dcext

SIGMAS = [3.0] if SMOKE else [1.0, 1.5, 3.0, 6.0, 20.0, 35.0]
ROWS, COLS = (128, 512) if SMOKE else (4096, 4096)
COUNT = 2 if SMOKE else 8  # matrices in rotation: 128 MiB
FRAME = 256 * 1024  # chunk of the peers that cut their input


class Data:
    """The matrices of one distribution, and a place to decode to."""

    def __init__(self, sigma: float) -> None:
        self.case = f"sigma {sigma:g}"
        self.matrices = [gaussian(ROWS, COLS, sigma, seed) for seed in range(COUNT)]
        self.blobs = [matrix.numpy().tobytes() for matrix in self.matrices]
        self.entropy = sum(dcext.entropy(matrix) for matrix in self.matrices) / COUNT
        self.case += f", entropy {self.entropy:.3f} bits"
        self.out = torch.empty_like(self.matrices[0])
        self.nbytes = ROWS * COLS

    def bits(self, coded: list[Any]) -> float:
        return 8 * sum(len(item) for item in coded) / (COUNT * self.nbytes)


@pytest.fixture(scope="module", params=SIGMAS, ids=lambda sigma: f"sigma{sigma:g}")
def data(request: pytest.FixtureRequest) -> Data:
    return Data(request.param)


def check(data: Data, decoders: list[Callable[[], Any]]) -> None:
    """Every decoder restores its matrix, to `data.out` or as bytes."""
    for matrix, blob, decode in zip(data.matrices, data.blobs, decoders, strict=True):
        data.out.zero_()
        result = decode()
        assert (
            bytes(result) == blob
            if isinstance(result, (bytes, bytearray))
            else torch.equal(data.out, matrix)
        )


def test_decode_libzstd_one_shot(data: Data, timer: Timer) -> None:
    frames = [compress_literals_only(blob) for blob in data.blobs]
    address = data.out.data_ptr()
    decoders = [lambda f=f: decompress_into(f, address, data.nbytes) for f in frames]
    check(data, decoders)
    timer.run(
        "decode",
        data.case,
        "libzstd, literals only, one shot",
        decoders,
        data.nbytes,
        bits=data.bits(frames),
    )


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_decode_dcext(data: Data, timer: Timer, threads: int, verify: bool) -> None:
    payloads = [dcext.encode(matrix) for matrix in data.matrices]
    decoders = [
        lambda p=p: dcext.decode(p, num_threads=threads, out=data.out, verify=verify)
        for p in payloads
    ]
    check(data, decoders)
    row = f"dcext, {threads} threads" + ("" if verify else ", checksums not verified")
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=data.bits(payloads))


def test_decode_zstandard_level_3(data: Data, timer: Timer, threads: int) -> None:
    compressor = zstandard.ZstdCompressor(level=3)
    cut = [[blob[i : i + FRAME] for i in range(0, len(blob), FRAME)] for blob in data.blobs]
    frames = [[compressor.compress(part) for part in parts] for parts in cut]
    sizes = [b"".join(len(p).to_bytes(8, "little") for p in parts) for parts in cut]
    decompressor = zstandard.ZstdDecompressor()

    def decode(i: int) -> Any:
        return decompressor.multi_decompress_to_buffer(
            frames[i], decompressed_sizes=sizes[i], threads=threads
        )

    for i, blob in enumerate(data.blobs):
        assert b"".join(bytes(part) for part in decode(i)) == blob
    bits = data.bits([b"".join(parts) for parts in frames])
    row = f"zstandard, level 3, multi_decompress, {threads} threads"
    timer.run(
        "decode",
        data.case,
        row,
        [lambda i=i: decode(i) for i in range(COUNT)],
        data.nbytes,
        bits=bits,
    )


@pytest.mark.parametrize("codec", ["ZSTD", "LZ4"])
def test_decode_blosc2(data: Data, timer: Timer, threads: int, codec: str) -> None:
    blosc2.set_nthreads(threads)
    parameters = {"codec": getattr(blosc2.Codec, codec), "typesize": 1, "nthreads": threads}
    coded = [blosc2.compress2(blob, **parameters) for blob in data.blobs]
    out = bytearray(data.nbytes)

    def decode(i: int) -> bytearray:
        blosc2.decompress2(coded[i], dst=out, nthreads=threads)
        return out

    decoders = [lambda i=i: decode(i) for i in range(COUNT)]
    check(data, decoders)
    row = f"blosc2, {codec.lower()}, {threads} threads"
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=data.bits(coded))


def test_decode_zipnn(data: Data, timer: Timer, threads: int) -> None:
    # It has no int8 mode; as float32 it codes each fourth byte together, its best here. It changes its input.
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype="float32", threads=threads)
    coded = [coder.compress(bytearray(blob)) for blob in data.blobs]
    decoders = [lambda c=c: coder.decompress(c) for c in coded]
    check(data, decoders)
    timer.run(
        "decode",
        data.case,
        f"zipnn, {threads} threads",
        decoders,
        data.nbytes,
        bits=data.bits(coded),
    )


def test_decode_memcpy(data: Data, timer: Timer) -> None:
    decoders = [lambda m=m: data.out.copy_(m) for m in data.matrices]
    check(data, decoders)
    timer.run("decode", data.case, "memcpy", decoders, data.nbytes, bits=8.0)


def test_encode_libzstd_one_shot(data: Data, timer: Timer) -> None:
    coders = [lambda b=b: compress_literals_only(b) for b in data.blobs]
    timer.run("encode", data.case, "libzstd, literals only, one shot", coders, data.nbytes)


def test_encode_dcext(data: Data, timer: Timer, threads: int) -> None:
    coders = [lambda m=m: dcext.encode(m) for m in data.matrices]
    timer.run("encode", data.case, f"dcext, {threads} threads", coders, data.nbytes)


def test_encode_zstandard_level_3(data: Data, timer: Timer) -> None:
    compressor = zstandard.ZstdCompressor(level=3)
    coders = [lambda b=b: compressor.compress(b) for b in data.blobs]
    timer.run("encode", data.case, "zstandard, level 3, 1 thread", coders, data.nbytes)
