"""What is known of a model and a machine: exact sizes, times of layers, the rate of the disk. Plans are made from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dcext.checks import check_model, check_type
from dcext.errors import FormatError
from dcext.offloading.state import LEAST_SLOTS_NBYTES, other_nbytes, slots_for
from dcext.offloading.weights import weights_of
from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.machine import Machine, load_machine
from dcext.policy.plan import Plan
from dcext.policy.predict import Observed, ObservedDisk, Predictor, Unit
from dcext.policy.presets import preset
from dcext.policy.timeline import SLOTS_NBYTES
from dcext.profiling.measure import tune
from dcext.profiling.observe import Forward, Progress, describe, forward_of, observe
from dcext.profiling.observe_disk import (
    PassSample,
    Streaming,
    observe_disk,
    observe_streaming,
    typical_sample,
)
from dcext.sizes import format_nbytes, free_memory, parse_nbytes

DEVICE = "cuda"  # that device_memory is of, on this machine
FREE_SHARE = 0.8  # of free memory, what an automatic plan takes
DESCRIBING, OBSERVING = 0.5, 0.5  # shares of the work


@dataclass(frozen=True)
class Study:
    """A model and a machine, from which any number of plans can be made.

    Attributes:
        units: the payloads.
        machine: its figures.
        observed: times that were taken of the model itself; empty where none were.
        others: bytes of the model that are not compressed.
        resident: bytes of payloads that are in memory now.
    """

    units: list[Unit]
    machine: Machine
    observed: Observed
    others: int
    resident: int = 0

    def predictor(self, slots_nbytes: int = SLOTS_NBYTES) -> Predictor:
        """Of times, with as many threads as torch has on this machine.

        Args:
            slots_nbytes: memory to read layers into.
        """
        threads = torch.get_num_threads() if self.machine.identity else None
        return Predictor(self.machine, threads, self.observed, slots_nbytes)

    def plan(
        self,
        *,
        host_memory: int | str | None = None,
        device_memory: int | str | None = None,
        slowdown: float | None = None,
        tokens: int = 1,
        mix: Mapping[int, float] | None = None,
        quick: bool = False,
    ) -> Plan:
        """See ``plan``; ``quick`` takes a fraction of the time for plans that are nearly as good."""
        mix = checked_mix(tokens, mix, slowdown)
        host = None if host_memory is None else parse_nbytes("host_memory", host_memory)
        device = None if device_memory is None else parse_nbytes("device_memory", device_memory)
        on_device = self.machine.device is not None
        if device is not None and not on_device:
            raise ValueError(
                f"device_memory: expected a machine with a device, got {self.machine.name!r} without one"
            )
        objective = "least time in the memory that is free"
        free = host is None and slowdown is None and bool(self.machine.identity)
        if free:
            own = self.resident + self.others * (not on_device)
            host = int(FREE_SHARE * (free_memory() + own))
        if free and not on_device:
            objective += f", {format_nbytes(host or 0)}"
        elif slowdown is None:
            sizes = [("host", host), ("device", device)]
            bounds = [
                f"{format_nbytes(n)} of {place} memory" for place, n in sizes if n is not None
            ]
            objective = f"least time in {' and '.join(bounds) or 'unbounded memory'}"
        plans: list[Plan] = []
        # Less to read into leaves more memory for layers.
        tried = {slots_for(host)} if on_device else {LEAST_SLOTS_NBYTES, slots_for(host)}
        for slots in sorted(tried):
            try:
                plans.append(self._plan(mix, host, device, slots, slowdown, objective, quick))
            except BudgetError as error:
                missed = error
        if not plans:
            raise missed
        if slowdown is None:
            return min(plans, key=lambda plan: plan.seconds)
        return min(plans, key=lambda plan: plan.device_nbytes if on_device else plan.host_nbytes)

    def _plan(
        self,
        mix: Mapping[int, float],
        host: int | None,
        device: int | None,
        slots_nbytes: int,
        slowdown: float | None,
        objective: str,
        quick: bool,
    ) -> Plan:
        """With so much memory to read into."""
        budget = Budget(host, device, self.others, slots_nbytes)
        decider = Decider(self.predictor(slots_nbytes), self.units, mix, self.others)
        if slowdown is None:
            return decider.plan(decider.within(budget, quick=quick), budget, objective)
        bound = (1 + slowdown) * decider.mean_s(decider.int8())
        objective = f"least memory, at most {slowdown:.1%} slower than plain INT8"
        return decider.plan(decider.smallest_within(bound, budget), budget, objective)


def checked_mix(
    tokens: int, mix: Mapping[int, float] | None, slowdown: float | None
) -> dict[int, float]:
    """Passes by their number of tokens, once what is asked for is known to make sense.

    Raises:
        TypeError: no numbers.
        ValueError: not positive numbers, or a negative slowdown.
    """
    expected = "a share such as 0.05"
    check_type("slowdown", slowdown, (int, float, type(None)), expected)
    if slowdown is not None and not 0 <= slowdown < math.inf:
        raise ValueError(f"slowdown: expected {expected}, at least 0, got {slowdown}")
    if mix is None:
        check_type("tokens", tokens, int, "a number of tokens")
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        return {tokens: 1.0}
    check_type("mix", mix, Mapping, "numbers of passes by their tokens, such as {1: 200, 512: 1}")
    if not mix or any(n < 1 or not 0 < weight < math.inf for n, weight in mix.items()):
        raise ValueError(f"mix: expected positive numbers of passes by their tokens, got {mix}")
    return dict(mix)


def study(
    model: nn.Module,
    lengths: tuple[int, ...],
    *,
    machine: Machine | str | Path | None = None,
    device: str | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Study:
    """Describes a model and takes its times, see ``plan``; where it is to run on a device of this machine, no times."""
    check_model("plan", model)
    report = progress or (lambda what, share: None)
    try:
        weights = weights_of(model)
    except ValueError as error:
        raise ValueError(f"plan: {error}") from None
    here = machine is None and device is None
    found = _machine(machine, device)
    describing = DESCRIBING if here else 1.0
    units = describe(model, weights, lambda what, share: report(what, describing * share))
    observed = Observed()
    if here:
        forward = forward or forward_of(model)
        observed = observe(
            weights, units, lengths, forward, lambda what, share: report(what, OBSERVING * share)
        )
        studied = Study(units, found, observed, 0)
        for slots in (SLOTS_NBYTES, LEAST_SLOTS_NBYTES):
            gbps = observe_disk(weights, slots)
            if gbps is None:
                continue
            observed.disk[slots] = ObservedDisk(gbps, 0.0)
            if not any(weight.module.is_in_file for weight in weights):
                tokens = min(lengths)
                streaming = observe_streaming(model, weights, tokens, forward, slots, gbps)
                codecs = {weight.name: weight.module.codec for weight in weights}
                observed.disk[slots] = _disk_of(studied, slots, tokens, codecs, streaming)
    resident = sum(w.module.payload.nbytes for w in weights if not w.module.is_in_file)
    return Study(units, found, observed, other_nbytes(model), resident)


def _disk_of(
    studied: Study,
    slots_nbytes: int,
    tokens: int,
    codecs: Mapping[str, str],
    streaming: Streaming,
) -> ObservedDisk:
    """What reads cost who computes, by how much longer passes take that never wait; and the disk's rate in those that do.

    Args:
        studied: what is known; of the disk the rate at which nobody computes.
        slots_nbytes: that there were to read into.
        tokens: of the passes.
        codecs: of the layers while they were in memory.
        streaming: passes with no layers on the disk, with a few, and with all of them there.
    """
    predictor = studied.predictor(slots_nbytes)
    units = {unit.name: unit for unit in studied.units}
    verify_gbps = studied.machine.verify_gbps or math.inf

    def cost_of_a_read(plain: PassSample, few: PassSample) -> float:
        reads, expected_s = 0, 0.0
        for name in streaming.few:
            unit, codec = units[name], units[name].file_codec or ""
            reads += unit.multiplied * predictor.pieces(unit.nbytes[codec])
            expected_s += unit.multiplied * unit.nbytes[codec] / (verify_gbps * 1e9)
            expected_s += predictor.compute_s(unit, codec, tokens)
            expected_s -= predictor.compute_s(unit, codecs[name], tokens)
        cost = few.seconds - few.stalled_s - plain.seconds - expected_s
        return max(cost, 0.0) / max(reads, 1)

    # The speed of a machine may change from round to round.
    read_s = statistics.median(cost_of_a_read(plain, few) for plain, few, _ in streaming.rounds)
    disk = replace(studied.observed.disk[slots_nbytes], read_s=read_s)
    whole = typical_sample([whole for _, _, whole in streaming.rounds])
    if whole.waits:  # as fast as it reads while someone computes
        disk = replace(disk, gbps=whole.disk_gbps)
    return disk


def study_of_units(
    units: list[Unit],
    others: int,
    machine: Machine | str | Path | None = None,
    device: str | None = None,
) -> Study:
    """Of a model that is not here: ``dcext.policy.shapes.units_of``.

    Args:
        units: the payloads.
        others: bytes that are not compressed.
        machine: as for ``plan``.
        device: of this machine, if ``machine`` is None, where the model is to run; None for the CPU.
    """
    return Study(units, _machine(machine, device), Observed(), others)


def _machine(machine: Machine | str | Path | None, device: str | None = None) -> Machine:
    if machine is None:
        return tune() if device is None else tune(device=device)
    if isinstance(machine, Machine):
        return machine
    check_type("machine", machine, (str, Path), "a Machine, a file or a preset's name")
    if not Path(machine).is_file():
        return preset(str(machine))
    try:
        return load_machine(machine)
    except FormatError as error:
        raise FormatError(f"machine: {error}") from None
