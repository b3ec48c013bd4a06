"""How fast are weights decoded and encoded, and how small are they, against peers on the same matrices?

Every row decodes (or encodes) whole matrices of int8 weights; G/s are decoded bytes. The first row of each case is
libzstd itself, one shot on one frame of the whole matrix, one weight per byte, one thread: the ratio that others are
given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import blosc2
import pytest
import torch
import zipnn
import zstandard
from libzstd import checked, compress_literals_only, decompress_into, library

import dcext
from conftest import SMOKE, Figure, Tables, Timer, count_threads, gaussian, speed_ratio
from dcext.codec import seek_index

SIGMAS = [3.0] if SMOKE else [1.0, 1.5, 3.0, 6.0, 20.0, 35.0]  # 35: as INT8 per row has
ROWS, COLS = (128, 512) if SMOKE else (4096, 4096)
COUNT = 2 if SMOKE else 8  # matrices in rotation: 128 MiB
FRAME = 256 * 1024  # chunk of the peers that cut their input
CASE_FIXTURES = ("data",)

LIBZSTD = "libzstd, literals only, one shot, 1 thread"
FRAMES = "libzstd, frames of our payload, filters not undone"
INDEX = "dcext, seek index alone, "


class Data:
    """The matrices of one distribution, and a place to decode to."""

    def __init__(self, sigma: float) -> None:
        self.matrices = [gaussian(ROWS, COLS, sigma, seed) for seed in range(COUNT)]
        self.blobs = [matrix.numpy().tobytes() for matrix in self.matrices]
        entropy = sum(dcext.entropy(matrix) for matrix in self.matrices) / COUNT
        self.case = f"sigma {sigma:g}, entropy {entropy:.3f} bits"
        self.out = torch.empty_like(self.matrices[0])
        self.nbytes = ROWS * COLS

    def bits(self, coded: list[Any]) -> float:
        return 8 * sum(len(item) for item in coded) / (COUNT * self.nbytes)


@pytest.fixture(scope="module", params=SIGMAS, ids=lambda sigma: f"sigma{sigma:g}")
def data(request: pytest.FixtureRequest) -> Data:
    return Data(request.param)


def check(data: Data, decoders: list[Callable[[], Any]]) -> None:
    """Every decoder restores its matrix, as bytes or to `data.out`."""
    for matrix, blob, decode in zip(data.matrices, data.blobs, decoders, strict=True):
        data.out.zero_()
        result = decode()
        if isinstance(result, (bytes, bytearray)):
            assert bytes(result) == blob
        else:
            assert torch.equal(data.out, matrix)


def cut(blob: bytes) -> list[bytes]:
    return [blob[i : i + FRAME] for i in range(0, len(blob), FRAME)]


def test_decode_libzstd_one_shot(data: Data, timer: Timer) -> None:
    frames = [compress_literals_only(blob) for blob in data.blobs]
    address = data.out.data_ptr()
    decoders = [lambda f=f: decompress_into(f, address, data.nbytes) for f in frames]
    check(data, decoders)
    timer.run("decode", data.case, LIBZSTD, decoders, data.nbytes, bits=data.bits(frames))


class Frames:
    """The zstd frames of a payload, for libzstd with one context: what entropy decoding alone takes."""

    def __init__(self, payload: torch.Tensor, out: torch.Tensor, context: int) -> None:
        self.payload, self.context, self.address = payload, context, out.data_ptr()
        self.spans: list[tuple[int, int, int]] = []  # source, its bytes, decoded bytes
        for chunk in dcext.payload_info(payload)["chunks"]:
            weights = chunk["shape"][0] * chunk["shape"][1]
            decoded = -(-weights // 128) * 64 if chunk["pairs"] else weights
            if chunk["frame_nbytes"]:
                source = payload.data_ptr() + chunk["offset"]
                self.spans.append((source, chunk["frame_nbytes"], decoded))

    def decode(self) -> int:
        decompress, target = library().ZSTD_decompressDCtx, self.address
        for source, nbytes, decoded in self.spans:
            assert checked(decompress(self.context, target, decoded, source, nbytes)) == decoded
            target += decoded
        return target - self.address

    def check(self) -> None:
        """The frames hold what the stock decoder finds in them."""
        found = ctypes.string_at(self.address, self.decode())
        stock = zstandard.ZstdDecompressor()
        frames = (ctypes.string_at(source, nbytes) for source, nbytes, _ in self.spans)
        assert found == b"".join(stock.decompress(frame) for frame in frames)


def test_decode_libzstd_frames(data: Data, timer: Timer) -> None:
    zstd, pointer, size = library(), ctypes.c_void_p, ctypes.c_size_t
    zstd.ZSTD_createDCtx.restype = pointer
    zstd.ZSTD_freeDCtx.argtypes = [pointer]
    zstd.ZSTD_decompressDCtx.restype = size
    zstd.ZSTD_decompressDCtx.argtypes = [pointer, pointer, size, pointer, size]
    context = zstd.ZSTD_createDCtx()
    try:
        payloads = [Frames(dcext.encode(m), data.out, context) for m in data.matrices]
        for payload in payloads:
            payload.check()
        bits = data.bits([range(n) for p in payloads for _, n, _ in p.spans])
        decoders = [payload.decode for payload in payloads]
        timer.run("decode", data.case, FRAMES, decoders, data.nbytes, bits=bits)
    finally:
        zstd.ZSTD_freeDCtx(context)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_decode_dcext(data: Data, timer: Timer, threads: int, verify: bool) -> None:
    payloads = [dcext.encode(matrix) for matrix in data.matrices]
    decoders = [
        lambda p=p: dcext.decode(p, num_threads=threads, out=data.out, verify=verify)
        for p in payloads
    ]
    check(data, decoders)
    row = f"dcext, {count_threads(threads)}" + ("" if verify else ", checksums not verified")
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=data.bits(payloads))


def test_seek_index(data: Data, timer: Timer, threads: int) -> None:
    """What loading costs a GPU's decoder beforehand; nothing is decoded."""
    payloads = [dcext.encode(matrix) for matrix in data.matrices]
    failures = torch.zeros(1, dtype=torch.int32)
    before = dcext.get_num_threads()
    dcext.set_num_threads(threads)
    try:
        for payload, matrix in zip(payloads, data.matrices, strict=True):
            torch.ops.dcext.decode_indexed_(
                [payload], [seek_index(payload)], [data.out.fill_(0)], failures
            )
            assert torch.equal(data.out, matrix)
        assert failures.item() == 0
        indexers = [lambda p=p: seek_index(p, verify=False) for p in payloads]
        row = INDEX + count_threads(threads)
        timer.run("decode", data.case, row, indexers, data.nbytes, bits=data.bits(payloads))
    finally:
        dcext.set_num_threads(before)


