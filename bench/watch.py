"""The machine while something is measured: who else uses its CPUs, and how much memory this process takes.

Standard library only: workers of other environments import it too.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from pathlib import Path

BUSY = 0.05  # share of all CPU time, taken by others, from which a row is marked


class Watch:
    """The share of the machine's CPU time that other processes took since its creation; 0 where unknown."""

    def __init__(self) -> None:
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds since boot of all CPUs: passed and not idle; and those of this process."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        try:
            fields = [int(f) for f in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields) / tick, (sum(fields) - idle) / tick, own.ru_utime + own.ru_stime

    def others(self) -> float:
        """The share up to now."""
        passed, busy, own = (b - a for a, b in zip(self.before, self._read(), strict=True))
        return max(0.0, busy - own) / passed if passed > 0.1 else 0.0  # ticks are coarse


def wait_until_quiet(patience: float) -> float:
    """Returns when others let the CPUs idle, or after ``patience`` seconds; gives what is left of them."""
    while patience > 0:
        watch, start = Watch(), time.perf_counter()
        time.sleep(0.1)
        if watch.others() < BUSY:
            break
        time.sleep(0.4)
        patience -= time.perf_counter() - start
    return patience


def reset_peak_rss() -> bool:
    """Gives freed memory back to the system and lets ``peak_rss_bytes`` begin anew; False where it cannot."""
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """Largest resident memory since ``reset_peak_rss``, else since the process started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(peak)
