"""Takes the weights of a model to a device: each is resident there, or copied there ahead of the calls of its block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dcext import _C
from dcext.nn.compressed import CompressedModule
from dcext.nn.embedding import DCEmbedding
from dcext.nn.placement import batch_decodes, blocks_of, compressed_blocks
from dcext.offloading.prefetched_block import Part, PrefetchedBlock
from dcext.offloading.state import OFFLOAD_ATTRIBUTE, Offload, other_nbytes
from dcext.offloading.weights import Weight, all_weights
from dcext.policy.decide import SLOTS
from dcext.policy.tier import Tier
from dcext.weights.device_stream import DeviceStream, FromFile, HostDecoded
from dcext.weights.host_stream import StreamedWeight
from dcext.weights.indexed import IndexedWeight


@dataclass
class _Carrier:
    """One placement under way.

    Attributes:
        copied_nbytes: bytes of each weight that are copied to the device for a call.
        waiting_nbytes: host memory of what is copied.
    """

    tiers: Mapping[str, Tier]
    device: torch.device
    read: Callable[[int], None]
    moved: Callable[[Weight], None]
    copied_nbytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    waiting_nbytes: int = 0

    def make_resident(self, weight: Weight) -> None:
        """Keeps a weight on the device."""
        codec = self.tiers[weight.name].codec
        if not all(_is_resident_on(module, codec, self.device) for module in weight.modules):
            payload = weight.payload(codec, self.read)
            for module in weight.modules:
                module.make_resident(payload, self.device)
        self.moved(weight)

    def units(
        self,
        moving: Sequence[PrefetchedBlock],
        layers: Sequence[Sequence[tuple[Weight, CompressedModule]]],
    ) -> Iterator[list[Part]]:
        """Parts of block after block, of which one at a time is in host memory twice."""
        for prefetched, members in zip(moving, layers, strict=True):
            for weight, layer in members:
                self._count(weight, self._add(prefetched, weight, layer))
                layer.move_all_but_payload(self.device)
            yield prefetched.take_parts()
            for weight, layer in members:
                if layer is weight.module:
                    self.moved(weight)

    def _add(
        self, prefetched: PrefetchedBlock, weight: Weight, layer: CompressedModule
    ) -> list[Part]:
        assert weight.origin is not None
        tier = self.tiers[weight.name]
        if tier.place == "disk":
            return prefetched.add_from_file(layer, weight.origin, self.device)
        payload = weight.payload(tier.codec, self.read)
        return prefetched.add(layer, payload, self.device, decoded=tier.decoded_by_host)

    def _count(self, weight: Weight, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, FromFile):
                self.copied_nbytes[weight.name] += part.origin.nbytes
            elif isinstance(part, HostDecoded):
                self.copied_nbytes[weight.name] += weight.module.num_weights
                self.waiting_nbytes += part.payload.nbytes
            else:
                self.copied_nbytes[weight.name] += part.nbytes
                self.waiting_nbytes += part.nbytes


@torch.inference_mode(False)  # what is made in it could not be changed outside of it
def place_on_device(
    model: nn.Module,
    tiers: Mapping[str, Tier],
    device: torch.device,
    reads_nbytes: int,
    *,
    read: Callable[[int], None],
    moved: Callable[[Weight], None],
) -> Offload:
    """Carries tiers out that are known to exist (``check_device_tiers``), for a model on the CPU or on the device.

    Payloads come from files, verified, where there are files, one block at a time, so that host memory never holds the
    model twice. What fails leaves a model that does not run until it is placed again.

    Args:
        model: between its passes.
        tiers: of every weight: ``device/CODEC``; in decoder blocks also ``host/CODEC``, ``host/CODEC, decoded there`` and
            ``disk/CODEC``.
        device: where the model runs from now on.
        reads_nbytes: host memory to read into, if some are on the disk.
        read: called with the number of bytes that were read from files since the last call.
        moved: called with each weight that is where it shall be.

    Returns:
        Where each weight is, and what that takes; also the model's.

    Raises:
        FormatError: a file is damaged.
        RuntimeError: dcext was built without CUDA, and something is decoded there or copied there.
        ValueError: frames on the disk have matches, which a device cannot decode.
    """
    needs_cuda = [
        tier
        for tier in tiers.values()
        if tier not in (Tier("device", "raw"), Tier("device", "packed"))
    ]
    if device.type == "cuda" and needs_cuda and not _C.with_cuda:
        raise RuntimeError(
            f"plan: {needs_cuda[0]}: expected a build with DCEXT_CUDA=1, got one without CUDA"
        )
    device = torch.empty(0, device=device).device  # with its number
    weights = all_weights(model)
    _stop_prefetching(model)
    prefetched = [weight for weight in weights if not _is_resident(tiers[weight.name])]
    for weight in prefetched:
        for module in weight.modules:
            module.offload_to_file()
    carrier = _Carrier(tiers, device, read, moved)
    resident = [weight for weight in weights if _is_resident(tiers[weight.name])]
    for weight in sorted(resident, key=lambda weight: tiers[weight.name] == Tier("device", "raw")):
        carrier.make_resident(weight)  # what makes room first
    blocks = compressed_blocks(model)
    for block in blocks.values():
        batch_decodes(block)
    stream = _start_prefetching(carrier, model, blocks, prefetched, reads_nbytes)
    model.to(device)
    result = Offload(
        tiers={weight.name: tiers[weight.name].place for weight in weights},
        nbytes={w.name: carrier.copied_nbytes.get(w.name) or _resident_nbytes(w) for w in weights},
        memory_nbytes=carrier.waiting_nbytes + _host_nbytes(weights, stream),
        device_nbytes=_device_nbytes(model, weights, stream, list(blocks.values())),
        device_stream=stream,
    )
    setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


def check_device_tiers(
    model: nn.Module, weights: Sequence[Weight], tiers: Mapping[str, Tier]
) -> None:
    """Whether every weight has a tier, which it can have.

    Raises:
        ValueError: which has not.
    """
    inside = blocks_of(model)
    for weight in weights:
        name, tier = weight.name, tiers.get(weight.name)
        if tier is None:
            raise ValueError(
                f"plan: {name}: expected a tier of every layer, as the model moves, found none"
            )
        if _is_resident(tier):
            continue
        outside = [m for m in weight.modules if id(m) not in inside or isinstance(m, DCEmbedding)]
        if outside:
            raise ValueError(
                f"plan: {name}: expected device/CODEC outside of decoder blocks, and for embeddings, found {str(tier)!r}"
            )
        if weight.origin is None:
            raise ValueError(
                f"plan: {name}: {str(tier)!r}: expected a payload from a checkpoint, got one that is not in a file: save the "
                "model and load it with from_pretrained"
            )


def _start_prefetching(
    carrier: _Carrier,
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    prefetched: Sequence[Weight],
    reads_nbytes: int,
) -> DeviceStream | None:
    block_of = blocks_of(model)
    members: dict[str, list[tuple[Weight, CompressedModule]]] = {name: [] for name in blocks}
    for weight in prefetched:
        for module in weight.modules:
            members[block_of[id(module)]].append((weight, module))
    members = {name: layers for name, layers in members.items() if layers}
    if not members:
        return None
    moving = [PrefetchedBlock(blocks[name], unit) for unit, name in enumerate(members)]
    stream = DeviceStream(
        carrier.units(moving, list(members.values())),
        carrier.device,
        num_slots=SLOTS,
        reads_nbytes=reads_nbytes,
    )
    for block in moving:
        block.start(stream)
    return stream


def _stop_prefetching(model: nn.Module) -> None:
    """Gives up the memory of an earlier placement."""
    for module in model.modules():
        if isinstance(module, CompressedModule) and module.prefetched_by is not None:
            module.prefetched_by.stop()
    setattr(model, OFFLOAD_ATTRIBUTE, None)


def _is_resident(tier: Tier) -> bool:
    return tier.place == "device"


def _is_resident_on(module: CompressedModule, codec: str, device: torch.device) -> bool:
    backing = module.backing
    if backing is None or isinstance(backing, StreamedWeight):
        return False
    return not module.is_in_file and module.codec == codec and backing.device == device


def _resident_nbytes(weight: Weight) -> int:
    """Bytes on the device of a weight that is resident there: payload, index, rows of embeddings."""
    found = {}
    for module in weight.modules:
        backing = module.backing
        if backing is not None and not isinstance(backing, StreamedWeight):
            found[id(backing)] = backing.nbytes
        if isinstance(module, DCEmbedding):
            found[id(module)] = module.rows_nbytes
    return sum(found.values())


def _decoded_nbytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of matrices that are decoded together."""
    return sum(
        layer.num_weights
        for layer in layers
        if isinstance(layer, CompressedModule)
        and isinstance(layer.backing, IndexedWeight)
        and layer.backing.view is None
    )


def _device_nbytes(
    model: nn.Module,
    weights: Sequence[Weight],
    stream: DeviceStream | None,
    blocks: Sequence[nn.Module],
) -> int:
    """What is there: weights and all that is not compressed, slots, room for what is decoded together."""
    resident = sum(_resident_nbytes(w) for w in weights if w.module.prefetched_by is None)
    slots = 0 if stream is None else sum(slot.nbytes for slot in stream.slots)
    inside = blocks_of(model)
    together = [_decoded_nbytes(block.modules()) for block in blocks]
    together += [_decoded_nbytes([m]) for m in model.modules() if id(m) not in inside]
    return other_nbytes(model) + resident + slots + max(together)


def _host_nbytes(weights: Sequence[Weight], stream: DeviceStream | None) -> int:
    """Payloads that stay on the host as rows of theirs are resident decoded; buffers on the way."""
    kept = sum(
        module.payload.nbytes
        for weight in weights
        for module in weight.modules
        if isinstance(module, DCEmbedding) and module.backing is None
    )
    if stream is None:
        return kept
    return kept + stream.ring_nbytes + (0 if stream.disk is None else stream.disk.slots_nbytes)
