"""Chooses one option for each of many things, so that the slowest resource takes least time within budgets of memory.

A multiple-choice knapsack whose objective is a weighted sum of maxima:

    minimize    sum_w weight[w] * max_r sum_i time[i, choice[i], r, w]
    subject to  sum_i memory[i, choice[i], p] <= budget[p]   for every pool p

(r: resources that work side by side, such as processors and the disk; w: workloads, such as one token and 512). The
relaxation gives every budget a price and splits every maximum into prices of its resources; then each thing chooses by
itself. Prices are found by the subgradient method (Held, Wolfe, Crowder, Validation of subgradient optimization,
Mathematical Programming 6, 1974); what they choose is made to fit, and improved by single moves and by pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

STEPS = 200
FITTED = 40  # candidates that are made to fit
IMPROVED = 8  # of the candidates, the best so many
DRAWN = 16  # candidates at drawn prices of pools, for budgets that are hard to meet
PAIRS = 1_000_000  # candidates of pair moves looked at in all
IMPROVES = 1e-9  # relative; less is rounding


@dataclass(frozen=True)
class Problem:
    """See the module.

    Attributes:
        time: seconds, ``(things, options, resources, workloads)``; infinity where an option does not exist.
        memory: bytes, ``(things, options, pools)``.
        budget: bytes, ``(pools,)``.
        weight: of the workloads, ``(workloads,)``.
    """

    time: Floats
    memory: Floats
    budget: Floats
    weight: Floats

    def seconds(self, choice: Choice) -> float:
        """The objective."""
        return float(self.weight @ self._sums(self.time, choice).max(axis=0))

    def memory_of(self, choice: Choice) -> Floats:
        """Bytes in each pool, ``(pools,)``."""
        return self._sums(self.memory, choice)

    def fits(self, choice: Choice) -> bool:
        """Whether a choice keeps to the budgets."""
        return bool((self.memory_of(choice) <= self.budget).all())

    @staticmethod
    def _sums(values: Floats, choice: Choice) -> Floats:
        return values[np.arange(len(choice)), choice].sum(axis=0)


def solve(problem: Problem) -> Choice | None:
    """A choice that fits and is nearly the fastest, ``(things,)``; None where the smallest of everything does not fit.

    Deterministic. Against exhaustive search on small cases it is within 3 % (and nearly always equal); for thousands of
    things it takes seconds.
    """
    found = solutions(problem)
    return found[0] if found else None


def solutions(problem: Problem, *, quick: bool = False) -> list[Choice]:
    """A few good choices that fit, the best first: the first is ``solve``'s, unless ``quick``, which tries no pairs."""
    if len(problem.time) == 0:
        return [np.zeros(0, dtype=np.int64)]
    search = _Search(problem)
    found = search.candidates()
    if len(found) > FITTED:  # evenly along the way, which ends near the best, and that end
        found = _distinct([*found[:: -(-2 * len(found) // FITTED)], *found[-FITTED // 2 :]])
    fitted = [choice for choice in map(search.fit, found) if choice is not None]
    if not fitted:
        return []
    fitted = sorted(_distinct(fitted), key=problem.seconds)[:IMPROVED]
    improved = sorted((search.improve(choice) for choice in fitted), key=problem.seconds)
    if quick:
        return _distinct(improved)
    return _distinct([search.improve_by_pairs(improved[0]), *improved])


def _distinct(choices: list[Choice]) -> list[Choice]:
    return list({choice.tobytes(): choice for choice in choices}.values())


class _Search:
    """Working arrays of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.exists = np.isfinite(problem.time).all(axis=(2, 3))
        self.time = np.where(np.isfinite(problem.time), problem.time, 0.0)
        # In units of the budgets, so that prices of pools compare.
        self.scale = np.maximum(problem.budget, 1.0)
        self.share = problem.memory / self.scale

    def cheapest(self, split: Floats, price: Floats) -> Choice:
        """What each thing chooses at prices: ``split`` (resources, workloads), ``price`` (pools,)."""
        cost = np.einsum("iorw,rw->io", self.time, split) + self.share @ price
        return np.where(self.exists, cost, np.inf).argmin(axis=1)

    def candidates(self) -> list[Choice]:
        """Choices along the way of the subgradient method, and the smallest one."""
        problem = self.problem
        _, _, resources, workloads = problem.time.shape
        split = np.tile(problem.weight, (resources, 1)) / resources
        price = np.zeros(len(problem.budget))
        size = np.full(len(problem.budget), 1e6)
        smallest = self.cheapest(np.full((resources, workloads), 1e-9), size)
        found = [smallest]
        reference = max(problem.seconds(smallest), 1e-12)
        for step in range(STEPS):
            choice = self.cheapest(split, price)
            found.append(choice)
            rate = 1.0 / (1 + step) ** 0.6
            sums = Problem._sums(self.time, choice)
            # Multiplicative: the split of each workload stays on the simplex.
            gap = (sums - sums.max(axis=0)) / np.maximum(sums.max(axis=0), 1e-12)
            split = split * np.exp(2 * rate * gap)
            split *= problem.weight / np.maximum(split.sum(axis=0), 1e-300)
            excess = Problem._sums(self.share, choice) - problem.budget / self.scale
            price = np.maximum(price + rate * reference * excess, 0.0)
        draw = np.random.default_rng(0)
        for _ in range(DRAWN):
            price = draw.dirichlet(np.ones(len(problem.budget))) * reference
            found.append(self.cheapest(split * 1e-6, price))
        return _distinct(found)

    def moves(self, choice: Choice) -> tuple[Floats, Floats]:
        """What every single move gives: seconds ``(things, options)`` and bytes ``(things, options, pools)``."""
        things = np.arange(len(choice))
        sums = Problem._sums(self.time, choice)
        after = sums + self.time - self.time[things, choice][:, None]
        seconds = after.max(axis=2) @ self.problem.weight
        seconds = np.where(self.exists, seconds, np.inf)
        chosen = self.problem.memory[things, choice][:, None]
        return seconds, self.problem.memory_of(choice) + self.problem.memory - chosen

    def fit(self, choice: Choice) -> Choice | None:
        """Moves to what takes least time for each byte that is too much, until all fits."""
        choice = choice.copy()
        budget = self.problem.budget
        for _ in range(choice.size * self.exists.shape[1] + 1):
            memory = self.problem.memory_of(choice)
            excess = np.maximum(memory - budget, 0) / self.scale
            if not excess.any():
                return choice
            seconds, after = self.moves(choice)
            saved = (excess - np.maximum(after - budget, 0) / self.scale).sum(axis=2)
            slower = np.maximum(seconds - self.problem.seconds(choice), 0) + 1e-15
            gain = np.where((saved > 0) & np.isfinite(seconds), saved / slower, 0.0)
            if not gain.any():
                return None
            thing, option = np.unravel_index(int(gain.argmax()), gain.shape)
            choice[thing] = option
        return None

    def improve(self, choice: Choice) -> Choice:
        """The best single move that fits, as long as there is one."""
        choice = choice.copy()
        now = self.problem.seconds(choice)
        while True:
            seconds, memory = self.moves(choice)
            seconds = np.where((memory <= self.problem.budget).all(axis=2), seconds, np.inf)
            thing, option = np.unravel_index(int(seconds.argmin()), seconds.shape)
            if not seconds[thing, option] < now * (1 - IMPROVES):
                return choice
            choice[thing] = option
            now = float(seconds[thing, option])

    def improve_by_pairs(self, choice: Choice) -> Choice:
        """Two moves at a time, one of which may make room for the other."""
        choice = choice.copy()
        things, options = self.exists.shape
        budget_of_work = PAIRS // max(things * options, 1)
        now = self.problem.seconds(choice)
        for _ in range(max(1, min(budget_of_work, 4 * things))):
            best_seconds, best = now * (1 - IMPROVES), choice
            for thing, option in np.argwhere(self.exists):
                if option == choice[thing]:
                    continue
                budget_of_work -= 1
                if budget_of_work < 0:
                    return choice
                other = choice.copy()
                other[thing] = option
                seconds, memory = self.moves(other)
                seconds[thing] = np.inf
                seconds = np.where((memory <= self.problem.budget).all(axis=2), seconds, np.inf)
                place = int(seconds.argmin())
                if seconds.flat[place] < best_seconds:
                    second, move = np.unravel_index(place, seconds.shape)
                    other[second] = move
                    best_seconds, best = float(seconds.flat[place]), other
            if best is choice:
                return choice
            now, choice = best_seconds, best
        return choice
