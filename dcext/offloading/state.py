"""Where the weights of a model are, and what streaming them takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from dcext.nn.compressed import CompressedModule
from dcext.policy.timeline import SLOTS_NBYTES
from dcext.sizes import format_nbytes
from dcext.weights.device_stream import DeviceStream
from dcext.weights.host_stream import HostStream, StreamStatistics

OFFLOAD_ATTRIBUTE = "dcext_offload"
LEAST_SLOTS_NBYTES = 2 << 20  # four reads of 512 KiB: as fast where layers are small and lie apart
SLOTS_SHARE = 4  # of the budget, one part, where that is less


@dataclass(frozen=True)
class DeviceStatistics:
    """What a device stream has done since it was made.

    Attributes:
        copied_nbytes: bytes copied to the device.
        blocks: calls of blocks whose weights are copied.
        hits: calls whose weights were on the device or on their way.
        late: calls whose weights were still on their way.
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
        tiers: ``"memory"`` or ``"disk"`` for each payload, by the name of its module; on a device ``"device"``, ``"host"`` or
            ``"disk"``. After ``offload`` with ``device_memory`` of each decoder block instead; the rest is on the device.
        nbytes: bytes of each; of weights on the host, those that are copied to the device.
        memory_nbytes: bytes of weights in host memory: payloads, all that is not compressed, and room for reads.
        device_nbytes: bytes of weights on the device, slots and room to decode; 0 without one.
        stream: None where nothing is read from files.
        device_stream: None where nothing is copied to a device.
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
        return type(None), ()  # copies and pickles of a model are in host memory

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


def slots_for(budget: int | None) -> int:
    """Bytes to read into under a budget of host memory; None for no bound."""
    if budget is None:
        return SLOTS_NBYTES
    return min(SLOTS_NBYTES, max(LEAST_SLOTS_NBYTES, budget // SLOTS_SHARE))


def other_nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that are no payloads, shared ones counted once."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or (isinstance(module, CompressedModule) and name == "payload"):
                continue
            tensors[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def offload_of(model: Any) -> Offload | None:
    """What ``offload`` last returned for a model, or None."""
    return getattr(model, OFFLOAD_ATTRIBUTE, None)
