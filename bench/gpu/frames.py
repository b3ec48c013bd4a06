"""What the frames of a payload decode to before dcext undoes its filter, as csrc/format/PAYLOAD.md has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 128  # weights
EXCEPTION_NBYTES = 4


def content_nbytes(chunk: dict[str, Any]) -> int:
    """Bytes that a chunk's frame decodes to."""
    weights = chunk["shape"][0] * chunk["shape"][1]
    return -(-weights // GROUP) * GROUP // 2 if chunk["pairs"] else weights


def weights_of(content: Tensor, payload: Tensor, chunk: dict[str, Any]) -> Tensor:
    """A tile from what its frame decodes to; plain torch, to check others' decoders.

    Args:
        content: 1-D uint8.
        payload: 1-D uint8, where content is.
        chunk: of ``payload_info``, with a frame.
    """
    rows, cols = chunk["shape"]
    groups = -(-rows * cols // GROUP)
    if chunk["pairs"]:
        pairs = content.view(groups, GROUP // 2)
        high = torch.cat([pairs & 15, pairs >> 4], 1).to(torch.int16) - 8
    else:
        padded = content.new_zeros(groups * GROUP)
        padded[: rows * cols] = content
        high = padded.view(torch.int8).to(torch.int16).view(groups, GROUP)
    low_bits = chunk["low_bits"]
    planes_begin = chunk["offset"] + chunk["frame_nbytes"]
    planes_end = planes_begin + 16 * low_bits * groups
    weights = high << low_bits
    if low_bits:
        planes = payload[planes_begin:planes_end].view(groups, -1)
        shifts = range(0, 8, low_bits)
        weights |= torch.cat([planes >> shift & (1 << low_bits) - 1 for shift in shifts], 1)
    tile = weights.to(torch.int8).view(-1)[: rows * cols]
    stored = payload[planes_end : chunk["offset"] + chunk["nbytes"]].view(-1, EXCEPTION_NBYTES)
    if len(stored):
        digits = stored.to(torch.int64)
        positions = digits[:, 1] | digits[:, 2] << 8 | digits[:, 3] << 16
        tile[positions] = stored[:, 0].contiguous().view(torch.int8)
    return tile.view(rows, cols)


def has_frame(chunk: dict[str, Any]) -> bool:
    """Whether a chunk is a frame rather than raw."""
    return chunk["encoding"] == "zstd"