def test_decode_zstandard_level_3(data: Data, timer: Timer, threads: int) -> None:
    compressor = zstandard.ZstdCompressor(level=3)
    parts = [cut(blob) for blob in data.blobs]
    frames = [[compressor.compress(part) for part in p] for p in parts]
    sizes = [b"".join(len(part).to_bytes(8, "little") for part in p) for p in parts]
    decompressor = zstandard.ZstdDecompressor()

    def decode(i: int) -> Any:
        return decompressor.multi_decompress_to_buffer(
            frames[i], decompressed_sizes=sizes[i], threads=threads
        )

    for i, blob in enumerate(data.blobs):
        assert b"".join(bytes(part) for part in decode(i)) == blob
    row = f"zstandard, level 3, multi_decompress, {count_threads(threads)}"
    decoders = [lambda i=i: decode(i) for i in range(COUNT)]
    bits = data.bits([b"".join(f) for f in frames])
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=bits)


@pytest.mark.parametrize("codec", ["ZSTD", "LZ4"])
def test_decode_blosc2(data: Data, timer: Timer, threads: int, codec: str) -> None:
    parameters = blosc2_parameters(codec, threads)
    coded = [blosc2.compress2(blob, **parameters) for blob in data.blobs]
    out = bytearray(data.nbytes)

    def decode(i: int) -> bytearray:
        blosc2.decompress2(coded[i], dst=out, nthreads=threads)
        return out

    decoders = [lambda i=i: decode(i) for i in range(COUNT)]
    check(data, decoders)
    row = f"blosc2, {codec.lower()}, {count_threads(threads)}"
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=data.bits(coded))


def blosc2_parameters(codec: str, threads: int) -> dict[str, Any]:
    blosc2.set_nthreads(threads)
    return {"codec": getattr(blosc2.Codec, codec), "typesize": 1, "nthreads": threads}


def zipnn_coder(threads: int) -> zipnn.ZipNN:
    """It has no int8 mode; as 8-bit floats it codes each byte, its smallest and fastest here."""
    return zipnn.ZipNN(input_format="byte", bytearray_dtype="float8_e4m3fn", threads=threads)


def test_decode_zipnn(data: Data, timer: Timer, threads: int) -> None:
    coder = zipnn_coder(threads)
    coded = [coder.compress(bytearray(blob)) for blob in data.blobs]
    decoders = [lambda c=c: coder.decompress(c) for c in coded]
    check(data, decoders)
    row = f"zipnn, {count_threads(threads)}"
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=data.bits(coded))


