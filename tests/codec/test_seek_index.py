"""Decoding by a seek index, on the CPU: the steps of the CUDA kernel give what libzstd gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcext
from dcext.codec import seek_index
from matrices import gaussian

BLOCK_NBYTES = 448
SIGMAS = [0.2, 0.5, 1.0, 2.0, 3.2, 6.0, 12.0, 40.0]
SHAPES = [(1, 1), (1, 127), (3, 128), (5, 129), (64, 576), (300, 257), (1000, 1001)]


def decode_indexed(payload, index, shape):
    out = torch.full(shape, 99, dtype=torch.int8)
    failures = torch.zeros(1, dtype=torch.int32)
    torch.ops.dcext.decode_indexed_([payload], [index], [out], failures)
    return out, int(failures)


def with_rare_values(qweight):
    generator = torch.Generator().manual_seed(1)
    rare = torch.rand(qweight.shape, generator=generator) < 2e-4
    return torch.where(rare, torch.tensor(-128, dtype=torch.int8), qweight)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slab_cols", [None, 100])
def test_the_same_weights(shape, sigma, slab_cols):
    qweight = with_rare_values(gaussian(*shape, sigma))
    payload = dcext.encode(qweight, "zstd", slab_cols=slab_cols)
    index = seek_index(payload)
    assert index.dtype == torch.uint8
    assert index.shape[1] == BLOCK_NBYTES
    out, failures = decode_indexed(payload, index, shape)
    assert torch.equal(out, qweight)
    assert failures == 0


def test_every_filter_is_among_them():
    found = set()
    for sigma in SIGMAS:
        payload = dcext.encode(with_rare_values(gaussian(512, 512, sigma)), "zstd")
        chunks = dcext.payload_info(payload)["chunks"]
        found |= {(c["pairs"], c["low_bits"], c["exceptions"] > 0) for c in chunks}
    assert {(pairs, bits) for pairs, bits, _ in found} >= {(0, 0), (1, 0), (1, 4)}
    assert any(exceptions for _, _, exceptions in found)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_constant_and_raw_tiles(codec):
    constant = torch.full((300, 700), -5, dtype=torch.int8)
    noise = torch.randint(-128, 128, (300, 700), dtype=torch.int8)
    for qweight in (constant, noise):
        payload = dcext.encode(qweight, codec)
        assert torch.equal(decode_indexed(payload, seek_index(payload), (300, 700))[0], qweight)


def test_matrices_together():
    matrices = [gaussian(40 * (i + 1), 96, 1.0 + i, seed=i) for i in range(5)]
    payloads = [dcext.encode(matrix, "zstd") for matrix in matrices]
    outs = [torch.empty_like(matrix) for matrix in matrices]
    failures = torch.zeros(1, dtype=torch.int32)
    indices = [seek_index(payload) for payload in payloads]
    torch.ops.dcext.decode_indexed_(payloads, indices, outs, failures)
    assert all(map(torch.equal, outs, matrices))
    torch.ops.dcext.decode_indexed_([], [], [], failures)
    assert failures.item() == 0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    cols=st.integers(1, 300),
    sigma=st.floats(0.1, 80),
    slab_cols=st.sampled_from([None, 1, 7, 64, 130]),
    seed=st.integers(0, 2**31),
)
def test_any_matrix(rows, cols, sigma, slab_cols, seed):
    qweight = with_rare_values(gaussian(rows, cols, sigma, seed))
    payload = dcext.encode(qweight, "zstd", slab_cols=slab_cols)
    index = seek_index(payload)
    out, failures = decode_indexed(payload, index, (rows, cols))
    assert torch.equal(out, qweight)
    assert failures == 0


def test_real_weights(smollm2):
    from dcext.hub import load_float_model
    from dcext.quantize import quantize_absmax

    model, _ = load_float_model(smollm2, "float32")
    layer = model.model.layers[3].mlp
    for linear in (layer.gate_proj, layer.down_proj):
        for granularity in ("row", "tensor"):
            qweight, _ = quantize_absmax(linear.weight, granularity)
            payload = dcext.encode(qweight, "zstd")
            index = seek_index(payload)
            assert index.numel() <= 0.01 * payload.numel()
            assert torch.equal(decode_indexed(payload, index, qweight.shape)[0], qweight)


def test_frames_with_matches_are_outside():
    repeats = gaussian(16, 64, 3.0).repeat(40, 8)
    payload = dcext.encode(repeats, "zstd", level=19)
    assert payload.numel() < repeats.numel() / 20
    assert seek_index(payload) is None
    assert torch.equal(dcext.decode(payload), repeats)


def test_any_thread_count_gives_the_same_index():
    payload = dcext.encode(gaussian(3000, 512, 3.0), "zstd")
    before = dcext.get_num_threads()
    expected = seek_index(payload)
    try:
        dcext.set_num_threads(1)
        assert torch.equal(seek_index(payload), expected)
    finally:
        dcext.set_num_threads(before)


def test_damaged_chunks_are_refused():
    payload = dcext.encode(gaussian(64, 576, 3.0), "zstd")
    chunk = dcext.payload_info(payload)["chunks"][0]
    payload[chunk["offset"] + chunk["frame_nbytes"] // 2] ^= 16
    with pytest.raises(dcext.FormatError, match="checksum"):
        seek_index(payload)


def test_damage_behind_the_index_is_reported():
    """The index of one payload does not fit another: bounds hold, and the failure says so."""
    qweight = gaussian(512, 576, 3.0)
    payload, other = (dcext.encode(q, "zstd") for q in (qweight, qweight.flip(0).contiguous()))
    index = seek_index(payload)
    size = max(payload.numel(), other.numel())
    longer = torch.nn.functional.pad(other, (0, size - other.numel()))
    out, failures = decode_indexed(longer, index, (512, 576))
    assert failures != 0
    out, failures = decode_indexed(payload[:1024], index, (512, 576))
    assert failures & 1
    out, failures = decode_indexed(payload, index, (10, 576))
    assert failures & 1
    assert out.shape == (10, 576)


def test_packed_payloads_have_none():
    with pytest.raises(ValueError, match="expected codec raw or zstd, got packed"):
        seek_index(dcext.encode(gaussian(64, 64, 3.0), "packed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"index": torch.zeros(1, 447, dtype=torch.uint8)},
            r"expected a contiguous tensor of shape",
        ),
        ({"out": torch.zeros(4, 4, dtype=torch.int32)}, "expected torch.uint8 payloads"),
        ({"out": torch.zeros(8, 4, dtype=torch.int8)[::2]}, "expected a contiguous 2-D tensor"),
        ({"failures": torch.zeros(2, dtype=torch.int32)}, "expected one element"),
        ({"failures": torch.zeros(1)}, "expected torch.int32"),
        ({"payload": torch.zeros(131, dtype=torch.uint8)}, "multiple of 4 bytes"),
    ],
)
def test_wrong_arguments(change, message):
    payload = dcext.encode(gaussian(4, 4, 3.0), "zstd")
    arguments = {
        "payload": payload,
        "index": seek_index(payload),
        "out": torch.zeros(4, 4, dtype=torch.int8),
        "failures": torch.zeros(1, dtype=torch.int32),
        **change,
    }
    payload, index, out, failures = arguments.values()
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.dcext.decode_indexed_([payload], [index], [out], failures)


def test_opcheck():
    payload = dcext.encode(gaussian(40, 96, 3.0), "zstd")
    arguments = (
        [payload],
        [seek_index(payload)],
        [torch.zeros(40, 96, dtype=torch.int8)],
        torch.zeros(1, dtype=torch.int32),
    )
    torch.library.opcheck(torch.ops.dcext.decode_indexed_.default, arguments)
