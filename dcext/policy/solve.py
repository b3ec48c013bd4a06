"""Chooses one option for each of many things, so that the slowest resource takes least time within budgets of memory.

A multiple-choice knapsack whose objective is a weighted sum of maxima:

    minimize    sum_w weight[w] * max_r sum_i time[i, choice[i], r, w]
    subject to  sum_i memory[i, choice[i], p] <= budget[p]   for every pool p

(r: resources that work side by side, such as processors and the disk; w: workloads, such as one token and 512). In the
relaxation things may take options in part. Its dual has few variables, a price of every budget and a split of every
maximum among its resources, at which each thing chooses by itself; it is smoothed, so that things choose in part, and
solved by Newton's method with a barrier (Boyd, Vandenberghe, Convex Optimization, 2004, chapter 11; entropic smoothing:
Nesterov, Smooth minimization of non-smooth functions, Mathematical Programming 103, 2005). What is chosen in part is
rounded so that sums stay, made to fit, and improved by single moves and by pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Of the smoothing, relative to the seconds of the smallest choice: the relaxation is off by a few times the last.
SMOOTHINGS = tuple(10.0 ** (-k / 2) for k in range(13))
NEWTON_STEPS, HALVINGS = 12, 30
ORDERS, ORDERED = (
    (4, 32),
    2000,
)  # in which shares are rounded, beside the first: more of them for few things
IMPROVED = 8  # of the candidates, the best so many
LEAST_SHARE = 1e-3  # of an option that a thing can be rounded to
DRAWN = 16  # candidates at drawn prices of pools, for budgets that are hard to meet
NEAR = 5e-4  # relative to the bound; what is nearer is not improved by pairs
PAIRS = 4_000_000  # candidates of pair moves looked at in all
ROUNDING = 1e-8  # relative, of sums
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

    Deterministic. Equal to exhaustive search on 4000 small cases drawn at random; for published shapes on the presets within
    0.1 % of ``bound`` at the median, and 11 % above it at worst, where one payload is a large part of the model. Takes about a
    second for 200 things, two for 600.
    """
    found = solutions(problem)
    return found[0] if found else None


def solutions(problem: Problem, *, quick: bool = False) -> list[Choice]:
    """A few good choices that fit, the best first: the first is ``solve``'s, unless ``quick``, which tries no pairs."""
    if len(problem.time) == 0:
        return [np.zeros(0, dtype=np.int64)]
    search = _Search(problem)
    if not search.exists.any(axis=1).all():
        return []
    fitted = [choice for choice in map(search.fit, search.candidates()) if choice is not None]
    if not fitted:
        return []
    fitted = sorted(_distinct(fitted), key=problem.seconds)[:IMPROVED]
    improved = sorted((search.improve(choice) for choice in fitted), key=problem.seconds)
    if quick or problem.seconds(improved[0]) <= (1 + NEAR) * search.bound():
        return _distinct(improved)
    return _distinct([search.improve_by_pairs(improved[0]), *improved])


def bound(problem: Problem) -> float:
    """Seconds below which there is no choice that fits, by duality; infinite where something has no option at all."""
    if len(problem.time) == 0:
        return 0.0
    search = _Search(problem)
    if not search.exists.any(axis=1).all():
        return math.inf
    return search.bound()


def _distinct(choices: list[Choice]) -> list[Choice]:
    return list({choice.tobytes(): choice for choice in choices}.values())


