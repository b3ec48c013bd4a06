"""The numpy codec that the others are compared with: against bit positions read off PAYLOAD.md by hand."""

from __future__ import annotations

import numpy as np
import pytest

from packed_reference import RAW, WIDTHS, decode_packed, encode_packed, pack_codes

SHAPES = [(1, 1), (3, 33), (16, 32), (17, 31), (50, 100), (130, 257)]


def gaussian(rows: int, cols: int, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(rows * 1000 + cols).normal(0, sigma, (rows, cols))
    return noise.round().clip(-128, 127).astype(np.int8)


@pytest.mark.parametrize("slab_cols", [None, 32, 45])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, slab_cols):
    for sigma in (0.0, 1.0, 4.0, 12.0, 60.0):
        qweight = gaussian(*shape, sigma)
        panels = -(-shape[0] // 48)
        for widths in (None, *([width] * panels for width in (*WIDTHS, RAW))):
            payload = encode_packed(qweight, widths, panel_rows=48, slab_cols=slab_cols)
            assert len(payload) % 64 == 0
            assert np.array_equal(decode_packed(payload), qweight)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("position", [(0, 0), (0, 3), (15, 4), (7, 17), (2, 31), (16, 8), (5, 40)])
def test_where_one_code_goes(width, position):
    """All bits of one code set, and nothing else: every bit is found where the text says."""
    row, col = position
    codes = np.zeros((32, 64), np.uint8)
    codes[position] = 2**width - 1
    block, r, group, v, c = row // 16, row % 16, col // 32, col % 32 // 4, col % 4
    expected = np.zeros((2, 2, width, 64), np.uint8)
    bits = expected[block, group, :, 4 * r + c]
    two_bits = {2: 0, 3: 0, 6: 4}.get(width)
    if width >= 4:
        bits[v % 4] = 0x0F if v < 4 else 0xF0
    if two_bits is not None:
        bits[two_bits + v % 2] = 3 << v // 2 * 2
    if width in (3, 5):
        bits[-1] = 1 << v
    assert pack_codes(codes, width) == expected.tobytes()


def test_golden_chunk():
    """One row of three weights at 2 bits: the fourth most frequent value is an exception."""
    row = [7] * 3 + [-9] * 3 + [1] * 2 + [0] * 2 + [5]
    payload = encode_packed(np.array([row], np.int8), [2], panel_rows=1)
    chunk = payload[128:]
    assert chunk[:64] == bytes([0xF7, 0, 1, 7]).ljust(64, b"\0")
    # codes of columns 0 to 10: 3 3 3 0 | 0 0 2 2 | 1 1 0
    pieces = np.zeros(128, np.uint8)
    pieces[0:4] = [3 | 1 << 2, 3 | 1 << 2, 3, 0]  # v = 0 and 2
    pieces[64:68] = [0, 0, 2, 2]  # v = 1
    assert chunk[64:192] == pieces.tobytes()
    counts = b"\1".ljust(32, b"\0")
    assert chunk[192:] == (counts + b"\x0a\0" + b"\5").ljust(64, b"\0")
