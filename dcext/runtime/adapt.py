"""Keeps a model's plan right while it runs: watches its passes, and plans anew when they take other times than predicted."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcext.policy.decide import BudgetError
from dcext.policy.machine import LAYER_CODECS, Machine
from dcext.policy.plan import count_tokens
from dcext.policy.predict import COMPUTE, Observed, ObservedDisk, Prediction, Unit
from dcext.runtime.observe import Forward, LayerClock, Progress
from dcext.runtime.passes import gate_of
from dcext.runtime.placement import offload_of
from dcext.runtime.planning import Study, checked_mix, study
from dcext.runtime.retier import apply
from dcext.runtime.weights import Weight, weights_of

SEEN = 5  # passes that are looked back on
DRIFT = 1.15  # a pass that takes so much longer or shorter than predicted calls for another look
PATIENCE = 3  # such passes one after the other
REST = 6  # passes after a look, in which there is no other for the same cause; after one that moved nothing four times as
TIRED = 4  # many as before: a machine whose speed wavers is not looked at for ever
CLOCKED = 3  # passes in which layers are timed
LEAST_OTHER = 0.2  # of what is not a layer, below which it is not corrected
GAIN = 0.03  # of the time of a pass, for which layers are moved
STALLED = 0.1  # share of a pass spent waiting from which the disk is what binds


@dataclass(frozen=True)
class Look:
    """One time that the plan was looked at again.

    Attributes:
        passes: that had run by then.
        cause: ``"threads"``, ``"compute"`` or ``"disk"``.
        reason: why, in words.
        before_s: predicted, of a pass of the mix with the tiers of then, under what was observed.
        after_s: with the best tiers.
        moved: whether layers were moved; not for a gain of under 3 %.
        seconds: that looking and moving took.
    """

    passes: int
    cause: str
    reason: str
    before_s: float
    after_s: float
    moved: bool
    seconds: float


class Adapter:
    """What ``adapt`` returns. Works between passes, in the thread that ran the pass.

    It watches the time of passes. When that drifts from what was predicted, a few layers get codecs that no other of their
    kind has, layers are timed for a few passes, times are corrected, and the plan is made anew.

    Attributes:
        plan: that is in force.
        looks: what was done since.
        passes: that were watched.
    """

    def __init__(self, model: nn.Module, studied: Study, options: Mapping[str, Any]) -> None:
        """Plans, moves the layers, and begins to watch. See ``adapt``."""
        self._model = model
        self._study = studied
        self._options = dict(options)
        self._weights = weights_of(model)
        self._clock = LayerClock(self._weights)
        self.looks: list[Look] = []
        self.passes = 0
        self._rest = dict.fromkeys(("threads", "compute", "disk"), REST)
        self._rested = dict.fromkeys(self._rest, 0)  # the pass from which on there may be a look
        self._busy = threading.Lock()
        self.plan = studied.plan(**self._options)
        apply(model, self.plan)
        self._begin_anew()
        self._gate = gate_of(model)
        self._gate.listener = self._after_pass

    def stop(self) -> None:
        """Watches no more; the plan stays."""
        self._gate.listener = None
        self._clock.stop()

    def _begin_anew(self) -> None:
        """After a look: what is predicted now, and nothing seen of it yet."""
        self._threads = torch.get_num_threads()
        self._predictor = self._study.predictor(self.plan.slots_nbytes)
        self._predicted: dict[int, Prediction] = {}
        self._computed: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=SEEN))
        self._disk: deque[float] = deque(maxlen=SEEN)
        self._cause, self._reason, self._length = "", "", 0
        self._clocked: list[dict[str, float]] = []
        self._drifted = 0
        self._since = 0
        self._counts = self._stream_counts()

    def _stream_counts(self) -> dict[str, Any]:
        offload = offload_of(self._model)
        stream = None if offload is None else offload.stream
        return {} if stream is None else stream.native.statistics()

    def _after_pass(self, tokens: int, seconds: float) -> None:
        if self._busy.acquire(
            blocking=False
        ):  # one of several threads that run the model is enough
            try:
                self._see_pass(tokens, seconds)
            finally:
                self._busy.release()

    def _see_pass(self, tokens: int, seconds: float) -> None:
        self.passes += 1
        self._since += 1
        if self._reason:
            self._see_layers(tokens)
            return
        before, self._counts = self._counts, self._stream_counts()
        stalled = self._see_disk(before, seconds)
        self._computed[tokens].append(max(seconds - stalled, 1e-9))
        drifts = self._drifts(tokens)
        due = [cause for cause in drifts if self.passes >= self._rested[cause]]
        self._drifted = self._drifted + 1 if due else 0
        if self._drifted >= PATIENCE:
            self._since = 0
            self._cause, self._reason, self._length = due[0], drifts[due[0]], tokens
            self._explore()
            self._clock.take()
            self._clock.start()

    def _see_disk(self, before: Mapping[str, Any], seconds: float) -> float:
        """Seconds in which the pass waited; remembers what the disk gave if that can be told."""
        after = self._counts
        if not before or not after:
            return 0.0
        stalled = min(max(after["stall_s"] - before["stall_s"], 0.0), seconds)
        rate = (after["used_nbytes"] - before["used_nbytes"]) / seconds
        known = (self._predictor.disk_gbps or 0.0) * 1e9
        # Reads that nobody waits for show only that the disk gives no less.
        self._disk.append(rate if stalled > STALLED * seconds else max(rate, known))
        return stalled

    def _prediction(self, tokens: int) -> Prediction:
        if tokens not in self._predicted:
            tiers = self.plan.tiers
            self._predicted[tokens] = self._predictor.predict(self._study.units, tiers, tokens)
        return self._predicted[tokens]

    def _drifts(self, tokens: int) -> dict[str, str]:
        """What is not as predicted, in words, by its cause."""
        found = {}
        threads = torch.get_num_threads()
        if threads != self._threads:
            found["threads"] = f"{threads} threads instead of {self._threads}"
        computed = list(self._computed[tokens])[-PATIENCE:]
        if len(computed) == PATIENCE:
            ratio = statistics.median(computed) / self._prediction(tokens).resources_s[COMPUTE]
            if abs(math.log(ratio)) > math.log(DRIFT):
                found["compute"] = (
                    f"passes of {count_tokens(tokens)} compute for {ratio:.2f} times as long as predicted"
                )
        rates, known = list(self._disk)[-PATIENCE:], self._predictor.disk_gbps
        if len(rates) == PATIENCE and known:
            rate = statistics.median(rates) / 1e9
            if abs(math.log(rate / known)) > math.log(DRIFT):
                found["disk"] = f"the disk gives {rate:.2f} GB/s instead of {known:.2f}"
        return found

    def _explore(self) -> None:
        """Gives one layer of each kind every codec that none has in memory, as far as the budget allows."""
        room = math.inf
        if self.plan.host_memory is not None:
            room = self.plan.host_memory - self.plan.host_nbytes
        by_kind: dict[object, list[tuple[Weight, Unit]]] = defaultdict(list)
        for weight, unit in zip(self._weights, self._study.units, strict=True):
            if weight.tier.startswith("memory/"):
                by_kind[unit.kind].append((weight, unit))
        changes = []
        for members in by_kind.values():
            codecs = Counter(weight.module.codec for weight, _ in members)
            for codec in LAYER_CODECS:
                weight, unit = members[-1]
                taken = unit.nbytes[codec] - weight.module.payload.nbytes
                if codec in codecs or codecs[weight.module.codec] == 1 or taken > room:
                    continue
                codecs[weight.module.codec] -= 1
                room -= max(taken, 0)
                changes.append((weight, weight.payload(codec)))
                members.pop()
        with self._gate.between_passes():
            for weight, payload in changes:
                weight.rest_in_memory(payload)

    def _see_layers(self, tokens: int) -> None:
        """Of a pass while layers are timed; after some, the look."""
        taken = self._clock.take()
        if tokens == self._length:
            self._clocked.append(taken)
        if len(self._clocked) < CLOCKED and self._since < 8 * CLOCKED:
            return
        self._clock.stop()
        self._look()

    def _look(self) -> None:
        """Corrects times by what was seen, plans, and moves layers if that gains enough."""
        begin = time.perf_counter()
        rates = list(self._disk)[-PATIENCE:]
        observed = self._study.observed
        if self._clocked:
            observed = self._corrected(self._length)
        known = self._predictor.disk_gbps
        if rates and known:
            ratio = statistics.median(rates) / 1e9 / known
            disk = {n: replace(d, gbps=ratio * d.gbps) for n, d in observed.disk.items()}
            observed = replace(
                observed, disk=disk or {self.plan.slots_nbytes: ObservedDisk(ratio * known, 0.0)}
            )
        self._study = replace(self._study, observed=observed)
        try:
            found = self._study.plan(**self._options, quick=True)
        except BudgetError:  # no plan is fast enough now: the one there is stays
            found = self.plan
        predictor = self._study.predictor(self.plan.slots_nbytes)
        mix = {each.tokens: each.weight for each in found.passes}
        before_s = sum(
            weight * predictor.predict(self._study.units, self.plan.tiers, tokens).pipelined_s
            for tokens, weight in mix.items()
        ) / sum(mix.values())
        moved = found is not self.plan and found.seconds < before_s * (1 - GAIN)
        if moved:
            self.plan = found
        apply(self._model, self.plan)  # also ends the exploration
        seconds = time.perf_counter() - begin
        look = Look(self.passes, self._cause, self._reason, before_s, found.seconds, moved, seconds)
        self.looks.append(look)
        self._rest[self._cause] = REST if moved else TIRED * self._rest[self._cause]
        self._rested[self._cause] = self.passes + self._rest[self._cause]
        self._begin_anew()

    def _corrected(self, tokens: int) -> Observed:
        """Times of layers as they were seen; those of codecs that were not seen, in proportion."""
        old = self._study.predictor(self.plan.slots_nbytes)
        units = self._study.units
        seen: dict[tuple[object, str], list[float]] = defaultdict(list)
        for weight, unit in zip(self._weights, units, strict=True):
            taken = [clocked[unit.name] for clocked in self._clocked if unit.name in clocked]
            if taken and weight.tier.startswith("memory/"):
                expected = old.compute_s(unit, weight.module.codec, tokens)
                ratio = statistics.median(taken) / max(expected, 1e-9)
                seen[unit.kind, weight.module.codec].append(ratio)
        if not seen:
            return self._study.observed
        ratios = {key: statistics.median(values) for key, values in seen.items()}
        typical = {
            codec: statistics.median([r for (_, c), r in ratios.items() if c == codec] or [0.0])
            for codec in LAYER_CODECS
        }
        overall = statistics.median(ratios.values())
        lengths = {*old.observed.other_s, tokens}
        layer_s: dict[tuple[object, str], dict[int, float]] = {}
        for unit in {unit.kind: unit for unit in units}.values():
            for codec in LAYER_CODECS:
                ratio = ratios.get((unit.kind, codec)) or typical[codec] or overall
                layer_s[unit.kind, codec] = {
                    n: old.compute_s(unit, codec, n) * (ratio if n == tokens else 1.0)
                    for n in lengths
                }
        other_s = {n: old.other_s(n) for n in lengths}
        corrected = replace(
            old.observed,
            layer_s=layer_s,
            other_s=other_s,
            threads=torch.get_num_threads(),
        )
        # What passes took before layers were timed, less the layers: hooks are not part of it.
        new = replace(self._study, observed=corrected).predictor(self.plan.slots_nbytes)
        layers = new.predict(units, self.plan.tiers, tokens)
        computed = statistics.median(list(self._computed[tokens])[-PATIENCE:])
        rest = computed - (layers.resources_s[COMPUTE] - layers.other_s)
        other_s[tokens] = max(rest, LEAST_OTHER * other_s[tokens], 1e-6)
        return replace(corrected, other_s=other_s)


def adapt(
    model: nn.Module,
    *,
    host_memory: int | str | None = None,
    slowdown: float | None = None,
    tokens: int = 1,
    mix: Mapping[int, float] | None = None,
    machine: Machine | str | Path | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Plans as ``dcext.plan``, moves the layers as ``dcext.apply``, and goes on doing so while the model runs.

    Every pass is timed (some tens of microseconds). Where three in a row compute 15 % faster or slower than was predicted, or
    wait for a disk that does, or the number of threads is another, layers are timed for three passes and the plan is made
    anew (seconds, between passes); layers are moved if that gains 3 %. Outputs stay the same bits.

    Args:
        model: a compressed model on the CPU.
        host_memory: as all that follow, as for ``dcext.plan``.
        slowdown: likewise.
        tokens: likewise.
        mix: likewise.
        machine: likewise.
        forward: likewise.
        progress: likewise.

    Raises:
        BudgetError, ValueError: as ``dcext.plan``.
    """
    lengths = tuple(checked_mix(tokens, mix))
    studied = study(model, lengths, machine=machine, forward=forward, progress=progress)
    options: dict[str, Any] = {
        "host_memory": host_memory,
        "slowdown": slowdown,
        "tokens": tokens,
        "mix": mix,
    }
    if host_memory is None and slowdown is None:
        options["host_memory"] = studied.plan(**options).host_memory  # what is free now, for good
    return Adapter(model, studied, options)
