"""Runs models that are larger than the memory they are given: what does not fit is streamed while they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcext.nn.compressed import CompressedModule
from dcext.nn.embedding import DCEmbedding
from dcext.runtime.budget import format_nbytes, parse_nbytes
from dcext.runtime.device_offload import place_on_device, plan_device
from dcext.runtime.device_stream import DeviceStream
from dcext.runtime.host_stream import HostStream, StreamedWeight, StreamStatistics
from dcext.runtime.origin import Origin

OFFLOAD_ATTRIBUTE = "dcext_offload"
# Of reads: 16 of 1 MiB, which fit in a last-level cache. With 64 MiB layers were read 10 to 15 % slower at 2.6 GB/s.
SLOTS_NBYTES = 16 << 20
LEAST_SLOTS_NBYTES = 8 << 20
SLOTS_SHARE = 4  # of the budget, one part, where that is less


@dataclass(frozen=True)
class Weight:
    """A payload and the modules that share it.

    Attributes:
        name: of the first module.
        modules: all of them.
        origin: where it can be read.
        nbytes: of the payload.
    """

    name: str
    modules: list[CompressedModule]
    origin: Origin
    nbytes: int

    @property
    def is_looked_up(self) -> bool:
        """Whether a token needs a few rows of it only."""
        return all(isinstance(module, DCEmbedding) for module in self.modules)


@dataclass(frozen=True)
class DeviceStatistics:
    """What a device stream has done since it was made.

    Attributes:
        copied_nbytes: bytes copied to the device.
        blocks: calls of blocks that travel.
        hits: of those, calls whose weights were there or on their way.
        late: of those, on their way still.
        stall_s: seconds that the host spent in asking for weights.
    """

    copied_nbytes: int
    blocks: int
    hits: int
    late: int
    stall_s: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"copied {self.copied_nbytes / 1e9:.2f} GB for {self.blocks} blocks, {self.hits} of them ahead of their call "
            f"({self.late} not yet done), asking took {self.stall_s:.2f} s"
        )


@dataclass(frozen=True)
class Offload:
    """Where the weights of a model are, and what streaming them took.

    Attributes:
        tiers: ``"memory"`` or ``"disk"`` for each payload, by the name of its module; with ``device_memory`` ``"device"``,
            ``"host"`` or ``"disk"`` for each decoder block; the rest is on the device.
        nbytes: bytes of each.
        memory_nbytes: bytes of weights in host memory: payloads, all that is not compressed, and room for reads.
        device_nbytes: bytes of weights on the device, slots and room to decode; 0 without ``device_memory``.
        stream: None where nothing is read from files.
        device_stream: None where nothing travels to a device.
    """

    tiers: dict[str, str]
    nbytes: dict[str, int]
    memory_nbytes: int
    device_nbytes: int = 0
    stream: HostStream | None = None
    device_stream: DeviceStream | None = None

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that are read from files, or copied to the device, in a forward pass; rows of embeddings aside."""
        return sum(self.nbytes[name] for name in self._away())

    def _away(self) -> list[str]:
        return [name for name, tier in self.tiers.items() if tier in ("disk", "host")]

    def statistics(self) -> StreamStatistics | DeviceStatistics | None:
        """What the stream did so far; None where everything fits."""
        if self.device_stream is not None:
            counts = self.device_stream.statistics()
            return DeviceStatistics(
                counts["copied_nbytes"],
                counts["begins"],
                counts["hits"],
                counts["late"],
                counts["stall_ns"] / 1e9,
            )
        return None if self.stream is None else self.stream.statistics()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model rest in memory

    def __str__(self) -> str:
        away, place = self._away(), "memory"
        nbytes = self.memory_nbytes
        if self.device_nbytes > 0:
            place, nbytes = "device memory", self.device_nbytes
        if not away:
            return f"all {len(self.tiers)} weights in {place}, {format_nbytes(nbytes)}"
        where = "disk"
        if self.device_nbytes > 0:
            disk = [name for name in away if self.tiers[name] == "disk"]
            where = f"host memory, {len(disk)} of them from disk" if disk else "host memory"
        return (
            f"{format_nbytes(nbytes)} in {place}; {len(away)} of {len(self.tiers)} weights, "
            f"{format_nbytes(self.streamed_nbytes)}, streamed from {where}\n{self.statistics()}"
        )


