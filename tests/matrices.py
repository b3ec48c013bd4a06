"""Integer matrices that many tests share."""

from __future__ import annotations

import torch


def gaussian(rows: int, cols: int, sigma: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, cols, generator=generator) * sigma
    return noise.round().clamp(-127, 127).to(torch.int8)


def of_width(shape: tuple[int, int], width: int, rare: float, seed: int = 0) -> torch.Tensor:
    """As many different weights as codes of this width, spread over int8, and some others."""
    generator = torch.Generator().manual_seed(seed)
    alphabet = torch.linspace(-128, 127, 2**width).round().to(torch.int8)
    qweight = alphabet[torch.randint(2**width, shape, generator=generator)]
    others = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    return torch.where(torch.rand(shape, generator=generator) < rare, others, qweight)
