"""Runs models that are larger than the memory they are given: what does not fit stays in its files and is streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dcext.nn.compressed import CompressedModule
from dcext.nn.embedding import DCEmbedding
from dcext.runtime.budget import format_nbytes, parse_nbytes
from dcext.runtime.host_stream import HostStream, StreamedWeight, StreamStatistics
from dcext.runtime.origin import Origin

OFFLOAD_ATTRIBUTE = "dcext_offload"
# Of reads: 32 of 2 MiB, which bridge 20 ms at 3 GB/s, longer than anything that is not a layer takes.
SLOTS_NBYTES = 64 << 20
LEAST_SLOTS_NBYTES = 8 << 20
SLOTS_SHARE = 8  # of the budget, one part, where that is less


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
class Offload:
    """Where the weights of a model are, and what streaming them took.

    Attributes:
        tiers: ``"memory"`` or ``"disk"`` for each payload, by the name of its module.
        nbytes: bytes of each payload.
        memory_nbytes: bytes of weights in memory: payloads, all that is not compressed, and room for reads.
        stream: None where everything fits.
    """

    tiers: dict[str, str]
    nbytes: dict[str, int]
    memory_nbytes: int
    stream: HostStream | None

    @property
    def streamed_nbytes(self) -> int:
        """Bytes that are read from files in a forward pass, rows of embeddings aside."""
        return sum(self.nbytes[name] for name, tier in self.tiers.items() if tier == "disk")

    def statistics(self) -> StreamStatistics | None:
        """What the stream did so far; None where everything fits."""
        return None if self.stream is None else self.stream.statistics()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model rest in memory

    def __str__(self) -> str:
        disk = [name for name, tier in self.tiers.items() if tier == "disk"]
        if not disk:
            return f"all {len(self.tiers)} weights in memory, {format_nbytes(self.memory_nbytes)}"
        statistics = self.statistics()
        return (
            f"{format_nbytes(self.memory_nbytes)} in memory; {len(disk)} of {len(self.tiers)} weights, "
            f"{format_nbytes(self.streamed_nbytes)}, streamed from disk\n{statistics}"
        )


def offload(
    model: nn.Module,
    *,
    host_memory: int | str,
    page_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Offload:
    """Keeps as many weights of a model in memory as a budget allows, and streams the others from their files.

    Outputs stay the same bit for bit. Streamed layers are read with large direct reads, panel by panel, ahead of their
    use; every chunk is compared with its checksum each time. May be called again with another budget, between forward
    passes. Do not alter the files meanwhile: that raises ``FormatError`` in the layer that needs them.

    Args:
        model: from ``dcext.from_pretrained``, on the CPU.
        host_memory: for weights, bytes or ``"4GiB"``: compressed or not, and room for reads. The cache of past tokens
            and activations come on top.
        page_cache: whether the system may also keep pages of the files in memory that is not counted here.
        progress: called with the number of bytes that were read into memory since the last call.

    Returns:
        Where each weight is, with statistics; also ``model.dcext_offload``.

    Raises:
        ValueError: the model does not come from files, is not on the CPU, or the budget is too small: by how much.
        FormatError: what is read into memory is damaged.
    """
    budget = parse_nbytes("host_memory", host_memory)
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
    stream = _place(weights, resident, slots_nbytes, page_cache, progress or (lambda nbytes: None))
    kept = sum(weight.nbytes for weight in weights if weight.name in resident)
    result = Offload(
        tiers={w.name: "memory" if w.name in resident else "disk" for w in weights},
        nbytes={weight.name: weight.nbytes for weight in weights},
        memory_nbytes=others + kept + (0 if stream is None else stream.slots_nbytes),
        stream=stream,
    )
    setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


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