def offload(
    model: nn.Module,
    *,
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    device: torch.device | str = "cuda",
    mode: str = "auto",
    page_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Offload:
    """Keeps as many weights of a model in memory as a budget allows, and streams the others while the model runs.

    Outputs stay the same bit for bit. May be called again with another budget, between forward passes.

    - ``host_memory`` alone, on the CPU: layers that do not fit stay in their files and are read with large direct reads,
      panel by panel, ahead of their use; every chunk is compared with its checksum each time. Do not alter the files
      meanwhile: that raises ``FormatError`` in the layer that needs them.
    - ``device_memory``: the model runs on a device; decoder blocks that do not fit there wait in pinned host memory, those
      that do not fit in ``host_memory`` either stay in their files, and all are copied ahead of their use (not yet run on
      a GPU). Call blocks, not layers inside of them.

    Args:
        model: from ``dcext.from_pretrained``, on the CPU.
        host_memory: for weights, bytes or ``"4GiB"``: compressed or not, and room for reads. The cache of past tokens
            and activations come on top.
        device_memory: for weights on the device, slots for what travels and room to decode; likewise.
        device: with ``device_memory``, where the model runs.
        mode: with ``device_memory``, how weights travel: ``"device"``, as they are stored, to be decoded there; ``"host"``,
            decoded by the host on their way; ``"raw"``, decoded once and copied as INT8; ``"auto"``: ``"device"``.
        page_cache: with ``host_memory`` alone, whether the system may also keep pages of the files in memory that is not
            counted here.
        progress: called with the number of bytes that were read into memory since the last call.

    Returns:
        Where each weight is, with statistics; also ``model.dcext_offload``.

    Raises:
        ValueError: the model does not come from files, is not on the CPU, or a budget is too small: by how much.
        FormatError: what is read into memory is damaged.
        RuntimeError: there is no such device, or dcext was built without CUDA.
    """
    report = progress or (lambda nbytes: None)
    if device_memory is not None:
        budget = parse_nbytes("device_memory", device_memory)
        host = None if host_memory is None else parse_nbytes("host_memory", host_memory)
        result = _offload_to_device(model, torch.device(device), budget, host, mode, report)
    elif host_memory is not None:
        budget = parse_nbytes("host_memory", host_memory)
        result = _offload_to_disk(model, budget, page_cache, report)
    else:
        raise ValueError("offload: expected host_memory or device_memory, got neither")
    setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


def _offload_to_device(
    model: nn.Module,
    device: torch.device,
    budget: int,
    host_budget: int | None,
    mode: str,
    progress: Callable[[int], None],
) -> Offload:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"offload: device: expected a GPU for device_memory, as torch finds none, got {str(device)!r}"
        )
    _weights(model)  # all from files, on the CPU
    mode = "device" if mode == "auto" else mode
    plan = plan_device(model, mode, budget, host_budget)
    stream = place_on_device(model, plan, device, mode, progress)
    tiers = {block.name: "device" for block in plan.resting}
    tiers |= {block.name: "host" for block in plan.traveling}
    tiers |= {block.name: "disk" for block in plan.from_disk}
    nbytes = {block.name: block.device_nbytes for block in [*plan.resting, *plan.traveling]}
    return Offload(
        tiers=tiers,
        nbytes=nbytes,
        memory_nbytes=plan.host_nbytes,
        device_nbytes=plan.device_nbytes,
        device_stream=stream,
    )


