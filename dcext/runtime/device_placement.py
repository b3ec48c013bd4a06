"""Takes the weights of a model to a device: each rests there, or waits elsewhere for its decoder block to be called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dcext import _C
from dcext.nn.compressed import CompressedModule
from dcext.nn.device import IndexedWeight, batch_decodes, blocks_of, named_blocks
from dcext.nn.embedding import DCEmbedding
from dcext.policy.decide import SLOTS
from dcext.policy.predict import place_and_codec
from dcext.runtime.device_stream import DeviceStream, FromFile, HostDecoded
from dcext.runtime.host_stream import StreamedWeight
from dcext.runtime.placement import OFFLOAD_ATTRIBUTE, Offload, other_nbytes
from dcext.runtime.traveling import Part, TravelingBlock
from dcext.runtime.weights import Weight, all_weights

DECODED_THERE = ", decoded there"


@dataclass
class _Carrier:
    """One placement under way.

    Attributes:
        travels: bytes that each weight copies to the device.
        waiting_nbytes: host memory of what travels.
    """

    tiers: Mapping[str, str]
    device: torch.device
    read: Callable[[int], None]
    moved: Callable[[Weight], None]
    travels: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    waiting_nbytes: int = 0

    def rest(self, weight: Weight) -> None:
        """On the device."""
        codec = place_and_codec(self.tiers[weight.name])[1]
        if not all(_rests_on(module, codec, self.device) for module in weight.modules):
            payload = weight.payload(codec, self.read)
            for module in weight.modules:
                module.rest_on(payload, self.device)
        self.moved(weight)

    def units(
        self,
        moving: Sequence[TravelingBlock],
        layers: Sequence[Sequence[tuple[Weight, CompressedModule]]],
    ) -> Iterator[list[Part]]:
        """Parts of block after block, of which one at a time is in host memory twice."""
        for traveling, members in zip(moving, layers, strict=True):
            for weight, layer in members:
                self._count(weight, self._add(traveling, weight, layer))
                layer.move_all_but_payload(self.device)
            yield traveling.take_parts()
            for weight, layer in members:
                if layer is weight.module:
                    self.moved(weight)

    def _add(
        self, traveling: TravelingBlock, weight: Weight, layer: CompressedModule
    ) -> list[Part]:
        assert weight.origin is not None
        tier = self.tiers[weight.name]
        place, codec = place_and_codec(tier)
        if place == "disk":
            return traveling.add_from_file(layer, weight.origin, self.device)
        payload = weight.payload(codec, self.read)
        return traveling.add(layer, payload, self.device, decoded=tier.endswith(DECODED_THERE))

    def _count(self, weight: Weight, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, FromFile):
                self.travels[weight.name] += part.origin.nbytes
            elif isinstance(part, HostDecoded):
                self.travels[weight.name] += weight.module.num_weights
                self.waiting_nbytes += part.payload.nbytes
            else:
                self.travels[weight.name] += part.nbytes
                self.waiting_nbytes += part.nbytes


@torch.inference_mode(False)  # what is made in it could not be changed outside of it
def place_on_device(
    model: nn.Module,
    tiers: Mapping[str, str],
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
        RuntimeError: dcext was built without CUDA, and something is decoded there or travels.
        ValueError: frames on the disk have matches, which a device cannot decode.
    """
    needs_cuda = [tier for tier in tiers.values() if tier not in ("device/raw", "device/packed")]
    if device.type == "cuda" and needs_cuda and not _C.with_cuda:
        raise RuntimeError(
            f"plan: {needs_cuda[0]}: expected a build with DCEXT_CUDA=1, got one without CUDA"
        )
    device = torch.empty(0, device=device).device  # with its number
    weights = all_weights(model)
    _stop_travels(model)
    traveling = [weight for weight in weights if not _rests(tiers[weight.name])]
    for weight in traveling:
        for module in weight.modules:
            module.wait_in_file()
    carrier = _Carrier(tiers, device, read, moved)
    resting = [weight for weight in weights if _rests(tiers[weight.name])]
    for weight in sorted(resting, key=lambda weight: tiers[weight.name] == "device/raw"):
        carrier.rest(weight)  # what makes room first
    blocks = named_blocks(model)
    for block in blocks.values():
        batch_decodes(block)
    stream = _start_travels(carrier, model, blocks, traveling, reads_nbytes)
    model.to(device)
    result = Offload(
        tiers={weight.name: place_and_codec(tiers[weight.name])[0] for weight in weights},
        nbytes={w.name: carrier.travels.get(w.name) or _resting_nbytes(w) for w in weights},
        memory_nbytes=carrier.waiting_nbytes + _host_nbytes(weights, stream),
        device_nbytes=_device_nbytes(model, weights, stream, list(blocks.values())),
        device_stream=stream,
    )
    setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


