"""Keeps a model's plan right while it runs: watches its passes, and plans anew when they take other times than predicted."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcext.policy.machine import Machine
from dcext.policy.plan import Plan
from dcext.policy.predict import COMPUTE, Prediction
from dcext.runtime.observe import Forward, Progress
from dcext.runtime.passes import gate_of
from dcext.runtime.placement import offload_of
from dcext.runtime.planning import Study, checked_mix, study
from dcext.runtime.retier import apply

SEEN = 5  # passes that are looked back on
DRIFT = 1.15  # a pass that takes so much longer or shorter than predicted calls for another look
PATIENCE = 3  # such passes one after the other
REST = 10  # passes after a look, in which there is no other
GAIN = 0.03  # of the time of a pass, for which layers are moved
STALLED = 0.1  # share of a pass spent waiting from which the disk is what binds


@dataclass(frozen=True)
class Look:
    """One time that the plan was looked at again.

    Attributes:
        passes: that had run by then.
        reason: why.
        before_s: predicted, of a pass of the mix with the tiers of then, under what was observed.
        after_s: with the best tiers.
        moved: whether layers were moved; not for a gain of under 3 %.
        seconds: that looking and moving took.
    """

    passes: int
    reason: str
    before_s: float
    after_s: float
    moved: bool
    seconds: float


class Adapter:
    """What ``adapt`` returns. Works between passes, in the thread that ran the pass.

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
        self.looks: list[Look] = []
        self.passes = 0
        self.plan = self._planned()
        apply(model, self.plan)
        self._begin_anew()
        self._gate = gate_of(model)
        self._gate.listener = self._after_pass

    def stop(self) -> None:
        """Watches no more; the plan stays."""
        self._gate.listener = None

    def _planned(self) -> Plan:
        return self._study.plan(**self._options)

    def _begin_anew(self) -> None:
        """After a look: what is predicted now, and nothing seen of it yet."""
        self._threads = torch.get_num_threads()
        self._predictor = self._study.predictor(self.plan.slots_nbytes)
        self._predicted: dict[int, Prediction] = {}
        self._ratios: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=SEEN))
        self._disk: deque[float] = deque(maxlen=SEEN)
        self._drifted = 0
        self._since = 0
        self._counts = self._stream_counts()

    def _stream_counts(self) -> dict[str, Any]:
        offload = offload_of(self._model)
        stream = None if offload is None else offload.stream
        return {} if stream is None else stream.native.statistics()

    def _after_pass(self, tokens: int, seconds: float) -> None:
        self.passes += 1
        self._since += 1
        before, self._counts = self._counts, self._stream_counts()
        stalled = self._see_disk(before, seconds)
        if tokens not in self._predicted:
            tiers = self.plan.tiers
            self._predicted[tokens] = self._predictor.predict(self._study.units, tiers, tokens)
        computed = max(seconds - stalled, 1e-9)
        self._ratios[tokens].append(computed / self._predicted[tokens].resources_s[COMPUTE])
        reason = self._drift(tokens)
        self._drifted = self._drifted + 1 if reason else 0
        if (
            reason
            and self._drifted >= PATIENCE
            and self._since >= min(REST, PATIENCE + self.passes)
        ):
            self._look(reason)

    def _see_disk(self, before: Mapping[str, Any], seconds: float) -> float:
        """Seconds in which the pass waited; remembers what the disk gave if that can be told."""
        after = self._counts
        if not before or not after:
            return 0.0
        stalled = min(max(after["stall_s"] - before["stall_s"], 0.0), seconds)
        used = after["used_nbytes"] - before["used_nbytes"]
        reading = after["reading_s"] - before["reading_s"]
        known = (self._predictor.disk_gbps or 0.0) * 1e9
        if used > 0 and reading > 0:
            # Where reads are hidden few of them run side by side: what they give says less than the disk can.
            rate = used / seconds if stalled > STALLED * seconds else used / reading
            hidden = stalled <= STALLED * seconds and known / 2 <= rate <= known
            self._disk.append(known if hidden else rate)
        return stalled

    def _drift(self, tokens: int) -> str:
        """In words, what is not as predicted; empty if all is."""
        if torch.get_num_threads() != self._threads:
            return f"{torch.get_num_threads()} threads instead of {self._threads}"
        ratios = self._ratios[tokens]
        if len(ratios) >= PATIENCE:
            ratio = statistics.median(list(ratios)[-PATIENCE:])
            if abs(math.log(ratio)) > math.log(DRIFT):
                return (
                    f"passes of {tokens} tokens compute for {ratio:.2f} times as long as predicted"
                )
        known = self._predictor.disk_gbps
        if len(self._disk) >= PATIENCE and known:
            rate = statistics.median(list(self._disk)[-PATIENCE:]) / 1e9
            if abs(math.log(rate / known)) > math.log(DRIFT):
                return f"the disk gives {rate:.2f} GB/s instead of {known:.2f}"
        return ""

    def _look(self, reason: str) -> None:
        """Corrects times by what was seen, plans, and moves layers if that gains enough."""
        begin = time.perf_counter()
        observed = self._study.observed
        scale = dict(observed.scale)
        if torch.get_num_threads() == self._threads:
            for tokens, ratios in self._ratios.items():
                scale[tokens] = self._predictor.scale(tokens) * statistics.median(ratios)
        rates = list(self._disk)[-PATIENCE:]
        disk_gbps = statistics.median(rates) / 1e9 if rates else observed.disk_gbps
        corrected = replace(observed, scale=scale, disk_gbps=disk_gbps)
        self._study = replace(self._study, observed=corrected)
        found = self._planned()
        mix = {each.tokens: each.weight for each in found.passes}
        predictor = self._study.predictor(self.plan.slots_nbytes)
        before_s = sum(
            weight * predictor.predict(self._study.units, self.plan.tiers, tokens).pipelined_s
            for tokens, weight in mix.items()
        ) / sum(mix.values())
        moved = found.seconds < before_s * (1 - GAIN)
        if moved:
            self.plan = found
            apply(self._model, found)
        seconds = time.perf_counter() - begin
        self.looks.append(Look(self.passes, reason, before_s, found.seconds, moved, seconds))
        self._begin_anew()


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

    Every pass is timed (some tens of microseconds). Where three in a row compute, or read, 15 % faster or slower than was
    predicted, or the number of threads is another, times are corrected and the plan is made anew; layers are moved, between
    passes, if that gains 3 %. Outputs stay the same bits.

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
