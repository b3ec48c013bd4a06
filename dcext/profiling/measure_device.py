"""Measures a device: its memory, decoding, layers over the number of tokens, and the link to it. Never run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dcext.codec import encode
from dcext.codecs import codec_named, codec_names
from dcext.nn.linear import DCLinear
from dcext.nn.placement import batch_decodes
from dcext.policy.machine import Processor
from dcext.profiling.timing import Figure, timed
from dcext.weights.indexed import IndexedWeight, decode_together

TOKENS = (1, 4, 16, 64, 256, 1024)
# Layers of 16 MiB, as many in a block as a Llama's has, and so many blocks that none is in the L2 cache when its turn comes.
SHAPE, LAYERS = (4096, 4096), 7
CACHES = 4
READ_NBYTES, COPY_NBYTES = 256 << 20, 64 << 20


class Block(nn.Module):
    """Layers that read the same input, and whose frames are decoded in one launch."""

    def __init__(self, payload: Tensor, device: torch.device) -> None:
        super().__init__()
        layers = [DCLinear(payload, torch.ones(1)) for _ in range(LAYERS)]
        for layer in layers:
            layer.make_resident(payload.clone(), device)
        self.layers = nn.ModuleList(layers)
        self._weights = [layer.backing for layer in layers]
        batch_decodes(self)

    def decode(self) -> None:
        """Of codec zstd: decodes all, multiplies nothing."""
        decode_together([w for w in self._weights if isinstance(w, IndexedWeight)])

    def forward(self, x: Tensor) -> None:
        """Multiplies; drops the products."""
        for layer in self.layers:
            layer(x)


def device_name(device: torch.device) -> str:
    """To people, and what figures hold for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measure_device(
    drawn: Callable[[str, tuple[int, int]], Tensor], device: torch.device, budget_s: float
) -> tuple[Processor, float, dict[str, float]]:
    """The device, GB/s of the link to it, and how uncertain each figure is.

    Layers are called from Python, as models do: where they are small, that is what takes time.

    Args:
        drawn: integers of a shape as recipes make them for a codec.
        device: that is measured.
        budget_s: seconds for each figure.
    """
    timed_there = partial(_timed, device=device, budget_s=budget_s)
    rows, cols = SHAPE
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layer_s: dict[str, dict[int, float]] = {}
    spread: dict[str, float] = {}
    gweights: dict[str, float] = {}  # of codecs that are decoded whole
    for codec in codec_names():
        payload = encode(drawn(codec, SHAPE), codec)
        blocks = [Block(payload, device) for _ in range(_num_blocks(payload, device))]
        layer_s[codec] = {}
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, device=device, dtype=dtype)
            figure = timed_there([partial(block, x) for block in blocks])
            layer_s[codec][tokens] = figure.seconds / (len(blocks) * LAYERS * rows * cols) * 1e9
            spread[f"layer_s.{codec}"] = max(spread.get(f"layer_s.{codec}", 0.0), figure.spread)
        if codec_named(codec).decoded_whole:
            decoded = timed_there([block.decode for block in blocks])
            gweights[codec] = len(blocks) * LAYERS * rows * cols / decoded.seconds / 1e9
            spread[f"decode_gweights.{codec}"] = decoded.spread
    memory = torch.zeros(READ_NBYTES // 8, dtype=torch.int64, device=device)
    read = timed_there([memory.max])
    source = torch.ones(COPY_NBYTES, dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=device)
    copied = timed_there([partial(target.copy_, source, non_blocking=True)])
    spread["link_gbps"] = copied.spread
    spread["memory_gbps"] = read.spread
    processor = Processor(
        memory_gbps=READ_NBYTES / read.seconds / 1e9,
        int8_tops=max(2e-3 * tokens / seconds for tokens, seconds in layer_s["raw"].items()),
        decode_gweights=gweights,
        scratch=tuple(gweights),
        layer_s=layer_s,
    )
    return processor, COPY_NBYTES / copied.seconds / 1e9, spread


def _num_blocks(payload: Tensor, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + CACHES * cache // (LAYERS * payload.nbytes)


def _timed(calls: list[Callable[[], Any]], device: torch.device, budget_s: float) -> Figure:
    """Of all calls, one after the other, until the device is done."""

    def run() -> None:
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed([run], budget_s)
