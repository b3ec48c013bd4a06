"""Chooses a tier for each layer: least time within budgets of memory, or least memory within a bound of time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcext.codecs import arrivals, codec_named
from dcext.policy.plan import Plan, PlannedLayer, PlannedPass, count_tokens
from dcext.policy.predict import (
    COMPUTE,
    DISK,
    RESOURCES,
    Predictor,
    Unit,
    pass_order,
    read_nbytes,
)
from dcext.policy.solve import Choice, Floats, Problem, bound, solutions
from dcext.policy.tier import HOST_DECODE, Tier
from dcext.policy.timeline import Integers, anneal

FINE = 0.005  # of memory, for a bound of time
SPREAD_LOSES = 1e-3  # relative time that an even order may cost
GAINS = 1e-3  # relative time that copies to a device, and reads from the disk, must save
SLOWER_DISK = 1.4  # so many times as slow, to find candidates that read less
STEPS, QUICK_STEPS = 150_000, 50_000  # of annealing, for each unit; of some nanoseconds each
SLOTS = 2  # on a device: one is filled while the other is used
UNBOUNDED = 1 << 50  # bytes; sums stay exact in float64


@dataclass(frozen=True)
class Budget:
    """Memory for weights.

    Attributes:
        host: bytes; None without a bound.
        device: bytes on the device; None without a bound, or without a device.
        others: of the memory where the model runs, bytes of what is not compressed.
        slots: bytes to read into, taken from host memory as soon as one unit is on disk.
    """

    host: int | None
    device: int | None
    others: int = 0
    slots: int = 0


@dataclass(frozen=True)
class DeviceReserve:
    """Bytes on a device for what is not resident there.

    Attributes:
        arrives: codecs in which units may arrive in slots.
        decodes: whether matrices may be decoded whole there.
        nbytes: two slots of the largest block's units, and room for the matrices of one block; an upper bound.
    """

    arrives: tuple[str, ...]
    decodes: bool
    nbytes: int

    def allows(self, tier: Tier) -> bool:
        """Whether a unit may be in a tier of a device machine."""
        if tier == HOST_DECODE:
            return "raw" in self.arrives
        if codec_named(tier.codec).decoded_whole and not self.decodes:
            return False
        return tier.place == "device" or tier.codec in self.arrives


def device_reserves(units: Sequence[Unit]) -> list[DeviceReserve]:
    """What a device may need besides the units that are resident there, smallest first."""
    blocks: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.block is not None:
            blocks[unit.block].append(unit)
    decoded = max((sum(u.weights for u in members) for members in blocks.values()), default=0)
    found = []
    for arrives in arrivals():  # the more codecs, the more bytes
        of_blocks = [sum(_largest(u, arrives) for u in members) for members in blocks.values()]
        slot = max(of_blocks, default=0)
        plain = not (arrives and codec_named(arrives[-1]).decoded_whole)
        found += [DeviceReserve(arrives, False, SLOTS * slot)] * plain
        found.append(DeviceReserve(arrives, True, SLOTS * slot + decoded))
    return sorted(found, key=lambda room: room.nbytes)


class BudgetError(ValueError):
    """No plan keeps to a budget. The message says by how much the smallest one misses it."""


class Decider:
    """All plans of a model on a machine."""

    def __init__(
        self, predictor: Predictor, units: Sequence[Unit], mix: Mapping[int, float], others: int
    ) -> None:
        """Computes the time of every unit in every tier.

        Args:
            predictor: of times.
            units: of the model.
            mix: how many passes there are of each number of tokens.
            others: bytes of what is not compressed, where the model runs.
        """
        self.predictor = predictor
        self.units = list(units)
        self.mix = dict(mix)
        self.others = others
        self.on_device = predictor.machine.device is not None
        self.tiers = [predictor.tiers(unit) for unit in self.units]
        self.device_reserves: list[DeviceReserve | None] = [None]  # without a device
        if self.on_device:
            self.device_reserves = [*device_reserves(self.units)]
        self.time, self.memory = self._tables()
        self.read = self._read_nbytes()

    def _tables(self) -> tuple[Floats, Floats]:
        """Seconds (units + 1, tiers, resources, workloads), infinite where there is no tier; bytes (units + 1, tiers, 2).

        The last unit is all that is not compressed.
        """
        most = max((len(tiers) for tiers in self.tiers), default=1)
        count, workloads = len(self.units), list(self.mix)
        time = np.full((count + 1, most, len(RESOURCES), len(workloads)), np.inf)
        memory = np.zeros((count + 1, most, 2))
        for i, unit in enumerate(self.units):
            for j, tier in enumerate(self.tiers[i]):
                for w, tokens in enumerate(workloads):
                    time[i, j, :, w] = self.predictor.seconds(unit, tier, tokens)
                memory[i, j] = self.predictor.memory(unit, tier)
        time[count, 0] = 0.0
        time[count, 0, COMPUTE] = [self.predictor.other_s(tokens) for tokens in workloads]
        return time, memory

    def _read_nbytes(self) -> Integers:
        """Bytes that a pass reads from the disk, (units, tiers)."""
        read = np.zeros((len(self.units), self.time.shape[1]), dtype=np.int64)
        for i, tiers in enumerate(self.tiers):
            read[i, : len(tiers)] = [read_nbytes(self.units[i], tier) for tier in tiers]
        return read

    def problem(self, budget: Budget, *, disk: bool, room: DeviceReserve | None) -> Problem:
        """What ``solve`` takes, with or without tiers on disk, and with those that there is room for on a device."""
        time = self.time.copy()
        for i, tiers in enumerate(self.tiers):
            for j, tier in enumerate(tiers):
                if (_is_on_disk(tier) and not disk) or (room is not None and not room.allows(tier)):
                    time[i, j] = np.inf
        host = UNBOUNDED if budget.host is None else budget.host
        device = UNBOUNDED if budget.device is None else budget.device
        host -= budget.slots * disk + self.others * (room is None)
        device -= 0 if room is None else room.nbytes + self.others
        weight = np.array(list(self.mix.values()), dtype=np.float64)
        return Problem(time, self.memory, np.array([host, device], dtype=np.float64), weight)

    def within(self, budget: Budget, *, quick: bool = False) -> dict[str, Tier]:
        """The fastest tiers within a budget; nearly so if ``quick``.

        Candidates come from the model of resources that overlap wholly. Where a CPU reads from the disk they do not, and the
        best candidate of each variant is annealed by the whole prediction.

        Raises:
            BudgetError: not even the smallest fit: by how much.
        """
        best: tuple[float, dict[str, Tier]] | None = None
        total = sum(self.mix.values())
        for problem in self._problems(budget):
            if (problem.budget < 0).any():
                continue
            if best is not None and bound(problem) / total >= best[0] * (1 - GAINS):
                continue
            anneals = not self.on_device and self._reads(problem)
            for variant in self._variants(problem, budget) if anneals else [problem]:
                choices = solutions(variant, quick=quick or anneals)
                if not choices:
                    continue
                choice = min((self._spread(problem, c) for c in choices), key=self._mean_s_of)
                if anneals:
                    choice = self._annealed(problem, choice, budget.slots, quick)
                seconds = self._mean_s_of(choice)
                if best is None or seconds < best[0]:
                    best = seconds, self._named(choice)
        if best is None:
            raise BudgetError(self._shortfall(budget))
        return best[1]

    def _mean_s_of(self, choice: Choice) -> float:
        return self.mean_s(self._named(choice))

    def _reads(self, problem: Problem) -> bool:
        """Whether a problem has tiers on the disk."""
        return any(
            _is_on_disk(tier) and np.isfinite(problem.time[i, j]).all()
            for i, tiers in enumerate(self.tiers)
            for j, tier in enumerate(tiers)
        )

    def _annealed(self, problem: Problem, choice: Choice, slots: int, quick: bool) -> Choice:
        """Tiers that are no slower by the whole prediction."""
        order = pass_order(self.units)
        found = choice.copy()
        found[order] = anneal(
            # What is not compressed is the last unit; it is spread over all.
            problem.time[order, :, COMPUTE] + problem.time[-1, 0, COMPUTE] / len(order),
            self.read[order],
            problem.memory[order, :, 0].astype(np.int64),
            problem.weight,
            int(problem.budget[0]),
            self.predictor.disk_gbps * 1e9,
            slots,
            choice[order],
            len(order) * (QUICK_STEPS if quick else STEPS),
        )
        return found

    def _problems(self, budget: Budget) -> Iterator[Problem]:
        """With the tiers that a budget may call for; reads and copies cost memory even if little uses them."""
        known = {tier for tiers in self.tiers for tier in tiers}
        for room in self.device_reserves:
            allowed = [tier for tier in known if room is None or room.allows(tier)]
            yield self.problem(budget, disk=False, room=room)
            if any(map(_is_on_disk, allowed)):
                yield self.problem(budget, disk=True, room=room)

    def _variants(self, problem: Problem, budget: Budget) -> Iterator[Problem]:
        """A problem that reads from the disk; it with a slower disk, and with nothing there that slots cannot hold.

        What is best for those has less that cannot overlap, which the problem knows nothing of.
        """
        yield problem
        slower, small = problem.time.copy(), problem.time.copy()
        slower[:, :, DISK] *= SLOWER_DISK
        for i, unit in enumerate(self.units):
            if unit.multiplied and min(unit.nbytes.values()) > budget.slots:
                small[i, [j for j, tier in enumerate(self.tiers[i]) if _is_on_disk(tier)]] = np.inf
        yield replace(problem, time=slower)
        yield replace(problem, time=small)

    def smallest(self, budget: Budget) -> int:
        """Bytes of host memory below which nothing fits, if there is room on the device."""
        free = replace(budget, host=None)
        least = []
        for problem in self._problems(free):
            exists = np.isfinite(problem.time).all(axis=(2, 3))
            nbytes = np.where(exists, problem.memory[:, :, 0], np.inf).min(axis=1).sum()
            least.append(nbytes + UNBOUNDED - problem.budget[0])
        return int(min(least))

    def _shortfall(self, budget: Budget) -> str:
        if self.on_device:
            return (
                f"plan: expected room for the smallest tiers in {budget.device} bytes of device memory and "
                f"{'any' if budget.host is None else budget.host} of host memory, found that they do not fit"
            )
        least = self.smallest(budget)
        missing = least - (budget.host or 0)
        return (
            f"host_memory: expected at least {least} bytes: {self.others} that are not compressed, the rest for weights and "
            f"to read into; got {budget.host}, {missing} bytes too few"
        )

    def smallest_within(self, bound: float, budget: Budget) -> dict[str, Tier]:
        """The tiers of least memory, where the model runs, whose mean time is within a bound.

        Args:
            bound: seconds of a pass of the mix on average.
            budget: that must be kept as well.

        Raises:
            BudgetError: not even the fastest tiers are within both.
        """
        fastest = self.within(budget)
        if self.mean_s(fastest) > bound:
            raise BudgetError(
                f"plan: expected at most {bound * 1e3:.3f} ms a pass, found {self.mean_s(fastest) * 1e3:.3f} ms for the "
                "fastest tiers within the budget"
            )
        where = int(self.on_device)
        best, low, high = fastest, 0, self.nbytes(fastest, budget)[where]
        while high - low > FINE * self.nbytes(fastest, budget)[where]:
            middle = (low + high) // 2
            tiers = self._fast_enough(middle, bound, budget, quick=True)
            if tiers is None:
                low = middle
            else:
                best, high = tiers, self.nbytes(tiers, budget)[where]
        # Where a quick look failed a thorough one may not: a little less is tried.
        return self._fast_enough(low, bound, budget, quick=False) or best

    def _fast_enough(
        self, nbytes: int, bound: float, budget: Budget, *, quick: bool
    ) -> dict[str, Tier] | None:
        """Tiers in so much memory where the model runs that keep a bound of time, or None."""
        place = {"device": nbytes} if self.on_device else {"host": nbytes}
        try:
            tiers = self.within(replace(budget, **place), quick=quick)
        except BudgetError:
            return None
        return tiers if self.mean_s(tiers) <= bound else None

    def int8(self) -> dict[str, Tier]:
        """Everything as plain INT8 where the model runs."""
        place = "device" if self.on_device else "memory"
        return {unit.name: Tier(place, "raw") for unit in self.units}

    def mean_s(self, tiers: Mapping[str, Tier]) -> float:
        """Seconds of a pass of the mix on average."""
        passes = [
            weight * self.predictor.predict(self.units, tiers, tokens).pipelined_s
            for tokens, weight in self.mix.items()
        ]
        return sum(passes) / sum(self.mix.values())

    def nbytes(self, tiers: Mapping[str, Tier], budget: Budget) -> tuple[int, int]:
        """Bytes of weights in host and device memory: payloads, what is not compressed, room for reads and on the device."""
        host = device = 0
        for unit in self.units:
            in_host, on_device = self.predictor.memory(unit, tiers[unit.name])
            host += in_host
            device += on_device
        places = {tier.place for tier in tiers.values()}
        host += budget.slots * ("disk" in places)
        if self.on_device:
            device += self.others + self._room(tiers.values())
        else:
            host += self.others
        return host, device

    def _room(self, tiers: Collection[Tier]) -> int:
        return next(
            room.nbytes
            for room in self.device_reserves
            if room is not None and all(map(room.allows, tiers))
        )

    def _named(self, choice: Choice) -> dict[str, Tier]:
        return {unit.name: self.tiers[i][choice[i]] for i, unit in enumerate(self.units)}

    def _spread(self, problem: Problem, choice: Choice) -> Choice:
        """The same tiers, spread evenly among units of a kind: reads of one overlap with computing of others."""
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, unit in enumerate(self.units):
            groups[(unit.kind, tuple(self.tiers[i]))].append(i)
        spread = choice.copy()
        for members in groups.values():
            spread[members] = _interleaved(choice[members])
        slower = problem.seconds(spread) > problem.seconds(choice) * (1 + SPREAD_LOSES)
        return choice if slower or not problem.fits(spread) else spread

    def plan(self, tiers: Mapping[str, Tier], budget: Budget, objective: str) -> Plan:
        """All that there is to say of a choice of tiers."""
        predict = self.predictor.predict
        passes, int8 = [], self.int8() if all("raw" in u.nbytes for u in self.units) else None
        for tokens, weight in self.mix.items():
            found = predict(self.units, tiers, tokens)
            plain = found if int8 is None else predict(self.units, int8, tokens)
            passes.append(
                PlannedPass(
                    tokens=tokens,
                    weight=weight,
                    seconds=found.pipelined_s,
                    serial_s=found.serial_s,
                    other_s=found.other_s,
                    resources_s=dict(zip(RESOURCES, found.resources_s, strict=True)),
                    binds=found.binds,
                    int8_s=plain.pipelined_s,
                )
            )
        host, device = self.nbytes(tiers, budget)
        int8_nbytes = self.others + sum(unit.nbytes.get("raw", unit.weights) for unit in self.units)
        machine = self.predictor.machine
        plan = Plan(
            layers=[self._layer(unit, tiers[unit.name]) for unit in self.units],
            passes=passes,
            host_memory=budget.host,
            device_memory=budget.device,
            host_nbytes=host,
            device_nbytes=device,
            int8_nbytes=int8_nbytes,
            slots_nbytes=budget.slots,
            objective=objective,
            machine=machine.name,
            kind=machine.kind,
            notes=[],
        )
        plan.notes.extend(notes(plan))
        return plan

    def _layer(self, unit: Unit, tier: Tier) -> PlannedLayer:
        taken = {tokens: self.predictor.seconds(unit, tier, tokens) for tokens in self.mix}
        return PlannedLayer(
            name=unit.name,
            tier=tier,
            nbytes=unit.nbytes[tier.codec],
            seconds={tokens: float(s.max()) for tokens, s in taken.items()},
            binds={tokens: RESOURCES[int(s.argmax())] for tokens, s in taken.items()},
        )


def _largest(unit: Unit, codecs: Collection[str]) -> int:
    """Bytes on a device at most, in one of some codecs that there are of it; raw can always be made."""
    known = [codec for codec in codecs if codec in unit.nbytes or codec == "raw"]
    return max(map(unit.device_nbytes, known), default=0)


def _is_on_disk(tier: Tier) -> bool:
    return tier.place == "disk"


def notes(plan: Plan) -> list[str]:
    """What a plan tells its user in words."""
    bound = plan.host_memory if plan.device_nbytes == 0 else plan.device_memory
    found = []
    tiers = set(plan.tiers.values())
    if bound is not None and plan.int8_nbytes <= bound:
        text = "plain INT8 fits in the memory that there is"
        is_plain = all(tier.codec == "raw" for tier in tiers)
        text += ": nothing is compressed" if is_plain else "; what is compressed here is faster so"
        found.append(text)
    found += [
        f"passes of {count_tokens(each.tokens)}: {each.binds} binds, {each.slowdown:+.1%} of the time of plain INT8"
        for each in plan.passes
    ]
    return found


def _interleaved(values: Choice) -> Choice:
    """The same values, each spread evenly over the places."""
    kinds, counts = np.unique(values, return_counts=True)
    # The k-th of n equal ones goes near (k + 1/2) / n of the way.
    at = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    order = np.argsort(at, kind="stable")
    return np.repeat(kinds, counts)[order]
