"""Times functions that are called again and again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPEATS = (5, 60)


@dataclass(frozen=True)
class Figure:
    """Seconds, the median of several, and how uncertain: half of the range from the 20th to the 80th percentile."""

    seconds: float
    spread: float


def timed(functions: Sequence[Callable[[], object]], budget_s: float) -> Figure:
    """Calls one function after the other, again and again, for about so long; the very first call is not counted."""
    functions[-1]()
    taken: list[float] = []
    end = time.perf_counter() + budget_s
    least, most = REPEATS
    while len(taken) < least or (time.perf_counter() < end and len(taken) < most * len(functions)):
        function = functions[len(taken) % len(functions)]
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    taken.sort()
    low, high = taken[len(taken) // 5], taken[-1 - len(taken) // 5]
    median = statistics.median(taken)
    return Figure(median, (high - low) / 2 / median)