def check_device_tiers(
    model: nn.Module, weights: Sequence[Weight], tiers: Mapping[str, str]
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
        if _rests(tier):
            continue
        outside = [m for m in weight.modules if id(m) not in inside or isinstance(m, DCEmbedding)]
        if outside:
            raise ValueError(
                f"plan: {name}: expected device/CODEC outside of decoder blocks, and for embeddings, found {tier!r}"
            )
        if weight.origin is None:
            raise ValueError(
                f"plan: {name}: {tier!r}: expected a payload from a checkpoint, got one that is not in a file: save the "
                "model and load it with from_pretrained"
            )


def _start_travels(
    carrier: _Carrier,
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    traveling: Sequence[Weight],
    reads_nbytes: int,
) -> DeviceStream | None:
    block_of = blocks_of(model)
    members: dict[str, list[tuple[Weight, CompressedModule]]] = {name: [] for name in blocks}
    for weight in traveling:
        for module in weight.modules:
            members[block_of[id(module)]].append((weight, module))
    members = {name: layers for name, layers in members.items() if layers}
    if not members:
        return None
    moving = [TravelingBlock(blocks[name], unit) for unit, name in enumerate(members)]
    stream = DeviceStream(
        carrier.units(moving, list(members.values())),
        carrier.device,
        num_slots=SLOTS,
        reads_nbytes=reads_nbytes,
    )
    for block in moving:
        block.start(stream)
    return stream


def _stop_travels(model: nn.Module) -> None:
    """Gives up the memory of an earlier placement."""
    for module in model.modules():
        if isinstance(module, CompressedModule) and module.travels_with is not None:
            module.travels_with.stop()
    setattr(model, OFFLOAD_ATTRIBUTE, None)


def _rests(tier: str) -> bool:
    return tier.startswith("device/")


def _rests_on(module: CompressedModule, codec: str, device: torch.device) -> bool:
    resting = module.resting
    if resting is None or isinstance(resting, StreamedWeight):
        return False
    return not module.is_in_file and module.codec == codec and resting.device == device


def _resting_nbytes(weight: Weight) -> int:
    """Bytes on the device of a weight that rests there: payload, index, rows of embeddings."""
    found = {}
    for module in weight.modules:
        resting = module.resting
        if resting is not None and not isinstance(resting, StreamedWeight):
            found[id(resting)] = resting.nbytes
        if isinstance(module, DCEmbedding):
            found[id(module)] = module.rows_nbytes
    return sum(found.values())


def _decoded_nbytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of matrices that are decoded together."""
    return sum(
        layer.num_weights
        for layer in layers
        if isinstance(layer, CompressedModule)
        and isinstance(layer.resting, IndexedWeight)
        and layer.resting.view is None
    )


def _device_nbytes(
    model: nn.Module,
    weights: Sequence[Weight],
    stream: DeviceStream | None,
    blocks: Sequence[nn.Module],
) -> int:
    """What is there: weights and all that is not compressed, slots, room for what is decoded together."""
    resting = sum(_resting_nbytes(w) for w in weights if w.module.travels_with is None)
    slots = 0 if stream is None else sum(slot.nbytes for slot in stream.slots)
    inside = blocks_of(model)
    together = [_decoded_nbytes(block.modules()) for block in blocks]
    together += [_decoded_nbytes([m]) for m in model.modules() if id(m) not in inside]
    return other_nbytes(model) + resting + slots + max(together)


def _host_nbytes(weights: Sequence[Weight], stream: DeviceStream | None) -> int:
    """Payloads that stay on the host as rows of theirs rest decoded; buffers on the way."""
    kept = sum(
        module.payload.nbytes
        for weight in weights
        for module in weight.modules
        if isinstance(module, DCEmbedding) and module.resting is None
    )
    if stream is None:
        return kept
    return kept + stream.ring_nbytes + (0 if stream.disk is None else stream.disk.slots_nbytes)
