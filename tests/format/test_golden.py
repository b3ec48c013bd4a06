"""Bytes that must not change from one version to the next: payloads, and the tensors of a checkpoint."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

import dcext
from dcext import _C

ZSTD = "1.5.7"  # of the payloads below; another version may code the same weights in other bytes
pytestmark = pytest.mark.skipif(_C.zstd_version != ZSTD, reason=f"requires Zstandard {ZSTD}")


def integers(rows: int, cols: int, largest: int) -> torch.Tensor:
    """The same on every machine: sums of four bytes of a linear congruential sequence, so most are small."""
    state, values = 1, []
    for _ in range(rows * cols):
        total = 0
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            total += (state >> 16) % (largest + 1)
        values.append(total // 2 - largest)
    return torch.tensor(values, dtype=torch.int8).view(rows, cols)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"codec": "raw"}, "9ccbd46a04137118"),
        ({"codec": "zstd"}, "c6743d773c4e4eeb"),
        ({"codec": "zstd", "level": 3}, "e3360eb9480befbc"),
        ({"codec": "zstd", "slab_cols": 64}, "0d78e0a21f37f6ea"),
        ({"codec": "packed"}, "db1a5de1739cd9a8"),
        ({"codec": "auto"}, "c6743d773c4e4eeb"),
    ],
    ids=str,
)
def test_payloads(choices, expected):
    assert digest(dcext.encode(integers(96, 200, 12), **choices)) == expected


def test_int8_layers():
    model = nn.Sequential(nn.Linear(200, 96, bias=False), nn.Linear(96, 64, bias=False))
    for layer in model:
        matrix = integers(layer.out_features, layer.in_features, 100).float() / 128
        layer.weight.data.copy_(matrix)
    dcext.compress_(model, dcext.CompressionConfig(recipe="int8"))
    assert {name: digest(tensor) for name, tensor in model.state_dict().items()} == {
        "0.payload": "ad25b3ee32998710",
        "0.row_scale": "0fcbdbcb7fc0f460",
        "1.payload": "901d0581d508f2ad",
        "1.row_scale": "f5cd35da66059ca2",
    }
