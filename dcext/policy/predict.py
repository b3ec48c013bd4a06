"""How long a forward pass takes, by where the weights of its layers are.

Every layer, in its tier, takes seconds of resources that work side by side: what computes, the link to the device, the
disk, and the host where it decodes for a device. A pass in which they overlap takes as long as the slowest of them,

    pipelined_s = max(other_s + sum compute_s, sum link_s, sum disk_s, sum host_s)

and one in which they wait for each other the sum of all. Where a CPU reads layers from the disk, ``dcext.policy.timeline``
adds what cannot overlap, since no more is read ahead than its slots hold. ``other_s`` is what is not a compressed layer:
attention, norms, Python. What is decoded on a device brings its index over the link, too. For one layer of M int8 bytes,
ratio r, link B_l and decode B_d these are the design's ``max(L, D, T_c)`` and ``L + D + T_c`` with ``L = M / (r B_l)``,
``D = M / B_d``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dcext.codecs import codec_named
from dcext.policy.machine import Machine, Processor, Table, interpolate
from dcext.policy.tier import HOST_DECODE, Tier
from dcext.policy.timeline import SLOTS_NBYTES, pass_s, slots_of

RESOURCES = ("compute", "link", "disk", "host")
COMPUTE, LINK, DISK, HOST = range(len(RESOURCES))
WAITS = 1.02  # a pass so much longer than its slowest resource waits for the disk
# A read that nobody knew of ahead: what a disk of any speed takes to begin (NVMe 0.1 ms, network disks more).
LOOKUP_LATENCY_S = 2e-4
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """What is placed as one: a payload, and the modules that share it.

    Attributes:
        name: of its first module.
        shape: ``(out_features, in_features)``.
        multiplied: how many modules multiply it in a pass.
        looked_up: how many look up rows of it: embeddings.
        nbytes: of its payload, by codec; those it can have.
        index_nbytes: beside its payload on a device, by codec; an upper bound (``dcext.policy.footprint``).
        block: name of the decoder block that it lies in; None outside of blocks, whose units are always resident on a device.
        file_codec: of its payload in a file, from which it can be read while the model runs; None without one.
        panels: that rows are decoded by, for look-ups.
        activations: ``"int8"`` or ``"none"``.
    """

    name: str
    shape: tuple[int, int]
    multiplied: int
    looked_up: int
    nbytes: Mapping[str, int]
    index_nbytes: Mapping[str, int] = field(default_factory=dict)
    block: str | None = None
    file_codec: str | None = None
    panels: int = 1
    activations: str = "int8"

    @property
    def weights(self) -> int:
        """Of the matrix, which is also its size as INT8."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> tuple[int, int, int, int, str]:
        """Equal for units whose layers take equal times."""
        return (*self.shape, self.multiplied, self.looked_up, self.activations)

    def device_nbytes(self, codec: str) -> int:
        """Bytes on a device in a codec, whether it is resident there or copied there."""
        return self.nbytes.get(codec, self.weights) + self.index_nbytes.get(codec, 0)


@dataclass(frozen=True)
class ObservedDisk:
    """What layers on the disk cost while a model runs.

    Attributes:
        gbps: that reading them gives.
        read_s: seconds that each read, of a slot or less, costs who computes though the disk keeps up: threads wake, processors
            are shared.
    """

    gbps: float
    read_s: float


@dataclass
class Observed:
    """Times of a model that were taken while it ran.

    Attributes:
        layer_s: seconds of a unit by its kind and codec, and number of tokens.
        other_s: seconds of a pass outside of layers, by number of tokens.
        threads: that there were then; None for all.
        disk: what layers on the disk cost, by the memory that there is to read into; empty where nothing was read.
    """

    layer_s: dict[tuple[object, str], dict[int, float]] = field(default_factory=dict)
    other_s: dict[int, float] = field(default_factory=dict)
    threads: int | None = None
    disk: dict[int, ObservedDisk] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """Of a forward pass.

    Attributes:
        tokens: of the pass.
        other_s: seconds outside of layers.
        resources_s: seconds of each of ``RESOURCES``, ``other_s`` included in that which computes.
        pipelined_s: seconds where resources overlap, as they do.
    """

    tokens: int
    other_s: float
    resources_s: tuple[float, ...]
    pipelined_s: float

    @property
    def serial_s(self) -> float:
        """Seconds if they did not."""
        return sum(self.resources_s)

    @property
    def binds(self) -> str:
        """The resource that decides; the disk also where a CPU waits for it though it is idle at other times."""
        waits = self.resources_s[DISK] > 0 and self.pipelined_s > WAITS * max(self.resources_s)
        return "disk" if waits else RESOURCES[int(np.argmax(self.resources_s))]


