"""Takes the rate of the disk, and what reads from it cost, while the model itself runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcext.offloading.apply import move_weights
from dcext.offloading.state import offload_of
from dcext.offloading.weights import Weight
from dcext.profiling.observe import Forward, evenly, pass_seconds, pass_times
from dcext.weights.host_stream import HostStream

DISK_READS_NBYTES, DISK_SAMPLES = 512 << 20, 3
STREAMING_ROUNDS, STREAMING_S = 8, 1.0  # seconds of passes of each kind, in all rounds
STALLED = 0.1  # share of a pass spent waiting from which the disk is what binds
KEEPING_UP = 0.7  # of what the disk reads in a pass: so much, to see what reads cost who never waits for them


def observe_disk(weights: Sequence[Weight], slots_nbytes: int) -> float | None:
    """GB/s of the reads that streaming does, from the model's own files; None where no weight is in one."""
    origins: dict[str, Any] = {}
    nbytes = 0
    for weight in weights:
        if weight.origin is not None and not weight.is_looked_up and nbytes < DISK_READS_NBYTES:
            origins[weight.name] = weight.origin
            nbytes += weight.nbytes
    if not origins:
        return None
    stream = HostStream(origins, slots_nbytes)
    try:
        stream.read_all()
        return statistics.median(stream.read_all() for _ in range(DISK_SAMPLES)) / 1e9
    finally:
        stream.close()


@dataclass(frozen=True)
class PassSample:
    """One pass, or several.

    Attributes:
        seconds: that it took.
        stalled_s: the part of ``seconds`` in which a layer waited for the disk.
        read_nbytes: bytes read from the disk meanwhile.
        reading_s: seconds in which at least one read was under way.
    """

    seconds: float
    stalled_s: float = 0.0
    read_nbytes: float = 0.0
    reading_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether it is the disk that binds."""
        return self.stalled_s > STALLED * self.seconds

    @property
    def disk_gbps(self) -> float:
        """Of the disk while it was read; 0 where nothing was."""
        return self.read_nbytes / self.reading_s / 1e9 if self.reading_s > 0 else 0.0


def typical_sample(passes: Sequence[PassSample]) -> PassSample:
    """The median time and the median stall of one pass or more, and the means of what was read."""
    return PassSample(
        statistics.median(seen.seconds for seen in passes),
        statistics.median(seen.stalled_s for seen in passes),
        statistics.mean(seen.read_nbytes for seen in passes),
        statistics.mean(seen.reading_s for seen in passes),
    )


class StreamMeter:
    """Tells what the stream of a model did from pass to pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._now()

    def see(self, seconds: float) -> PassSample:
        """The time since the last call, or since this was made, in which passes ran for so many seconds."""
        before, self._before = self._before, self._now()
        did = [max(now - then, 0) for now, then in zip(self._before, before, strict=True)]
        return PassSample(seconds, min(did[0], seconds), *did[1:])

    def _now(self) -> tuple[float, float, float]:
        offload = offload_of(self._model)
        if offload is None or offload.stream is None:
            return 0.0, 0.0, 0.0
        done = offload.stream.native.statistics()
        return done["stall_s"], done["read_nbytes"], done["reading_s"]


@dataclass(frozen=True)
class Streaming:
    """Passes of a model without layers on the disk, with a few, and with all of them there; several times in turns.

    Attributes:
        few: names of the few.
        rounds: the typical pass of each of the three.
    """

    few: list[str]
    rounds: list[tuple[PassSample, PassSample, PassSample]]


@torch.inference_mode()
def observe_streaming(
    model: nn.Module,
    weights: Sequence[Weight],
    tokens: int,
    forward: Forward,
    slots_nbytes: int,
    gbps: float,
) -> Streaming:
    """Passes of a model without layers on the disk, with a few, and with all of them there; several times in turns.

    The few are as many as the disk has read long before they are needed.

    Args:
        model: it is as before afterwards; no layer is on the disk now.
        weights: all of it.
        tokens: of a pass; the fewer, the less time there is to hide reads.
        forward: runs a pass.
        slots_nbytes: memory to read into; with less of it, reads are smaller and more.
        gbps: at which the disk is read when nobody computes.
    """
    before = {weight.name: weight.tier for weight in weights}
    kept = [(weight, weight.module.payload) for weight in weights]
    layers = [weight for weight in weights if weight.origin is not None and not weight.is_looked_up]

    def in_memory() -> None:
        for weight, payload in kept:
            weight.set_payload(payload)

    def taken(streamed: Sequence[Weight]) -> PassSample:
        in_memory()
        tiers = before | {weight.name: weight.disk_tier for weight in streamed}
        move_weights(model, list(weights), tiers, slots_nbytes)
        forward(tokens)
        meter = StreamMeter(model)
        taken_s = pass_times(forward, tokens, STREAMING_S / STREAMING_ROUNDS)
        return typical_sample([meter.see(seconds) for seconds in taken_s])

    try:
        nbytes = KEEPING_UP * pass_seconds(forward, tokens) * gbps * 1e9
        mean_nbytes = statistics.mean(weight.nbytes for weight in layers)
        few = evenly(layers, max(1, int(nbytes / mean_nbytes)))
        rounds = [(taken([]), taken(few), taken(layers)) for _ in range(STREAMING_ROUNDS)]
        return Streaming([weight.name for weight in few], rounds)
    finally:
        in_memory()
        move_weights(model, list(weights), before, slots_nbytes)