def test_decode_memcpy(data: Data, timer: Timer, threads: int) -> None:
    decoders = [lambda m=m: data.out.copy_(m) for m in data.matrices]
    check(data, decoders)
    row = f"memcpy, {count_threads(threads)}"
    timer.run("decode", data.case, row, decoders, data.nbytes, bits=8.0)


def time_encode(data: Data, timer: Timer, row: str, encode: Any, decode: Any) -> None:
    """`encode` takes a matrix's index, `decode` what it made of it and gives bytes."""
    coded = [encode(i) for i in range(COUNT)]
    check(data, [lambda c=c: decode(c) for c in coded])
    coders = [lambda i=i: encode(i) for i in range(COUNT)]
    bits = data.bits(coded)
    timer.run("encode", data.case, row, coders, data.nbytes, rounds=COUNT, bits=bits)


def test_encode_libzstd_one_shot(data: Data, timer: Timer) -> None:
    def encode(i: int) -> bytes:
        return compress_literals_only(data.blobs[i])

    def decode(frame: bytes) -> None:
        decompress_into(frame, data.out.data_ptr(), data.nbytes)

    time_encode(data, timer, LIBZSTD, encode, decode)


def test_encode_dcext(data: Data, timer: Timer, threads: int) -> None:
    row = f"dcext, {count_threads(threads)}"
    time_encode(
        data,
        timer,
        row,
        lambda i: dcext.encode(data.matrices[i]),
        lambda payload: dcext.decode(payload, out=data.out),
    )


def test_encode_zstandard_level_3(data: Data, timer: Timer, threads: int) -> None:
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    parts = [cut(blob) for blob in data.blobs]

    def encode(i: int) -> Any:
        return compressor.multi_compress_to_buffer(parts[i], threads=threads)

    coded = [encode(i) for i in range(COUNT)]
    for frames, blob in zip(coded, data.blobs, strict=True):
        assert b"".join(decompressor.decompress(bytes(frame)) for frame in frames) == blob
    bits = data.bits([range(frames.size()) for frames in coded])
    row = f"zstandard, level 3, multi_compress, {count_threads(threads)}"
    coders = [lambda i=i: encode(i) for i in range(COUNT)]
    timer.run("encode", data.case, row, coders, data.nbytes, rounds=COUNT, bits=bits)


@pytest.mark.parametrize("codec", ["ZSTD", "LZ4"])
def test_encode_blosc2(data: Data, timer: Timer, threads: int, codec: str) -> None:
    parameters = blosc2_parameters(codec, threads)
    row = f"blosc2, {codec.lower()}, {count_threads(threads)}"
    time_encode(
        data,
        timer,
        row,
        lambda i: blosc2.compress2(data.blobs[i], **parameters),
        blosc2.decompress2,
    )


def test_encode_zipnn(data: Data, timer: Timer, threads: int) -> None:
    coder = zipnn_coder(threads)
    row = f"zipnn, {count_threads(threads)}, with a copy (it changes its input)"
    time_encode(
        data,
        timer,
        row,
        lambda i: coder.compress(bytearray(data.blobs[i])),
        coder.decompress,
    )


def figures(tables: Tables) -> list[Figure]:
    """The ratios that the project promises."""
    result: list[Figure] = []
    one, two = "dcext, 1 thread", "dcext, 2 threads"
    unverified = ", checksums not verified"
    level_3 = "zstandard, level 3, multi_decompress, 1 thread"
    for case, rows in tables.get("decode", {}).items():
        least = 1.5 if case.startswith(("sigma 1,", "sigma 1.5,")) else 0.95
        for what, row, baseline, wanted in [
            ("one thread / libzstd one shot", one, LIBZSTD, least),
            ("the same, checksums not verified", one + unverified, LIBZSTD, 0.0),
            ("one thread / libzstd, frames alone", one, FRAMES, 0.0),
            ("one thread / zstandard level 3", one, level_3, 2.5 * case.startswith("sigma 3,")),
            ("two threads / one", two, one, 1.8),
            ("seek index / decoding, one thread", INDEX + "1 thread", one + unverified, 0.5),
            ("seek index / decoding, two threads", INDEX + "2 threads", two + unverified, 0.5),
            ("the same, checksums not verified", two + unverified, one + unverified, 0.0),
        ]:
            ratio = speed_ratio(rows, row, baseline)
            if ratio is not None:
                result.append((what, case, ratio, wanted))
    return result
