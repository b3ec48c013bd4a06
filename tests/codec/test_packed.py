"""Codec ``packed``: against the numpy codec of packed_reference.py, products from the codes against dense ones, damage."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import dcext
from matrices import of_width
from packed_reference import RAW, WIDTHS, decode_packed, encode_packed, reseal

SHAPES = [(1, 1), (3, 40), (16, 32), (17, 31), (50, 100), (130, 257), (64, 4096)]
TOKENS = [1, 2, 3, 7, 8, 15, 16, 17, 40]


def as_payload(qweight: torch.Tensor, **choices) -> torch.Tensor:
    """By the numpy codec, which can be made to take any width."""
    return torch.frombuffer(bytearray(encode_packed(qweight.numpy(), **choices)), dtype=torch.uint8)


@pytest.mark.parametrize("rare", [0.0, 0.003, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_codecs_read_each_other(shape, width, rare):
    qweight = of_width(shape, width, rare)
    assert np.array_equal(
        decode_packed(dcext.encode(qweight, "packed").numpy().tobytes()), qweight.numpy()
    )
    for slab_cols in (None, 37):
        panels = -(-shape[0] // 48)
        for widths in ([width] * panels, [WIDTHS[i % 5] for i in range(panels)], [RAW] * panels):
            payload = as_payload(qweight, widths=widths, panel_rows=48, slab_cols=slab_cols)
            dcext.verify_payload(payload)
            assert torch.equal(dcext.decode(payload), qweight)


def test_golden_bytes():
    """The whole of a payload is pinned: another choice of widths or tables is another format."""
    payload = dcext.encode(of_width((300, 500), 4, 0.002), "packed")
    assert xxhash.xxh3_64_hexdigest(payload.numpy().tobytes()) == "7d205e66acbbca55"


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    slab_cols=st.integers(1, 300),
    low=st.integers(-128, 0),
    high=st.integers(0, 127),
    rare=st.sampled_from([0, 0.01]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_round_trip_property(rows, cols, slab_cols, low, high, rare, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(low, high + 1, (rows, cols))
    values = np.where(rng.random((rows, cols)) < rare, rng.integers(-128, 128), values)
    qweight = torch.from_numpy(values.astype(np.int8))
    payload = dcext.encode(qweight, codec="packed", slab_cols=min(slab_cols, cols))
    assert payload.numel() % 64 == 0
    dcext.verify_payload(payload)
    assert torch.equal(dcext.decode(payload), qweight)
    part = dcext.decode(payload, rows=(rows // 3, rows), cols=(cols // 2, cols))
    assert torch.equal(part, qweight[rows // 3 :, cols // 2 :])


def cheapest_width(tile: np.ndarray) -> int:
    """Fewest bytes, an exception charged eight; raw above 98 % of the tile. Rows are whole blocks, columns groups."""
    counts = np.sort(np.unique(tile, return_counts=True)[1])[::-1]
    costs = {RAW: 0.98 * tile.size}
    for width in WIDTHS:
        left = int(counts[2**width :].sum())
        costs[width] = 64 + tile.size * width / 8 + (2 * len(tile) + 8 * left if left else 0)
    return min(costs, key=costs.__getitem__)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.6, 2.5, 4.0, 7.0, 12.0, 25.0])
def test_width_is_the_cheapest(sigma):
    noise = np.random.default_rng(0).normal(0, sigma, (256, 512)).round()
    qweight = torch.from_numpy(noise.clip(-128, 127).astype(np.int8))
    (chunk,) = dcext.payload_info(dcext.encode(qweight, "packed"))["chunks"]
    expected = cheapest_width(qweight.numpy())
    assert (chunk["width"] or RAW) == expected
    assert chunk["encoding"] == ("raw" if expected == RAW else "packed")


def test_panels_have_widths_of_their_own():
    qweight = torch.cat([of_width((256, 512), width, 0.0) for width in (2, 6, 3)])
    info = dcext.payload_info(dcext.encode(qweight, "packed"))
    assert [chunk["width"] for chunk in info["chunks"]] == [2, 6, 3]


@pytest.mark.parametrize("rare", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_products_equal_dense_ones(isa, width, rare):
    """Bit for bit, from one token to more than are multiplied from the codes."""
    for rows, cols in [(1, 1), (17, 31), (64, 544), (130, 257)]:
        qweight = of_width((rows, cols), width, rare)
        scale = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
        payload = as_payload(qweight, widths=[width] * -(-rows // 48), panel_rows=48)
        packed = dcext.DCLinear(payload, scale)
        dense = dcext.DCLinear(dcext.encode(qweight, "raw"), scale)
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
            assert torch.equal(packed(x), dense(x))
        packed.activations = dense.activations = "none"
        assert torch.equal(packed(x), dense(x))


@pytest.mark.parametrize("slab_cols", [None, 96])
def test_packed_and_raw_panels_in_one_layer(isa, slab_cols):
    qweight = of_width((200, 300), 4, 0.01)
    payload = as_payload(qweight, widths=[4, RAW, 2, 5], panel_rows=64, slab_cols=slab_cols)
    packed, dense = (dcext.DCLinear(p, torch.ones(200)) for p in (payload, dcext.encode(qweight)))
    for tokens in TOKENS:
        x = torch.randn(tokens, 300, generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(packed(x), dense(x))


def test_sums_that_leave_int32_on_the_way():
    """Unsigned codes add 128 times the activations, which wraps around; the result does not."""
    cols = 65_504
    payload = as_payload(torch.full((16, cols), 127, dtype=torch.int8), widths=[2], panel_rows=16)
    x = torch.ones(1, cols)
    expected = torch.full((1, 16), 127.0 * cols)
    assert torch.allclose(dcext.DCLinear(payload, torch.ones(16))(x), expected, rtol=1e-6)


def test_embedding_rows():
    qweight = of_width((500, 96), 4, 0.01)
    layer = dcext.DCEmbedding(dcext.encode(qweight, "packed"), torch.ones(500))
    indices = torch.tensor([[499, 0, 3], [3, 250, 17]])
    assert torch.equal(layer(indices), qweight[indices].float())


def resealed(payload: torch.Tensor, at: int, value: bytes) -> torch.Tensor:
    """A payload with some bytes overwritten and checksums that hold."""
    data = bytearray(payload.numpy().tobytes())
    data[at : at + len(value)] = value
    reseal(data)
    return torch.frombuffer(data, dtype=torch.uint8)


SMALL = (20, 50)  # two blocks, two groups
CODES = 128 + 64  # of the only chunk: behind header, table entry and table of weights
COUNTS = CODES + 2 * 2 * 2 * 64


def small_payload() -> tuple[torch.Tensor, int]:
    """A payload of width 2 with exceptions, and how many there are."""
    payload = as_payload(of_width(SMALL, 2, 0.05), widths=[2], panel_rows=20)
    return payload, dcext.payload_info(payload)["chunks"][0]["exceptions"]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (81, b"\1", "width: expected 6, found 1"),
        (81, b"\7", "width: expected 6, found 7"),
        (81, b"\3", "packed chunk bytes"),
        (82, b"\1", "packed chunk bytes"),
        (76, b"\1", "packed chunk bytes"),
        (80, b"\1", "chunk encoding: expected 2, found 1"),
        (36, struct.pack("<I", 2**16), "slab_cols"),
        (10, b"\1", "chunk encoding: expected 1, found 2"),
    ],
)
def test_headers_that_do_not_fit_are_refused(at, value, message):
    payload, _ = small_payload()
    with pytest.raises(dcext.FormatError, match=message):
        dcext.payload_info(resealed(payload, at, value))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (128 + 4, b"\1"),  # a weight behind the table
        (COUNTS, struct.pack("<H", 65535)),  # more than there are
        (COUNTS + 2 * 25, b"\1"),  # in a row that does not exist
        (COUNTS + 64, struct.pack("<H", 50)),  # a column that does not exist
        (COUNTS + 64, struct.pack("<H", 65535)),
        (COUNTS + 66, struct.pack("<HH", 0, 0)),  # not ascending
    ],
)
def test_tables_and_exceptions_that_cannot_be_are_refused(at, value):
    """At loading, before a kernel reads them; a kernel that meets them all the same stays in bounds."""
    payload, count = small_payload()
    assert count > 10
    damaged = resealed(payload, at, value)
    dcext.payload_info(damaged)
    with pytest.raises(dcext.FormatError, match=r"corrupt data in chunk 0: table or exceptions"):
        dcext.verify_payload(damaged)
    layer = dcext.DCLinear(payload, torch.ones(20))
    with pytest.raises(RuntimeError, match="table or exceptions"):
        layer.load_state_dict(
            {**layer.state_dict(), "payload": damaged, "row_scale": torch.ones(20)}
        )


def test_a_code_under_an_exception_is_refused():
    payload, _ = small_payload()
    for code in range(CODES, COUNTS):
        damaged = resealed(payload, code, b"\xff")
        try:
            dcext.verify_payload(damaged)
        except dcext.FormatError:
            break
    else:
        pytest.fail("all codes may be anything, also where exceptions stand")


def test_damaged_bytes_never_crash(isa):
    """Decoders and products stay inside their buffers on any bytes, also where checksums hold."""
    payload, _ = small_payload()
    x = torch.randn(3, SMALL[1])
    rng = np.random.default_rng(0)
    refused = wrong = 0
    for _ in range(500):
        at = int(rng.integers(128, payload.numel()))
        damaged = resealed(payload, at, rng.integers(0, 256, 2, np.uint8).tobytes())
        for run in (
            lambda damaged=damaged: dcext.decode(damaged),
            lambda damaged=damaged: dcext.DCLinear(damaged, torch.ones(20))(x),
        ):
            try:
                run()
                wrong += 1
            except dcext.FormatError:
                refused += 1
    assert refused > 0
    assert wrong > 0


def test_every_flipped_bit_is_found():
    payload, _ = small_payload()
    for at in range(payload.numel()):
        damaged = payload.clone()
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(dcext.FormatError, match=r"expected .* found|damaged"):
            dcext.decode(damaged)