class Predictor:
    """Times of units on a machine; corrected by what was observed."""

    def __init__(
        self,
        machine: Machine,
        threads: int | None = None,
        observed: Observed | None = None,
        slots_nbytes: int = SLOTS_NBYTES,
    ) -> None:
        """Args: slots_nbytes: memory to read layers into."""
        self.machine = machine
        self.threads = threads
        self.slots_nbytes = slots_nbytes
        self.host = machine.host_with(threads)
        self.observed = observed or Observed()
        self._known: dict[tuple[object, ...], Seconds] = {}

    @property
    def disk(self) -> ObservedDisk | None:
        """As observed with the memory nearest to what there is to read into, else as measured; None without one."""
        known = self.observed.disk
        if known:
            return known[min(known, key=lambda slots: abs(slots - self.slots_nbytes))]
        gbps = self.machine.disk_gbps
        return None if gbps is None else ObservedDisk(gbps, 0.0)

    @property
    def disk_gbps(self) -> float:
        """Of ``disk``; 0 without one."""
        return 0.0 if self.disk is None else self.disk.gbps

    def pieces(self, nbytes: int) -> int:
        """Reads that so many bytes of a layer take."""
        return -(-nbytes // slots_of(self.slots_nbytes)[1])

    def tiers(self, unit: Unit) -> list[Tier]:
        """Where a unit can be: in memory or on the disk, or with a device there, on the host or on the disk."""
        on_disk = []
        if unit.file_codec is not None and self.disk is not None:
            on_disk = [Tier("disk", unit.file_codec)]
        if self.machine.device is None:
            return [*(Tier("memory", codec) for codec in unit.nbytes), *on_disk]
        if (
            not unit.multiplied
        ):  # a row is looked up where the model runs, and is resident there as it is
            return [Tier("device", "raw")]
        resident = [Tier("device", codec) for codec in unit.nbytes]
        # Blocks bring their weights, and wait for them in a file.
        if unit.block is None or unit.file_codec is None:
            return resident
        waiting = [Tier("host", codec) for codec in unit.nbytes]
        decoded = [HOST_DECODE] if HOST_DECODE.codec in unit.nbytes else []
        return [*resident, *waiting, *decoded, *on_disk]

    def memory(self, unit: Unit, tier: Tier) -> tuple[int, int]:
        """Bytes of a unit in host and device memory."""
        codec = tier.codec
        nbytes = unit.nbytes[codec]
        if tier.place == "device":
            # Rows of embeddings are resident as they are, and if they do not lie in the payload that stays on the host.
            rows = unit.weights if unit.looked_up and codec != "raw" else 0
            # Outside of blocks a matrix is decoded by itself.
            decoded = unit.weights if unit.block is None and codec_named(codec).decoded_whole else 0
            return nbytes if rows else 0, unit.device_nbytes(codec) + rows + decoded
        if tier.place == "disk":
            return unit.index_nbytes.get(codec, 0) if self.machine.device is not None else 0, 0
        is_copied = tier.place == "host" and not tier.decoded_by_host
        return unit.device_nbytes(codec) if is_copied else nbytes, 0

    def modelled_s(
        self, unit: Unit, codec: str, tokens: int, processor: Processor | None = None
    ) -> float:
        """Seconds of a unit's layers where the model runs, its bytes being there, by the machine's figures alone."""
        processor = processor or self.machine.device or self.host
        nbytes = unit.nbytes[codec]
        taken = unit.multiplied * processor.seconds(codec, unit.weights, nbytes, tokens)
        decode = processor.decode_gweights.get(codec)
        if unit.looked_up and decode and self.machine.device is None:
            touched = min(tokens, unit.panels) / unit.panels * unit.weights
            taken += unit.looked_up * touched / (decode * 1e9)
        return taken

    def compute_s(self, unit: Unit, codec: str, tokens: int) -> float:
        """``modelled_s``, corrected by what was observed of units of its kind."""
        observed = self.observed.layer_s.get((unit.kind, codec))
        modelled = self.modelled_s(unit, codec, tokens)
        if not observed:
            return modelled
        then = self.machine.device or self.machine.host_with(self.observed.threads)
        factors = {
            n: seconds / max(self.modelled_s(unit, codec, n, then), 1e-9)
            for n, seconds in observed.items()
        }
        return modelled * _between(factors, tokens)

    def seconds(self, unit: Unit, tier: Tier, tokens: int) -> Seconds:
        """Seconds of each of ``RESOURCES``, ``(4,)``; not to be modified."""
        codec = tier.codec
        nbytes = unit.nbytes[codec], unit.device_nbytes(codec)
        key = (unit.kind, unit.panels, nbytes, tier, tokens)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._seconds(unit, tier, tokens)
        return known

    def _seconds(self, unit: Unit, tier: Tier, tokens: int) -> Seconds:
        taken = np.zeros(len(RESOURCES))
        place, codec = tier.place, tier.codec
        nbytes = unit.nbytes[codec]
        machine = self.machine
        if tier == HOST_DECODE:
            taken[HOST] = unit.weights / (self.host.decode_gweights[HOST_DECODE.codec] * 1e9)
            taken[LINK] = unit.weights / (machine.link_gbps * 1e9)  # type: ignore[operator]
            taken[COMPUTE] = self.compute_s(unit, "raw", tokens)
            return taken
        taken[COMPUTE] = self.compute_s(unit, codec, tokens)
        if place == "disk":
            self._add_disk(taken, unit, nbytes, tokens)
        if machine.link_gbps is not None and place in ("host", "disk"):
            taken[LINK] = unit.device_nbytes(codec) / (machine.link_gbps * 1e9)
        return taken

    def _add_disk(self, taken: Seconds, unit: Unit, nbytes: int, tokens: int) -> None:
        disk = self.disk
        assert disk is not None
        disk_s = 1 / (disk.gbps * 1e9)
        verify_s = 1 / (self.machine.verify_gbps * 1e9) if self.machine.verify_gbps else 0.0
        checks = HOST if self.machine.device is not None else COMPUTE
        taken[DISK] += unit.multiplied * nbytes * disk_s
        pieces = self.pieces(nbytes)
        taken[checks] += unit.multiplied * (nbytes * verify_s + pieces * disk.read_s)
        if unit.looked_up:
            # Nobody knows ahead which pieces: what runs waits for as many as tokens, drawn at random, fall into.
            touched = 1 - (1 - 1 / pieces) ** tokens
            waited = LOOKUP_LATENCY_S + touched * nbytes * (disk_s + verify_s)
            taken[COMPUTE] += unit.looked_up * waited

    def other_s(self, tokens: int) -> float:
        """Seconds of a pass outside of layers; 0 where nothing was observed."""
        known = self.observed.other_s
        return interpolate(known, tokens) if known else 0.0

    def predict(self, units: Sequence[Unit], tiers: Mapping[str, Tier], tokens: int) -> Prediction:
        """A forward pass with each unit in its tier."""
        other = self.other_s(tokens)
        taken = np.array([self.seconds(unit, tiers[unit.name], tokens) for unit in units])
        taken = taken.reshape(-1, len(RESOURCES))
        total = taken.sum(axis=0)
        total[COMPUTE] += other
        pipelined = float(total.max())
        if self.machine.device is None and total[DISK] > 0:
            pipelined = self._timeline_s(units, tiers, taken, other)
        resources = tuple(float(seconds) for seconds in total)
        return Prediction(tokens, other, resources, pipelined)

    def _timeline_s(
        self, units: Sequence[Unit], tiers: Mapping[str, Tier], taken: Seconds, other: float
    ) -> float:
        """What is not a layer is spread over all."""
        order = pass_order(units)
        compute_s = taken[order, COMPUTE] + other / len(units)
        read = np.array([read_nbytes(units[i], tiers[units[i].name]) for i in order])
        return pass_s(compute_s, read, self.disk_gbps * 1e9, self.slots_nbytes)


def pass_order(units: Sequence[Unit]) -> list[int]:
    """In which units are multiplied in a pass: what embeddings share, their heads, comes last."""
    return sorted(range(len(units)), key=lambda i: units[i].looked_up > 0)


def read_nbytes(unit: Unit, tier: Tier) -> int:
    """Bytes that a pass reads of it from the disk, rows that are looked up aside."""
    return unit.multiplied * unit.nbytes[tier.codec] if tier.place == "disk" else 0


def _between(factors: Table, tokens: int) -> float:
    """A factor at a number of tokens; beyond the ends that of the end."""
    return interpolate(factors, min(max(tokens, min(factors)), max(factors)))