def _offload_to_disk(
    model: nn.Module, budget: int, page_cache: bool, progress: Callable[[int], None]
) -> Offload:
    weights = _weights(model)
    others = _other_nbytes(model)
    total = sum(weight.nbytes for weight in weights)
    resident = {weight.name for weight in weights}
    slots_nbytes = 0
    if others + total > budget:
        slots_nbytes = min(SLOTS_NBYTES, max(LEAST_SLOTS_NBYTES, budget // SLOTS_SHARE))
        room = budget - others - slots_nbytes
        if room < 0:
            least = others + LEAST_SLOTS_NBYTES
            raise ValueError(
                f"host_memory: expected at least {least} bytes ({format_nbytes(least)}): {format_nbytes(others)} that "
                f"are not compressed and {format_nbytes(LEAST_SLOTS_NBYTES)} to read into; got {budget}"
            )
        resident = _choose_resident(weights, room)
    stream = _place(weights, resident, slots_nbytes, page_cache, progress)
    kept = sum(weight.nbytes for weight in weights if weight.name in resident)
    return Offload(
        tiers={w.name: "memory" if w.name in resident else "disk" for w in weights},
        nbytes={weight.name: weight.nbytes for weight in weights},
        memory_nbytes=others + kept + (0 if stream is None else stream.slots_nbytes),
        stream=stream,
    )


def _weights(model: nn.Module) -> list[Weight]:
    """All payloads, in the order of the modules that use them."""
    found: dict[tuple[int, str], Weight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, CompressedModule):
            continue
        if module.row_scale.device.type != "cpu":
            raise ValueError(
                f"offload: {name}: expected the CPU, got a module on {module.row_scale.device}"
            )
        origin = module.origin
        if origin is None:
            raise ValueError(
                f"offload: {name}: expected a payload from a checkpoint, got one that is not in a file: save the model "
                "and load it with from_pretrained"
            )
        key = id(origin.reader), origin.name
        if key in found:
            found[key].modules.append(module)
        else:
            found[key] = Weight(name, [module], origin, origin.nbytes)
    if not found:
        raise ValueError("offload: model: expected compressed layers, found none")
    return list(found.values())


def _other_nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that are no payloads, shared ones counted once."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or (isinstance(module, CompressedModule) and name == "payload"):
                continue
            tensors[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def _choose_resident(weights: list[Weight], room: int) -> set[str]:
    """Names of what stays in memory: nothing that is only looked up, and evenly many of the others.

    All bytes of layers cost the same to stream. Spread evenly, those in memory give the disk time to read ahead.
    """
    layers = [weight for weight in weights if not weight.is_looked_up]
    total = sum(weight.nbytes for weight in layers)
    chosen: set[str] = set()
    share = min(1.0, room / max(total, 1))
    credit = 0.0
    left = room
    for weight in layers:
        credit += share * weight.nbytes
        if weight.nbytes <= min(credit, left):
            chosen.add(weight.name)
            credit -= weight.nbytes
            left -= weight.nbytes
    # What is left over goes to whatever still fits, embeddings last.
    for weight in sorted(weights, key=lambda weight: weight.is_looked_up):
        if weight.name not in chosen and weight.nbytes <= left:
            chosen.add(weight.name)
            left -= weight.nbytes
    return chosen


def _place(
    weights: list[Weight],
    resident: set[str],
    slots_nbytes: int,
    page_cache: bool,
    progress: Callable[[int], None],
) -> HostStream | None:
    """Moves payloads; first those that leave memory, then those that come."""
    streamed = [weight for weight in weights if weight.name not in resident]
    stream = None
    if streamed:
        origins = {weight.name: weight.origin for weight in streamed}
        stream = HostStream(origins, slots_nbytes, page_cache=page_cache)
        for unit, weight in enumerate(streamed):
            view = weight.origin.view()
            for module in weight.modules:
                module.rest_in_file(view, StreamedWeight(stream, unit))
    for weight in weights:
        if weight.name in resident and weight.modules[0].is_in_file:
            payload = weight.origin.load(progress)
            for module in weight.modules:
                module.rest_in_memory(payload)
    return stream


def offload_of(model: Any) -> Offload | None:
    """What ``offload`` last returned for a model, or None."""
    return getattr(model, OFFLOAD_ATTRIBUTE, None)