class _Search:
    """Working arrays of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        fits = (problem.memory <= problem.budget).all(axis=2)
        self.exists: Bools = np.asarray(np.isfinite(problem.time).all(axis=(2, 3)) & fits)
        self.time = np.where(np.isfinite(problem.time), problem.time, 0.0)
        # In units of the budgets, so that prices of pools compare.
        self.scale = np.maximum(problem.budget, 1.0)
        self.share = problem.memory / self.scale

    def cheapest(self, split: Floats, price: Floats) -> Choice:
        """What each thing chooses at prices: ``split`` (resources, workloads), ``price`` (pools,)."""
        return np.where(self.exists, self.cost(split, price), np.inf).argmin(axis=1)

    def cost(self, split: Floats, price: Floats) -> Floats:
        """Of each option, ``(things, options)``."""
        return np.einsum("iorw,rw->io", self.time, split) + self.share @ price

    def candidates(self) -> list[Choice]:
        """What the relaxation chooses, rounded; the smallest choice, and those at drawn prices."""
        problem = self.problem
        things, options = self.exists.shape
        nothing = np.full(self.time.shape[2:], 1e-9)
        smallest, reference = self.smallest
        draw = np.random.default_rng(0)
        found = [smallest]
        # Likes beside each other, nothing owed; then in any order, as if others had come before.
        orders = [np.lexsort(problem.memory.max(axis=1).T)]
        least, most = ORDERS
        count = max(least, min(most, ORDERED // things))
        orders += [draw.permutation(things) for _ in range(count)]
        owed = draw.random((len(orders), options)) - 0.5
        owed[0] = 0.0
        for _, shares in self.relaxed:
            found.append(shares.argmax(axis=1))
            found += [self.rounded(shares, *start) for start in zip(orders, owed, strict=True)]
        for _ in range(DRAWN):
            price = draw.dirichlet(np.ones(len(problem.budget))) * reference
            found.append(self.cheapest(nothing, price))
        return _distinct(found)

    @cached_property
    def smallest(self) -> tuple[Choice, float]:
        """Where time hardly counts, and its mean seconds: the scale of times."""
        pools = np.full(len(self.problem.budget), 1e6)
        smallest = self.cheapest(np.full(self.time.shape[2:], 1e-9), pools)
        mean = self.problem.seconds(smallest) / self.problem.weight.sum()
        return smallest, max(mean, 1e-12)

    def bound(self) -> float:
        """See ``bound``."""
        _, reference = self.smallest
        prices, _ = self.relaxed[-1]
        split, price = np.split(prices, [-len(self.problem.budget)])
        split = split.reshape(self.time.shape[2:])
        # What holds for any prices whose splits sum to the weights.
        split = split * self.problem.weight / split.sum(axis=0)
        price = price * self.problem.weight.sum() * reference
        cost = np.where(self.exists, self.cost(split, price), np.inf).min(axis=1)
        found = float(cost.sum() - price @ (self.problem.budget / self.scale))
        return max(0.0, found * (1 - ROUNDING))

    @cached_property
    def relaxed(self) -> list[tuple[Floats, Floats]]:
        """Prices, and the shares of options at them, ``(things, options)``, from the coarsest smoothing to the finest."""
        problem = self.problem
        _, reference = self.smallest
        things, options, resources, workloads = self.time.shape
        split_size = resources * workloads
        features = np.concatenate(
            [self.time.reshape(things, options, split_size) / reference, self.share], axis=2
        )
        budget = np.concatenate([np.zeros(split_size), problem.budget / self.scale])
        total = problem.weight.sum()
        # The split of each workload sums to its weight.
        sums = np.zeros((workloads, len(budget)))
        sums[:, :split_size] = np.tile(np.eye(workloads), resources)
        prices = np.ones(len(budget))
        prices[:split_size] = np.tile(problem.weight / total, resources) / resources
        found = []
        for smoothing in SMOOTHINGS:
            dual = _Dual(features, self.exists, budget, smoothing)
            prices = dual.maximize(prices, sums)
            found.append((prices, dual.shares(prices)))
        return found

    @staticmethod
    def rounded(shares: Floats, order: Choice, owed: Floats) -> Choice:
        """A whole option for each thing, so that sums over things stay as they are: what one gets too much, the next lacks."""
        choice = np.empty(len(shares), dtype=np.int64)
        owed = owed.copy()
        for thing in order:
            owed += shares[thing]
            # Only what it takes in part, else what is owed of rare options would go to whatever comes next.
            option = np.where(shares[thing] > LEAST_SHARE, owed, -np.inf).argmax()
            choice[thing] = option
            owed[option] -= 1
        return choice

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


class _Dual:
    """The smoothed dual of the relaxation: concave in the prices, all of which are positive."""

    def __init__(self, features: Floats, exists: Bools, budget: Floats, smoothing: float) -> None:
        """Args: features: ``(things, options, prices)``. budget: ``(prices,)``. smoothing: of the sum over things."""
        self.features = features
        self.exists = exists
        self.budget = budget
        self.barrier = smoothing / len(budget)
        self.entropy = smoothing / len(features)

    def _exponents(self, prices: Floats) -> Floats:
        exponents = -(self.features @ prices) / self.entropy
        return np.where(self.exists, exponents, -np.inf)

    def value(self, prices: Floats) -> float:
        """What is maximized."""
        exponents = self._exponents(prices)
        most = exponents.max(axis=1, keepdims=True)
        chosen = -self.entropy * (most[:, 0] + np.log(np.exp(exponents - most).sum(axis=1)))
        barrier = self.barrier * np.log(prices).sum()
        return float(chosen.sum() - self.budget @ prices + barrier)

    def shares(self, prices: Floats) -> Floats:
        """Of options at prices, ``(things, options)``."""
        exponents = self._exponents(prices)
        shares = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    def maximize(self, prices: Floats, sums: Floats) -> Floats:
        """Newton's method, from prices that keep ``sums @ prices``, which stay."""
        count, rows = len(prices), len(sums)
        system = np.zeros((count + rows, count + rows))
        system[:count, count:], system[count:, :count] = sums.T, sums
        now = self.value(prices)
        for _ in range(NEWTON_STEPS):
            shares = self.shares(prices)
            mean = np.einsum("io,iok->ik", shares, self.features)
            gradient = mean.sum(axis=0) - self.budget + self.barrier / prices
            weighted = (shares[:, :, None] * self.features).reshape(-1, count)
            second = weighted.T @ self.features.reshape(-1, count) - mean.T @ mean
            system[:count, :count] = second / self.entropy + np.diag(self.barrier / prices**2)
            step = np.linalg.lstsq(system, np.append(gradient, np.zeros(rows)), rcond=None)[0]
            step = step[:count]
            shrinks = step < 0
            length = min(1.0, 0.99 / max((-step[shrinks] / prices[shrinks]).max(initial=0.0), 1e-9))
            for _ in range(HALVINGS):
                value = self.value(prices + length * step)
                if value >= now:
                    break
                length /= 2
            else:
                break
            prices = prices + length * step
            if value - now < 0.01 * self.barrier:
                break
            now = value
        return prices
