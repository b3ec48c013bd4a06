"""W8A8 products of more input features than int32 sums can hold: exact on every instruction set, bounded, refused beyond."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dcext

MOST_SUMMED = 2**17  # columns whose sums fit in int32
MOST = 2**24
CODECS = ("raw", "zstd", "packed")
TOKENS = (1, 2, 3, 17)


def linear(qweight: Tensor, x: Tensor, codec: str, slab_cols: int | None = None) -> Tensor:
    payload = dcext.encode(qweight, codec, slab_cols=slab_cols)
    return torch.ops.dcext.linear(x, payload, torch.ones(len(qweight)), None, None, "int8")


def exact(qweight: Tensor, x: Tensor) -> Tensor:
    """With integer sums in int64."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    q = (x * (torch.full_like(absmax, 127) / absmax)).round()
    sums = (q.double() @ qweight.double().T).long()  # far below 2^53
    return sums.float() * (absmax / 127)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weight", [127, -128])
def test_largest_sums_do_not_wrap(isa, weight, codec):
    qweight = torch.full((3, 140_000), weight, dtype=torch.int8)
    for tokens in TOKENS:
        for sign in (1.0, -1.0):
            x = torch.full((tokens, 140_000), sign)
            y = linear(qweight, x, codec)
            assert torch.equal(y, exact(qweight, x))
            assert torch.allclose(y, torch.tensor(sign * weight * 140_000))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "cols", [MOST_SUMMED - 1, MOST_SUMMED, MOST_SUMMED + 1, 2 * MOST_SUMMED + 77]
)
def test_sums_of_any_number_of_ranges_are_exact(isa, cols, codec):
    generator = torch.Generator().manual_seed(cols)
    qweight = (torch.randn(20, cols, generator=generator) * 3 + 2).round().to(torch.int8)
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, generator=generator) + 0.5
        assert torch.equal(linear(qweight, x, codec), exact(qweight, x))
    assert torch.equal(linear(qweight, x, codec, slab_cols=50_001), exact(qweight, x))


def test_outputs_of_all_dtypes():
    qweight = torch.full((3, 140_000), 127, dtype=torch.int8)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.full((2, 140_000), 1.0, dtype=dtype)
        assert torch.equal(linear(qweight, x, "raw"), exact(qweight, x.float()).to(dtype))


def test_the_widest_layer_and_one_that_is_wider():
    x = torch.ones(1, MOST)
    assert linear(torch.full((1, MOST), 127, dtype=torch.int8), x, "raw").item() == 127.0 * MOST
    payload = dcext.encode(torch.ones(1, MOST + 1, dtype=torch.int8), "zstd")
    x = torch.ones(1, MOST + 1)
    with pytest.raises(ValueError, match=r"expected at most 16777216 columns .* got 16777217"):
        torch.ops.dcext.linear(x, payload, torch.ones(1), None, None, "int8")
    y = torch.ops.dcext.linear(x, payload, torch.ones(1), None, None, "none")
    assert torch.allclose(y, torch.tensor(float(MOST + 1)), rtol=1e-6)
