"""Models that are larger than a device: some blocks are resident there, the others are copied there ahead of their calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from dcext.codec import payload_info
from dcext.codecs import codec_named
from dcext.nn.compressed import CompressedModule
from dcext.nn.embedding import DCEmbedding
from dcext.nn.placement import compressed_blocks
from dcext.offloading.spread import spread_evenly
from dcext.offloading.state import other_nbytes
from dcext.offloading.weights import Weight
from dcext.policy.decide import SLOTS
from dcext.policy.footprint import PART_NBYTES, payload_index_nbytes
from dcext.policy.tier import Tier
from dcext.sizes import format_nbytes
from dcext.weights.device_stream import READS_NBYTES

MODES = ("auto", "device", "host", "raw")
# Host memory to read into, as in dcext.offloading.offload: so much, or a part of the budget where that is less.
LEAST_READS_NBYTES, READS_SHARE = 8 << 20, 4


@dataclass(frozen=True)
class DeviceBlock:
    """A decoder block, and what it takes.

    Attributes:
        name: in the model.
        module: the block.
        layers: its compressed layers.
        device_nbytes: on the device whether it is resident or copied there; an upper bound.
        host_nbytes: in host memory if it is copied from there.
        index_nbytes: in host memory if it is copied from the disk.
        decoded_nbytes: of matrices that are decoded when it is called.
    """

    name: str
    module: nn.Module
    layers: list[CompressedModule]
    device_nbytes: int
    host_nbytes: int
    index_nbytes: int
    decoded_nbytes: int


@dataclass(frozen=True)
class DevicePlan:
    """Which blocks are resident on the device, and which are copied there ahead of their calls.

    Attributes:
        resident, prefetched: the blocks, in order.
        from_disk: those of ``prefetched`` that stay in their files.
        reads_nbytes: host memory that they are read into.
        slot_nbytes: of the largest that is copied.
        device_nbytes: weights and slots on the device, and room to decode.
        host_nbytes: weights in host memory.
    """

    resident: list[DeviceBlock]
    prefetched: list[DeviceBlock]
    from_disk: list[DeviceBlock]
    reads_nbytes: int
    slot_nbytes: int
    device_nbytes: int
    host_nbytes: int


def plan_device(
    model: nn.Module, mode: str, device_budget: int, host_budget: int | None
) -> DevicePlan:
    """Fits a model into budgets: as many blocks are resident on the device as fit there, evenly spread.

    Everything outside of blocks is resident on the device. The others wait in host memory, as far as that is enough; the
    others stay on disk, but for their indices.

    Raises:
        ValueError: a budget is too small: by how much; the mode is unknown; the model has no decoder blocks.
    """
    if mode not in MODES:
        raise ValueError(f"offload: mode: expected one of {MODES}, got {mode!r}")
    blocks = [_describe(name, module, mode) for name, module in compressed_blocks(model).items()]
    if not blocks:
        raise ValueError(
            "offload: model: expected decoder blocks with compressed layers, found none"
        )
    inside = {id(module) for block in blocks for module in block.module.modules()}
    base, decoded = _outside_nbytes(model, inside)
    decoded = max([decoded, *(block.decoded_nbytes for block in blocks)])
    slot_nbytes = max(block.device_nbytes for block in blocks)
    total = sum(block.device_nbytes for block in blocks)
    resident, prefetched = blocks, []
    if base + decoded + total > device_budget:
        room = device_budget - base - decoded - SLOTS * slot_nbytes
        if room < 0:
            least = base + decoded + SLOTS * slot_nbytes
            raise ValueError(
                f"device_memory: expected at least {least} bytes ({format_nbytes(least)}): {format_nbytes(base)} outside of "
                f"blocks, {format_nbytes(decoded)} to decode into, {SLOTS} slots of {format_nbytes(slot_nbytes)}; "
                f"got {device_budget}"
            )
        resident = _spread(blocks, room, lambda block: block.device_nbytes)
        prefetched = [block for block in blocks if block not in resident]
        slot_nbytes = max(block.device_nbytes for block in prefetched)
    from_disk, reads_nbytes, host = _fit_host(prefetched, mode, host_budget)
    on_device = base + decoded + sum(block.device_nbytes for block in resident)
    slots = SLOTS * slot_nbytes if prefetched else 0
    return DevicePlan(
        resident, prefetched, from_disk, reads_nbytes, slot_nbytes, on_device + slots, host
    )


def _fits(host_nbytes: int, budget: int) -> bool:
    return host_nbytes <= budget


def _fit_host(
    prefetched: list[DeviceBlock], mode: str, budget: int | None
) -> tuple[list[DeviceBlock], int, int]:
    """Which blocks stay on disk, the memory to read them into, and what host memory takes in all."""
    host = sum(block.host_nbytes for block in prefetched)
    if budget is None or _fits(host, budget):
        return [], 0, host
    if mode in ("host", "raw"):
        raise ValueError(
            f"host_memory: expected at least {host} bytes ({format_nbytes(host)}) for what does not fit on the device, as "
            f"mode {mode!r} reads nothing from disk, got {budget}"
        )
    reads = min(READS_NBYTES, max(LEAST_READS_NBYTES, budget // READS_SHARE))
    indices = sum(block.index_nbytes for block in prefetched)
    room = budget - reads - indices
    if room < 0:
        least = LEAST_READS_NBYTES + indices
        raise ValueError(
            f"host_memory: expected at least {least} bytes ({format_nbytes(least)}) to read into and for what says where "
            f"weights begin, got {budget}"
        )
    in_memory = _spread(prefetched, room, lambda block: block.host_nbytes - block.index_nbytes)
    from_disk = [block for block in prefetched if block not in in_memory]
    kept = sum(block.host_nbytes - block.index_nbytes for block in in_memory)
    return from_disk, reads, reads + indices + kept


def device_tiers(weights: Sequence[Weight], plan: DevicePlan, mode: str) -> dict[str, Tier]:
    """What a plan of blocks is for each weight, for ``dcext.offloading.device``; see ``plan_device``."""
    places = {id(layer): "host" for block in plan.prefetched for layer in block.layers}
    places |= {id(layer): "disk" for block in plan.from_disk for layer in block.layers}
    tiers = {}
    for weight in weights:
        found = {places.get(id(module), "device") for module in weight.modules}
        place = found.pop() if len(found) == 1 else "device"
        codec = payload_info(weight.module.payload)["codec"]
        if place == "disk":
            codec = str(weight.file_codec)
        if place == "host" and mode == "raw":
            codec = "raw"
        decoded_by_host = place == "host" and mode == "host" and codec != "raw"
        tiers[weight.name] = Tier(place, codec, decoded_by_host)
    return tiers


def _describe(name: str, module: nn.Module, mode: str) -> DeviceBlock:
    layers = [layer for layer in module.modules() if isinstance(layer, CompressedModule)]
    device = host = index = decoded = 0
    for layer in layers:
        stored = _stored_nbytes(layer)
        raw = layer.num_weights
        codec = payload_info(layer.payload)["codec"]
        is_raw = codec == "raw" or mode in ("host", "raw")
        device += (raw if is_raw else stored) + PART_NBYTES
        host += raw if mode == "raw" else layer.payload.nbytes if mode == "host" else stored
        index += stored - layer.payload.nbytes
        decoded += raw if codec_named(codec).decoded_whole and not is_raw else 0
    return DeviceBlock(name, module, layers, device, host, index, decoded)


def _stored_nbytes(layer: CompressedModule) -> int:
    """Of a payload with what it takes to use it on a device; an upper bound."""
    return layer.payload.nbytes + payload_index_nbytes(payload_info(layer.payload))


def _outside_nbytes(model: nn.Module, inside: set[int]) -> tuple[int, int]:
    """Bytes on the device of all that is not a payload of a block, and of the largest matrix that is decoded whole."""
    nbytes, decoded = other_nbytes(model), 0
    for module in model.modules():
        if not isinstance(module, CompressedModule) or id(module) in inside:
            continue
        if isinstance(module, DCEmbedding):
            nbytes += module.num_weights  # rows are resident as they are
            continue
        nbytes += _stored_nbytes(module)
        if codec_named(module.codec).decoded_whole:
            decoded = max(decoded, module.num_weights)
    return nbytes, decoded


def _spread(
    blocks: list[DeviceBlock], room: int, nbytes: Callable[[DeviceBlock], int]
) -> list[DeviceBlock]:
    """As many blocks as fit, evenly spread."""
    stays = spread_evenly([nbytes(block) for block in blocks], room)
    return list(itertools.compress(blocks, stays))
