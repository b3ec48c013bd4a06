"""The solver that places weights, beside exhaustive search on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dcext.policy.solve import Problem, solve


def drawn(seed: int) -> Problem:
    """Up to 6 things of up to 4 options, resources and workloads, and one or two pools; some options do not exist."""
    draw = np.random.default_rng(seed)
    things, options, pools = draw.integers(1, 7), draw.integers(1, 5), draw.integers(1, 3)
    shape = (things, options, draw.integers(1, 4), draw.integers(1, 4))
    time = draw.exponential(size=shape) * draw.integers(0, 2, size=shape)
    missing = draw.random((things, options)) < 0.1
    missing[:, 0] = False
    time[missing] = np.inf
    memory = draw.integers(0, 1000, size=(things, options, pools)).astype(float)
    least, most = memory.min(axis=1).sum(axis=0), memory.max(axis=1).sum(axis=0)
    budget = least + draw.random(pools) * (most - least)
    return Problem(time, memory, budget, draw.random(shape[3]) + 0.01)


def exhaustive(problem: Problem) -> float:
    """Seconds of the best choice; infinity where none fits."""
    things, options = problem.time.shape[:2]
    choices = (np.array(c) for c in itertools.product(range(options), repeat=things))
    return min((problem.seconds(c) for c in choices if problem.fits(c)), default=np.inf)


@pytest.mark.parametrize("seed", range(60))
def test_nearly_the_best(seed):
    problem = drawn(seed)
    best, found = exhaustive(problem), solve(problem)
    if found is None:
        assert best == np.inf
        return
    assert problem.fits(found)
    assert problem.seconds(found) <= 1.03 * best
    assert np.array_equal(found, solve(problem))


def test_what_cannot_fit():
    problem = Problem(np.ones((2, 1, 1, 1)), np.full((2, 1, 1), 10.0), np.array([15.0]), np.ones(1))
    assert solve(problem) is None


def test_nothing_to_choose():
    problem = Problem(np.ones((0, 1, 1, 1)), np.ones((0, 1, 1)), np.ones(1), np.ones(1))
    assert len(solve(problem)) == 0
