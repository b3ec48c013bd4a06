"""How long a forward pass takes, by where the weights of its layers are.

Every layer, in its tier, takes seconds of resources that work side by side: what computes, the link to the device, the
disk, and the host where it decodes for a device. A pass in which they overlap takes as long as the slowest of them,

    pipelined_s = max(other_s + sum compute_s, sum link_s, sum disk_s, sum host_s)

and one in which they wait for each other the sum of all. ``other_s`` is what is not a compressed layer: attention, norms,
Python. For one layer of M int8 bytes, ratio r, link B_l and decode B_d these are the design's ``max(L, D, T_c)`` and
``L + D + T_c`` with ``L = M / (r B_l)``, ``D = M / B_d``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dcext.policy.machine import Machine, interpolate

RESOURCES = ("compute", "link", "disk", "host")
COMPUTE, LINK, DISK, HOST = range(len(RESOURCES))
HOST_DECODE = "host/zstd, decoded there"
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
        file_codec: of its payload in a file, from which it can be read while the model runs; None without one.
        panels: that rows are decoded by, for look-ups.
        activations: ``"int8"`` or ``"none"``.
    """

    name: str
    shape: tuple[int, int]
    multiplied: int
    looked_up: int
    nbytes: Mapping[str, int]
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


@dataclass
class Observed:
    """Times of a model that were taken while it ran.

    Attributes:
        layer_s: seconds of a unit by its kind and codec, and number of tokens.
        other_s: seconds of a pass outside of layers, by number of tokens.
        scale: by which a codec's layers have become slower since, by codec.
        other_scale: the same of ``other_s``.
        disk_gbps: what reading layers from files gave while the model ran; None where nothing was read.
        read_s: by how much a layer is slower when it is read meanwhile and the disk keeps up: threads wake, processors are shared.
    """

    layer_s: dict[tuple[object, str], dict[int, float]] = field(default_factory=dict)
    other_s: dict[int, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    other_scale: float = 1.0
    disk_gbps: float | None = None
    read_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Of a forward pass.

    Attributes:
        tokens: of the pass.
        other_s: seconds outside of layers.
        resources_s: seconds of each of ``RESOURCES``, ``other_s`` included in that which computes.
    """

    tokens: int
    other_s: float
    resources_s: tuple[float, ...]

    @property
    def pipelined_s(self) -> float:
        """Seconds where resources overlap, as they do."""
        return max(self.resources_s)

    @property
    def serial_s(self) -> float:
        """Seconds if they did not."""
        return sum(self.resources_s)

    @property
    def binds(self) -> str:
        """The resource that decides."""
        return RESOURCES[int(np.argmax(self.resources_s))]


class Predictor:
    """Times of units on a machine; corrected by what was observed."""

    def __init__(
        self, machine: Machine, threads: int | None = None, observed: Observed | None = None
    ) -> None:
        self.machine = machine
        self.host = machine.host_with(threads)
        self.observed = observed or Observed()

    @property
    def disk_gbps(self) -> float | None:
        """As observed, else as measured."""
        return self.observed.disk_gbps or self.machine.disk_gbps

    def tiers(self, unit: Unit) -> list[str]:
        """Where a unit can be: ``"memory/raw"``, ``"disk/zstd"`` .., or with a device ``"device/packed"``, ``"host/zstd"`` .."""
        on_disk = [f"disk/{unit.file_codec}"]
        if unit.file_codec is None or self.disk_gbps is None:
            on_disk = []
        if self.machine.device is None:
            return [*(f"memory/{codec}" for codec in unit.nbytes), *on_disk]
        resting = [f"device/{codec}" for codec in unit.nbytes]
        if not unit.multiplied:
            return resting  # a row is looked up where the model runs
        waiting = [f"host/{codec}" for codec in unit.nbytes]
        decoded = [HOST_DECODE] if "zstd" in unit.nbytes else []
        return [*resting, *waiting, *decoded, *on_disk]

    def memory(self, unit: Unit, tier: str) -> tuple[int, int]:
        """Bytes of a unit in host and device memory."""
        place, codec = place_and_codec(tier)
        nbytes = unit.nbytes[codec]
        return {"memory": (nbytes, 0), "host": (nbytes, 0), "device": (0, nbytes), "disk": (0, 0)}[
            place
        ]

    def modelled_s(self, unit: Unit, codec: str, tokens: int) -> float:
        """Seconds of a unit's layers where the model runs, its bytes being there, by the machine's figures."""
        processor = self.machine.device or self.host
        nbytes = unit.nbytes[codec]
        taken = unit.multiplied * processor.seconds(codec, unit.weights, nbytes, tokens)
        decode = processor.decode_gweights.get(codec)
        if unit.looked_up and decode and self.machine.device is None:
            touched = min(tokens, unit.panels) / unit.panels * unit.weights
            taken += unit.looked_up * touched / (decode * 1e9)
        return taken

    def compute_s(self, unit: Unit, codec: str, tokens: int) -> float:
        """``modelled_s``, corrected by what was observed of units of its kind."""
        scale = self.observed.scale.get(codec, 1.0)
        modelled = self.modelled_s(unit, codec, tokens)
        observed = self.observed.layer_s.get((unit.kind, codec))
        if not observed:
            return scale * modelled
        if tokens in observed:
            return scale * observed[tokens]
        factors = {
            n: seconds / max(self.modelled_s(unit, codec, n), 1e-9)
            for n, seconds in observed.items()
        }
        inside = min(max(tokens, min(factors)), max(factors))
        return scale * modelled * interpolate(factors, inside)

    def seconds(self, unit: Unit, tier: str, tokens: int) -> Seconds:
        """Seconds of each of ``RESOURCES``, ``(4,)``."""
        taken = np.zeros(len(RESOURCES))
        place, codec = place_and_codec(tier)
        nbytes = unit.nbytes[codec]
        machine = self.machine
        if tier == HOST_DECODE:
            taken[HOST] = unit.weights / (self.host.decode_gweights["zstd"] * 1e9)
            taken[LINK] = unit.weights / (machine.link_gbps * 1e9)  # type: ignore[operator]
            taken[COMPUTE] = self.compute_s(unit, "raw", tokens)
            return taken
        taken[COMPUTE] = self.compute_s(unit, codec, tokens)
        if place == "disk":
            self._add_disk(taken, unit, nbytes, tokens)
        if machine.link_gbps is not None and place in ("host", "disk"):
            taken[LINK] = nbytes / (machine.link_gbps * 1e9)
        return taken

    def _add_disk(self, taken: Seconds, unit: Unit, nbytes: int, tokens: int) -> None:
        disk_s = 1 / (self.disk_gbps * 1e9)  # type: ignore[operator]
        verify_s = 1 / (self.machine.verify_gbps * 1e9) if self.machine.verify_gbps else 0.0
        checks = HOST if self.machine.device is not None else COMPUTE
        taken[DISK] += unit.multiplied * nbytes * disk_s
        taken[checks] += unit.multiplied * (nbytes * verify_s + self.observed.read_s)
        if unit.looked_up:
            # Nobody knows ahead which panels: what runs waits for them.
            panels = min(tokens, unit.panels)
            waited = LOOKUP_LATENCY_S + panels * nbytes / unit.panels * (disk_s + verify_s)
            taken[COMPUTE] += unit.looked_up * waited

    def other_s(self, tokens: int) -> float:
        """Seconds of a pass outside of layers; 0 where nothing was observed."""
        known = self.observed.other_s
        return self.observed.other_scale * interpolate(known, tokens) if known else 0.0

    def predict(self, units: Sequence[Unit], tiers: Mapping[str, str], tokens: int) -> Prediction:
        """A forward pass with each unit in its tier."""
        other = self.other_s(tokens)
        total = sum(
            (self.seconds(unit, tiers[unit.name], tokens) for unit in units),
            np.zeros(len(RESOURCES)),
        )
        total[COMPUTE] += other
        return Prediction(tokens, other, tuple(float(seconds) for seconds in total))


def place_and_codec(tier: str) -> tuple[str, str]:
    """``"disk", "zstd"`` of ``"disk/zstd"``."""
    place, _, codec = tier.partition("/")
    return place, codec.partition(",")[0]
