"""Plans: nearly the best in small cases, by times of passes that reads overlap in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import dcext
from dcext.offloading.weights import weights_of
from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.machine import Machine
from dcext.policy.predict import Observed, ObservedDisk, Predictor
from dcext.policy.timeline import SLOTS, anneal, pass_s, slots_of
from dcext.weights.host_stream import HostStream
from policy_cases import CPU, GPU, drawn_units


def drawn_case(seed: int, machine: Machine) -> tuple[Decider, Budget]:
    """A model of up to five layers, and a budget that may be too small."""
    draw = np.random.default_rng(seed)
    units = drawn_units(draw, int(draw.integers(1, 6 if machine is CPU else 4)))
    observed = Observed(
        other_s={1: float(draw.exponential(1e-3))}, disk={1 << 20: ObservedDisk(2.0, 2e-5)}
    )
    mix = {1: 1.0} if draw.random() < 0.5 else {1: 100.0, 512: 1.0}
    slots = 1 << 20
    decider = Decider(Predictor(machine, observed=observed, slots_nbytes=slots), units, mix, 1000)
    int8 = sum(unit.nbytes["raw"] for unit in units)
    host = int(draw.uniform(0, 1.2) * int8) + slots
    device = None if machine is CPU else int(draw.uniform(0.2, 1.2) * int8) + 1000
    return decider, Budget(host, device, 1000, slots)


def exhaustive(decider: Decider, budget: Budget) -> float:
    """Seconds of the fastest tiers; infinity where none fit."""
    best = np.inf
    names = [unit.name for unit in decider.units]
    for choice in itertools.product(*decider.tiers):
        tiers = dict(zip(names, choice, strict=True))
        host, device = decider.nbytes(tiers, budget)
        fits = budget.host is None or host <= budget.host
        if fits and (budget.device is None or device <= budget.device):
            best = min(best, decider.mean_s(tiers))
    return best


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(25))
def test_plans_are_nearly_the_best(seed, machine):
    decider, budget = drawn_case(seed, machine)
    best = exhaustive(decider, budget)
    try:
        tiers = decider.within(budget)
    except BudgetError:
        assert best == np.inf
        return
    host, device = decider.nbytes(tiers, budget)
    assert host <= budget.host
    assert budget.device is None or device <= budget.device
    assert decider.mean_s(tiers) <= 1.03 * best


@pytest.mark.parametrize("seed", range(8))
def test_least_memory_within_a_bound_of_time(seed):
    decider, budget = drawn_case(seed, CPU)
    free = Budget(None, None, budget.others, budget.slots)
    bound = 1.2 * decider.mean_s(decider.int8())
    tiers = decider.smallest_within(bound, free)
    assert decider.mean_s(tiers) <= bound
    least = min(
        decider.nbytes(dict(zip((u.name for u in decider.units), choice, strict=True)), free)[0]
        for choice in itertools.product(*decider.tiers)
        if decider.mean_s(dict(zip((u.name for u in decider.units), choice, strict=True))) <= bound
    )
    assert decider.nbytes(tiers, free)[0] <= 1.03 * least


def test_a_budget_that_nothing_fits_says_by_how_much():
    decider, budget = drawn_case(0, CPU)
    least = decider.smallest(Budget(0, None, budget.others, budget.slots))
    with pytest.raises(BudgetError, match=f"expected at least {least} bytes"):
        decider.within(Budget(least - 1, None, budget.others, budget.slots))
    assert decider.within(Budget(least, None, budget.others, budget.slots))


def test_reads_overlap_as_far_as_slots_allow():
    piece, disk = 1 << 20, 2e9
    slots = SLOTS * piece
    even = pass_s([1e-3] * 20, [piece] * 20, disk, slots)
    assert even == pytest.approx(20e-3)  # computing hides the disk
    slow = pass_s([1e-4] * 20, [piece] * 20, disk, slots)
    assert slow == pytest.approx(20 * piece / disk, rel=0.1)  # the disk binds
    # As many bytes in the last layer: slots hold so much of it, the rest is waited for.
    last = pass_s([1e-3] * 19 + [1e-4], [0] * 19 + [40 * piece], disk, slots)
    assert last == pytest.approx(19e-3 + (40 - SLOTS) * piece / disk, rel=0.02)
    assert pass_s([1e-3, 2e-3], [0, 0], disk, slots) == pytest.approx(3e-3)


def test_slots_are_those_of_streams(checkpoints):
    weights = weights_of(dcext.from_pretrained(checkpoints["packed"]))
    origins = {weight.name: weight.origin for weight in weights}
    for nbytes in (1 << 20, 2 << 20, 3_000_000, 4 << 20, 8 << 20, 16 << 20, 100 << 20):
        count, slot_nbytes = slots_of(nbytes)
        slot_nbytes = slot_nbytes // 4096 * 4096
        stream = HostStream(origins, nbytes)
        assert stream.slots_nbytes == nbytes // slot_nbytes * slot_nbytes
        assert count <= nbytes // slot_nbytes
        stream.close()


@pytest.mark.parametrize("seed", range(20))
def test_times_of_passes_are_those_of_the_formula(seed):
    """dcext.policy.timeline's, written out."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 30))
    compute = draw.exponential(1e-3, count)
    read = draw.integers(0, 8 << 20, count) * (draw.random(count) < 0.5)
    slots_nbytes, disk = int(draw.choice([1 << 20, 2 << 20, 16 << 20])), 1e9
    slots, slot_nbytes = slots_of(slots_nbytes)
    pieces = []
    for seconds, nbytes in zip(compute, read, strict=True):
        parts = max(1, -(-int(nbytes) // slot_nbytes))
        pieces += [(seconds / parts, nbytes / parts)] * parts
    used, read_end, ends = 0.0, 0.0, []
    released = [0.0] * slots  # when each of the last pieces that were read was used
    for _ in range(3):
        for seconds, nbytes in pieces:
            if nbytes:
                read_end = max(read_end, released[-slots]) + nbytes / disk
                used = max(used, read_end)
            used += seconds
            if nbytes:
                released.append(used)
        ends.append(used)
    expected = pytest.approx(ends[2] - ends[1])
    assert pass_s(compute, read, disk, slots_nbytes) == expected


@pytest.mark.parametrize("seed", range(20))
def test_annealing_keeps_the_budget_and_is_never_slower(seed):
    draw = np.random.default_rng(seed)
    units, tiers, disk, slots = int(draw.integers(1, 9)), 3, 1e9, 2 << 20
    rows = np.arange(units)
    compute = draw.exponential(1e-3, (units, tiers, 2))
    compute[draw.random((units, tiers)) < 0.2] = np.inf
    compute[:, 2] = draw.exponential(1e-3, (units, 2))  # a tier that all have, on the disk
    memory = draw.integers(1 << 18, 4 << 20, (units, tiers))
    read = memory * [0, 0, 1]
    memory[:, 2] = 0
    weights = np.array([3.0, 1.0])
    budget = int(draw.uniform(0, 1) * memory.max(axis=1).sum())

    def seconds(choice: np.ndarray) -> float:
        taken = [pass_s(compute[rows, choice, w], read[rows, choice], disk, slots) for w in (0, 1)]
        return float(weights @ taken)

    start = np.full(units, 2)
    found = [
        anneal(compute, read, memory, weights, budget, disk, slots, start, steps)
        for steps in (300_000, 300_000, 0)
    ]
    assert (found[0] == found[1]).all()
    assert (found[2] == start).all()
    assert memory[rows, found[0]].sum() <= budget
    every = (np.array(choice) for choice in itertools.product(range(tiers), repeat=units))
    exist = (choice for choice in every if np.isfinite(compute[rows, choice]).all())
    fit = [choice for choice in exist if memory[rows, choice].sum() <= budget]
    assert seconds(found[0]) <= seconds(start)
    assert seconds(found[0]) <= 1.03 * min(map(seconds, fit))
    with pytest.raises(ValueError, match="choice: expected 0 to 2, got 3"):
        anneal(compute, read, memory, weights, budget, disk, slots, start + 1, 1)
    shape = rf"expected \(units, tiers\) .* \[{units}, 3\], got \[{units}, 1\]"
    with pytest.raises(ValueError, match=shape):
        anneal(compute, read[:, :1], memory, weights, budget, disk, slots, start, 1)
    with pytest.raises(ValueError, match="of them, got 3 and"):
        anneal(compute, read, memory, np.ones(3), budget, disk, slots, start, 1)
