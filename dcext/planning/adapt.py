"""Keeps a model's plan right while it runs: watches its passes, and plans anew when they take other times than predicted."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcext.checks import check_model
from dcext.offloading.apply import apply
from dcext.offloading.passes import gate_of
from dcext.offloading.weights import weights_of
from dcext.policy.decide import BudgetError
from dcext.policy.machine import Machine
from dcext.policy.plan import count_tokens
from dcext.policy.predict import Observed, ObservedDisk, Prediction
from dcext.profiling.explore import Exploration
from dcext.profiling.observe import Forward, Progress
from dcext.profiling.observe_disk import PassSample, StreamMeter, typical_sample
from dcext.profiling.study import Study, checked_mix, study
from dcext.sizes import check_nbytes

DRIFT = 1.15  # a pass that takes so much longer or shorter than predicted calls for another plan
DRIFTING_PASSES = 3  # such passes one after the other
# Passes after a new plan in which there is no other for the same cause; so many times as many after each that moved
# nothing: for a machine whose speed wavers plans are not made for ever. For large drifts one such plan is forgiven.
COOLDOWN, BACKOFF, LARGE_DRIFT = 6, 4, 1.5
SETTLING_PASSES = 14  # passes after a new plan, in which a disk may be faster than it is: while layers were moved nobody read
GAIN = 0.03  # of the time of a pass, for which layers are moved


@dataclass(frozen=True)
class Replan:
    """One time that the plan was made anew.

    Attributes:
        passes: that had run by then.
        cause: ``"threads"``, ``"compute"`` or ``"disk"``.
        reason: why, in words.
        before_s: predicted, of a pass of the mix with the tiers of then, under what was observed.
        after_s: with the best tiers.
        moved: whether layers were moved; not for a gain of under 3 %.
        seconds: that planning and moving took.
    """

    passes: int
    cause: str
    reason: str
    before_s: float
    after_s: float
    moved: bool
    seconds: float


@dataclass(frozen=True)
class Drift:
    """What is not as predicted: by how much, at least 1, in words, and whether passes take less time."""

    factor: float
    reason: str
    faster: bool = False


class Adapter:
    """What ``adapt`` returns. Works between passes, in the thread that ran the pass.

    It watches the time of passes. Where they wait for the disk and that drifts from what was predicted, the rate at which it
    was read is taken. Where computing drifts, a few layers get codecs that no other of their kind has, and layers are timed
    for a few passes. Then the plan is made anew.

    Attributes:
        plan: that is in force.
        replans: what was done since, in order.
        passes: that were watched.
    """

    def __init__(self, model: nn.Module, studied: Study, options: Mapping[str, Any]) -> None:
        """Plans, moves the layers, and begins to watch. See ``adapt``."""
        self._model = model
        self._study = studied
        self._first_disk = dict(studied.observed.disk)
        self._options = dict(options)
        self._weights = weights_of(model)
        self.replans: list[Replan] = []
        self.passes = 0
        self._unmoved = dict.fromkeys(("threads", "compute", "disk"), 0)
        self._replanned = dict.fromkeys(self._unmoved, -COOLDOWN)
        self._busy = threading.Lock()
        self._threads = torch.get_num_threads()  # that were known of when layers were last timed
        self.plan = studied.plan(**self._options)
        apply(model, self.plan)
        self._begin_anew()
        self._gate = gate_of(model)
        self._gate.listener = self._after_pass

    def stop(self) -> None:
        """Watches no more; the plan stays."""
        self._gate.listener = None
        if self._exploration is not None:
            self._exploration.stop()

    def _begin_anew(self) -> None:
        """After a new plan: what is predicted now, and nothing seen of it yet."""
        self._predictor = self._study.predictor(self.plan.slots_nbytes)
        self._predicted: dict[int, Prediction] = {}
        self._seen: dict[int, deque[PassSample]] = defaultdict(
            lambda: deque(maxlen=DRIFTING_PASSES)
        )
        self._drifted = 0
        self._exploration: Exploration | None = None
        self._why = ("", "")  # cause and reason of the exploration
        self._meter = StreamMeter(self._model)

    def _after_pass(self, tokens: int, seconds: float) -> None:
        # One of several threads that run the model is enough.
        if self._busy.acquire(blocking=False):
            try:
                self._see_pass(tokens, seconds)
            finally:
                self._busy.release()

    def _see_pass(self, tokens: int, seconds: float) -> None:
        self.passes += 1
        seen = self._meter.see(seconds)
        if self._exploration is not None:
            if self._exploration.see(tokens, seen):
                self._replan(*self._why, self._explored(self._exploration))
            return
        self._seen[tokens].append(seen)
        drifts = self._drifts(tokens)
        due = [cause for cause, drift in drifts.items() if self._is_due(cause, drift)]
        self._drifted = self._drifted + 1 if due else 0
        if self._drifted < DRIFTING_PASSES:
            return
        cause, reason = due[0], drifts[due[0]].reason
        if cause == "disk":
            recent = typical_sample(self._seen[tokens])
            self._replan(cause, reason, self._with_disk_of(self._study.observed, recent))
            return
        room = math.inf
        if self.plan.host_memory is not None:
            room = self.plan.host_memory - self.plan.host_nbytes
        self._why = cause, reason
        self._threads = torch.get_num_threads()
        with self._gate.between_passes():
            self._exploration = Exploration(self._weights, self._study.units, tokens, room)

    def _is_due(self, cause: str, drift: Drift) -> bool:
        forgiven = int(drift.factor > LARGE_DRIFT)
        rest = COOLDOWN * BACKOFF ** max(self._unmoved[cause] - forgiven, 0)
        if cause == "disk" and drift.faster:
            rest = max(rest, SETTLING_PASSES)
        return self.passes >= self._replanned[cause] + rest

    def _prediction(self, tokens: int) -> Prediction:
        if tokens not in self._predicted:
            tiers = self.plan.tiers
            self._predicted[tokens] = self._predictor.predict(self._study.units, tiers, tokens)
        return self._predicted[tokens]

    def _drifts(self, tokens: int) -> dict[str, Drift]:
        """What is not as predicted, by its cause."""
        found = {}
        threads = torch.get_num_threads()
        if threads != self._threads:
            reason = f"{threads} threads instead of {self._threads}"
            found["threads"] = Drift(math.inf, reason)
        recent = self._seen[tokens]
        if len(recent) == DRIFTING_PASSES:
            typical, predicted = typical_sample(recent), self._prediction(tokens)
            ratio = typical.seconds / predicted.pipelined_s
            reason = f"passes of {count_tokens(tokens)} take {ratio:.2f} times as long as predicted"
            if max(ratio, 1 / ratio) > DRIFT:
                # Computing that takes shorter or longer beside the disk does not show while it is waited for.
                is_disk = typical.waits or (ratio < 1 and predicted.binds == "disk")
                reason += ", waiting for the disk" if typical.waits else ""
                drift = Drift(max(ratio, 1 / ratio), reason, ratio < 1)
                found["disk" if is_disk else "compute"] = drift
        return found

    def _explored(self, exploration: Exploration) -> Observed:
        """What an exploration has found; the rate of the disk too, where its passes waited for it."""
        found = exploration.observed(self._study, self._predictor)
        plain = exploration.plain
        return self._with_disk_of(found, plain) if plain is not None and plain.waits else found

    def _with_disk_of(self, observed: Observed, seen: PassSample) -> Observed:
        """What is known, with the rate of the disk at which it was read."""
        slots, rate = self.plan.slots_nbytes, seen.disk_gbps
        if rate == 0:
            return observed
        first = self._first_disk or {slots: ObservedDisk(self._predictor.disk_gbps, 0.0)}
        then = first[min(first, key=lambda n: abs(n - slots))].gbps
        # A slower disk bounds reads of any size; a faster one is so in proportion.
        disk = {
            n: replace(
                observed.disk.get(n, known),
                gbps=min(known.gbps, rate) if rate < then else known.gbps * rate / then,
            )
            for n, known in first.items()
        }
        return replace(observed, disk=disk)

    def _replan(self, cause: str, reason: str, observed: Observed) -> None:
        """Plans by what was observed, and moves layers if that gains enough."""
        begin = time.perf_counter()
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
        self.replans.append(
            Replan(self.passes, cause, reason, before_s, found.seconds, moved, seconds)
        )
        self._unmoved[cause] = 0 if moved else self._unmoved[cause] + 1
        self._replanned[cause] = self.passes
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

    Every pass is timed (some tens of microseconds). Where three in a row take 15 % more or less time than was predicted, the
    plan is made anew (seconds, between passes) and layers are moved if that gains 3 %. If they wait for the disk, its rate
    is that of their reads; if they do not, or the number of threads is another, layers are timed first, in three of the next
    six passes. A disk that seems faster is believed 14 passes after layers were moved. Outputs stay the same bits.

    Args:
        model: a compressed model on the CPU.
        host_memory: bytes for weights or a size such as ``"4GiB"``, as for ``dcext.plan``.
        slowdown: share by which a pass may take longer than with plain INT8, as for ``dcext.plan``.
        tokens: of a pass, as for ``dcext.plan``.
        mix: passes by their tokens, as for ``dcext.plan``.
        machine: to plan for, without a device; None for this one, measured.
        forward: runs a pass of so many tokens, for models that are not language models of transformers.
        progress: called with what is done and its share of the planning.

    Raises:
        BudgetError, ValueError: as ``dcext.plan``.
    """
    check_model("adapt", model)
    lengths = tuple(checked_mix(tokens, mix, slowdown))
    check_nbytes(host_memory=host_memory)
    studied = study(model, lengths, machine=machine, forward=forward, progress=progress)
    if studied.machine.device is not None:
        name = studied.machine.name
        raise ValueError(f"adapt: machine: expected one without a device, got {name!r} with one")
    options: dict[str, Any] = {
        "host_memory": host_memory,
        "slowdown": slowdown,
        "tokens": tokens,
        "mix": mix,
    }
    if host_memory is None and slowdown is None:
        options["host_memory"] = studied.plan(**options).host_memory  # what is free now, for good
    return Adapter(model, studied, options)
