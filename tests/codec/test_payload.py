"""The payload format: golden bytes, round trips, and refusal of everything that was not written."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import dcext
from matrices import gaussian

SHAPES = [(1, 1), (1, 127), (3, 128), (5, 129), (64, 96), (300, 257), (1000, 640)]
SIGMAS = [0.3, 1.0, 3.0, 6.0, 20.0, 60.0]


def golden_payload() -> bytes:
    """A raw payload of [[-128, 1, 2], [3, 4, 127]], built from PAYLOAD.md alone."""
    tile = struct.pack("6b", -128, 1, 2, 3, 4, 127).ljust(64, b"\0")
    entry = (
        struct.pack("<QII", 128, 6, 0)
        + bytes(8)
        + struct.pack("<Q", xxhash.xxh3_64_intdigest(tile))
    )
    table = entry.ljust(64, b"\0")
    head = b"DCEXTPL\n" + struct.pack("<HBBhHQQIIQII", 1, 0, 0, 0, 0, 2, 3, 2, 3, 192, 1, 0)
    parts = struct.pack("<QQ", xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(table))
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(parts)) + table + tile


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_golden_bytes():
    qweight = torch.tensor([[-128, 1, 2], [3, 4, 127]], dtype=torch.int8)
    payload = dcext.encode(qweight, codec="raw")
    assert payload.numpy().tobytes() == golden_payload()
    assert torch.equal(dcext.decode(as_tensor(golden_payload())), qweight)


def test_golden_zstd_bytes():
    """The whole of a zstd payload is pinned: a change of encoder or filter is a change of format."""
    payload = dcext.encode(
        (torch.arange(96 * 40) % 7 - 3).reshape(96, 40).to(torch.int8), codec="zstd"
    )
    assert xxhash.xxh3_64_hexdigest(payload.numpy().tobytes()) == "64a0eaa14cf7a8b0"


@pytest.mark.parametrize("codec", ["auto", "raw", "zstd", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, codec):
    for sigma in SIGMAS:
        qweight = gaussian(*shape, sigma)
        original = qweight.clone()
        payload = dcext.encode(qweight, codec=codec)
        assert torch.equal(dcext.decode(payload), qweight)
        assert torch.equal(qweight, original)
        assert torch.equal(payload, dcext.encode(qweight, codec=codec))


@pytest.mark.parametrize("level", [1, 3, 19, 22])
def test_round_trip_levels(level):
    qweight = torch.randint(0, 4, (64, 32), dtype=torch.int8).repeat(20, 16)
    payload = dcext.encode(qweight, codec="zstd", level=level)
    assert dcext.payload_info(payload)["level"] == level
    assert torch.equal(dcext.decode(payload), qweight)


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    slab_cols=st.integers(1, 300),
    low=st.integers(-128, 0),
    high=st.integers(0, 127),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_property(rows, cols, slab_cols, low, high, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(low, high + 1, (rows, cols))
    rare = rng.random((rows, cols)) < 0.002
    values[rare] = rng.integers(-128, 128, int(rare.sum()))
    qweight = torch.from_numpy(values.astype(np.int8))
    payload = dcext.encode(qweight, codec="zstd", slab_cols=min(slab_cols, cols))
    assert payload.numel() % 64 == 0
    assert torch.equal(dcext.decode(payload), qweight)


@pytest.mark.parametrize("codec", ["raw", "zstd", "packed"])
@pytest.mark.parametrize("slab_cols", [None, 64, 100])
def test_partial_decode(codec, slab_cols):
    qweight = gaussian(700, 513, 3.0)
    payload = dcext.encode(qweight, codec=codec, slab_cols=slab_cols)
    for rows in [(0, 1), (0, 700), (113, 457), (699, 700)]:
        for cols in [(0, 513), (0, 64), (63, 201), (512, 513)]:
            part = dcext.decode(payload, rows=rows, cols=cols)
            assert torch.equal(part, qweight[slice(*rows), slice(*cols)])


def test_decode_into_rows_of_a_larger_tensor():
    qweight = gaussian(300, 256, 1.0)
    canvas = torch.full((300, 300), 99, dtype=torch.int8)
    view = canvas[:, 20:276]
    assert dcext.decode(dcext.encode(qweight), out=view) is view
    assert torch.equal(view, qweight)
    assert (canvas[:, :20] == 99).all()
    assert (canvas[:, 276:] == 99).all()


def test_threads_give_the_same_bytes():
    qweight = gaussian(2048, 1024, 4.0)
    before = dcext.get_num_threads()
    try:
        payloads = []
        for num_threads in (1, 2, 5):
            dcext.set_num_threads(num_threads)
            payloads.append(dcext.encode(qweight))
            assert torch.equal(dcext.decode(payloads[-1]), qweight)
            assert torch.equal(dcext.decode(payloads[-1], num_threads=num_threads), qweight)
    finally:
        dcext.set_num_threads(before)
    assert torch.equal(payloads[0], payloads[1])
    assert torch.equal(payloads[0], payloads[2])


@pytest.mark.parametrize("sigma", SIGMAS)
def test_frames_are_ordinary(sigma):
    """A frame taken out of a payload decodes with the stock package, to the highs that PAYLOAD.md describes."""
    qweight = gaussian(400, 1000, sigma)
    payload = dcext.encode(qweight, codec="zstd")
    data = payload.numpy().tobytes()
    restored = torch.empty_like(qweight)
    for chunk in dcext.payload_info(payload)["chunks"]:
        rows, cols = chunk["shape"]
        stored = data[chunk["offset"] : chunk["offset"] + chunk["nbytes"]]
        tile = undo_filter(stored, chunk) if chunk["encoding"] == "zstd" else stored
        tile = np.frombuffer(tile, np.int8).reshape(rows, cols)
        restored[chunk["row"] : chunk["row"] + rows] = torch.from_numpy(tile.copy())
    assert torch.equal(restored, qweight)


def undo_filter(stored: bytes, chunk: dict) -> bytes:
    """A tile of a zstd chunk, by PAYLOAD.md."""
    n, low_bits = chunk["shape"][0] * chunk["shape"][1], chunk["low_bits"]
    groups = -(-n // 128)
    frame = zstandard.ZstdDecompressor().decompress(stored[: chunk["frame_nbytes"]])
    highs = np.frombuffer(frame, np.uint8)
    if chunk["pairs"]:
        pairs = highs.reshape(groups, 64)
        highs = np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.int16) - 8
    else:
        highs = np.pad(highs.view(np.int8).astype(np.int16), (0, groups * 128 - n)).reshape(
            groups, 128
        )
    weights = highs << low_bits
    if low_bits:
        begin = chunk["frame_nbytes"]
        planes = np.frombuffer(stored[begin : begin + groups * 16 * low_bits], np.uint8)
        planes = planes.reshape(groups, 1, 16 * low_bits)
        shifts = np.arange(0, 8, low_bits)[None, :, None]
        weights = weights | ((planes >> shifts) & ((1 << low_bits) - 1)).reshape(groups, 128)
    weights = weights.reshape(-1)[:n].astype(np.int8)
    exceptions = stored[chunk["frame_nbytes"] + groups * 16 * low_bits :]
    for word in np.frombuffer(exceptions, np.uint32):
        weights[word >> 8] = np.uint8(word & 255).astype(np.int8)
    return weights.tobytes()


@pytest.mark.parametrize(
    ("sigma", "percent"), [(1.0, 1.7), (1.5, 1.7), (3.0, 0.7), (6.0, 0.7), (20.0, 0.7)]
)
def test_size_is_near_the_entropy(sigma, percent):
    qweight = gaussian(2048, 4096, sigma)
    bits = 8 * dcext.encode(qweight).numel() / qweight.numel()
    assert bits <= dcext.entropy(qweight) * (1 + percent / 100)


def test_rare_outliers_do_not_cost_their_tile():
    qweight = gaussian(1024, 4096, 1.0)
    clean = dcext.encode(qweight).numel()
    qweight.view(-1)[:: 256 * 1024 // 4] = 100  # four in every tile
    payload = dcext.encode(qweight)
    assert all(chunk["pairs"] for chunk in dcext.payload_info(payload)["chunks"])
    assert payload.numel() <= clean + 64 * 64


def test_auto_chooses_by_content():
    rng = torch.Generator().manual_seed(1)
    noise = torch.randint(-128, 128, (512, 512), generator=rng, dtype=torch.int8)
    assert dcext.payload_info(dcext.encode(noise))["codec"] == "raw"
    assert dcext.payload_info(dcext.encode(gaussian(512, 512, 3.0)))["level"] == 0
    repeats = torch.randint(-128, 128, (1, 512), generator=rng, dtype=torch.int8).repeat(512, 1)
    assert dcext.payload_info(dcext.encode(repeats))["level"] == 19


def test_every_flipped_bit_is_found():
    payload = dcext.encode(gaussian(64, 80, 2.0), codec="zstd")
    for at in range(payload.numel()):
        damaged = payload.clone()
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(dcext.FormatError, match=r"expected .* found|damaged"):
            dcext.decode(damaged)


def test_flipped_bits_without_checksums_never_crash():
    """Libzstd and our own decoder stay inside their buffers on any bytes."""
    qweight = gaussian(200, 300, 1.0)
    payload = dcext.encode(qweight, codec="zstd")
    rng = np.random.default_rng(0)
    wrong = refused = 0
    for _ in range(2000):
        damaged = payload.clone()
        damaged[int(rng.integers(128, payload.numel()))] ^= int(rng.integers(1, 256))
        try:
            wrong += not torch.equal(dcext.decode(damaged, verify=False), qweight)
        except dcext.FormatError:
            refused += 1
    assert wrong > 0
    assert refused > 0


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 100, 128, 4000, -64, -1])
def test_truncation_is_found(cut):
    payload = dcext.encode(gaussian(100, 100, 3.0), codec="zstd")
    with pytest.raises(dcext.FormatError, match="truncated"):
        dcext.decode(payload[:cut].clone())


def resealed(payload: torch.Tensor, field: str, at: int, value: int) -> torch.Tensor:
    """A payload with one header field overwritten and a correct header checksum."""
    data = bytearray(payload.numpy().tobytes())
    struct.pack_into(field, data, at, value)
    (chunks,) = struct.unpack_from("<I", data, 48)
    begin = -(-(64 + 32 * min(chunks, 1)) // 64) * 64
    hashes = (xxhash.xxh3_64_intdigest(bytes(part)) for part in (data[:56], data[64:begin]))
    struct.pack_into("<Q", data, 56, xxhash.xxh3_64_intdigest(struct.pack("<QQ", *hashes)))
    return as_tensor(bytes(data))


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("<B", 0, 0, "magic"),
        ("<H", 8, 2, "version: expected 1, found 2"),
        ("<B", 10, 9, "codec"),
        ("<Q", 16, 2**63 + 5, "rows"),
        ("<Q", 24, 2**62, "cols"),
        ("<Q", 16, 2**31, "chunks|chunk table"),
        ("<I", 32, 0, "panel_rows"),
        ("<I", 36, 2**32 - 1, "slab_cols"),
        ("<Q", 40, 2**64 - 1, "payload bytes"),
        ("<I", 48, 2**32 - 1, "chunks"),
        ("<Q", 64, 2**64 - 64, "chunk offset"),
        ("<I", 72, 2**32 - 1, "chunk end|frame"),
        ("<I", 76, 2**32 - 1, "frame"),
        ("<B", 80, 7, "encoding"),
        ("<B", 81, 3, "low bits"),
        ("<B", 81, 200, "low bits"),
        ("<B", 82, 2, "pairs"),
        ("<B", 87, 1, "reserved"),
    ],
)
def test_fields_out_of_range_are_refused(field, at, value, message):
    payload = dcext.encode(gaussian(64, 64, 3.0), codec="zstd")
    with pytest.raises(dcext.FormatError, match=message):
        dcext.decode(resealed(payload, field, at, value))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: dcext.encode(torch.zeros(2, 2)), TypeError),
        (lambda: dcext.encode(torch.zeros(4, dtype=torch.int8)), ValueError),
        (lambda: dcext.encode(torch.zeros(0, 4, dtype=torch.int8)), ValueError),
        (lambda: dcext.encode(torch.zeros(2, 2, dtype=torch.int8), codec="lz4"), ValueError),
        (lambda: dcext.encode(torch.zeros(2, 2, dtype=torch.int8), "zstd", 23), ValueError),
        (lambda: dcext.encode(torch.zeros(2, 2, dtype=torch.int8), "raw", 3), ValueError),
        (lambda: dcext.decode(torch.zeros(64, dtype=torch.int8)), TypeError),
        (lambda: dcext.decode(as_tensor(golden_payload()), rows=(0, 3)), ValueError),
        (lambda: dcext.decode(as_tensor(golden_payload()), num_threads=0), ValueError),
        (lambda: dcext.decode(as_tensor(golden_payload()), out=torch.zeros(2, 3)), TypeError),
        (
            lambda: dcext.decode(
                as_tensor(golden_payload()), out=torch.zeros(2, 2, dtype=torch.int8)
            ),
            ValueError,
        ),
    ],
)
def test_wrong_arguments(call, error):
    with pytest.raises(error, match=r"expected .* got"):
        call()


def test_the_pool_survives_fork():
    code = """
import os, torch, dcext
dcext.set_num_threads(2)
qweight = torch.randn(2048, 512).round().to(torch.int8)
payload = dcext.encode(qweight)
pid = os.fork()
ok = bool((dcext.decode(payload).numpy() == qweight.numpy()).all())  # no OpenMP: torch's does not survive
if pid == 0:
    os._exit(0 if ok else 1)
assert ok
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_pool_honours_the_affinity_mask():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import dcext; print(dcext.get_num_threads())"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert output.stdout.strip() == "1"
    assert dcext.build_info()["available_cpus"] == len(os.sched_getaffinity(0))
