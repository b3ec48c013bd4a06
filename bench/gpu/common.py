"""What the GPU benchmarks share: settings, times on the device, reports.

Import this before anything that imports triton: a ``--smoke`` run without a GPU sets ``TRITON_INTERPRET`` here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "third_party")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from hardware import hardware  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rowfile import Row, RowFile  # noqa: E402

TABLE_WIDTH = 160  # where stdout is not a terminal
OUT_OF_TIME = "out of time"
ROUNDS, ROUNDS_AT_ONCE = (10, 60), 10
SECONDS_OF_A_CASE = 0.1  # of device time, about
L2_READ = 4  # times the L2 cache
HZ = 2e9  # of the clock that torch.cuda._sleep counts, about


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        smoke: tiny sizes, each thing once: figures mean nothing.
        output: the JSON file.
        deadline: of ``time.monotonic``, after which nothing new is begun.
    """

    smoke: bool
    output: Path
    deadline: float

    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self.deadline


def start(documentation: str | None, name: str) -> Settings:
    """Reads the command line, or ends the program where there is no GPU.

    Args:
        documentation: of the script.
        name: of its JSON file.
    """
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help=f"instead of bench/results/gpu/{name}.json")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="begin nothing new after them (default 600)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes, each thing once, without a GPU in Triton's interpreter: its figures mean nothing",
    )
    arguments = parser.parse_args()
    if DEVICE.type == "cpu" and not arguments.smoke:
        sys.exit(
            f"{Path(sys.argv[0]).name}: expected a CUDA GPU, found none with torch {torch.__version__}; "
            "--smoke runs without one"
        )
    output = arguments.output
    if output is None:
        folder = Path(tempfile.mkdtemp(prefix="dcext-gpu-")) if arguments.smoke else None
        output = (folder or ROOT / "bench/results/gpu") / f"{name}.json"
    output.unlink(missing_ok=True)
    return Settings(arguments.smoke, output, time.monotonic() + arguments.seconds)


@dataclass
class Report:
    """Rows of one script by name, kept in its JSON file as they are measured, and what went wrong.

    A value that could not be measured is ``{"not_measured": reason}`` in its row.
    """

    settings: Settings
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hardware = hardware()
        self.figures: dict[str, Any] = {}
        kind = "smoke, means nothing" if self.settings.smoke else "measured"
        self.rows: RowFile[str] = RowFile(
            self.settings.output,
            lambda row: str(row["name"]),
            lambda rows: {"kind": kind, "hardware": self.hardware, **self.figures},
        )

    def add(self, name: str, **values: Any) -> Row:
        """Adds to the row of that name, or begins it."""
        row = {"name": name, **self.rows.rows.get(name, {}), **values}
        self.rows.add(name, row)
        return row

    def attempt(
        self, name: str, what: str, function: Callable[[], Any], *, peer: bool = False
    ) -> bool:
        """Adds what a function returns to the row ``name`` under ``what``.

        Args:
            name: of the row.
            what: of the value.
            function: measures it. It is not called after the deadline.
            peer: what does not work there is noted, and is no failure of ours.

        Returns:
            Whether it was measured.
        """
        if self.settings.is_over():
            self.add(name, **{what: not_measured(OUT_OF_TIME)})
            return False
        try:
            self.add(name, **{what: function()})
            return True
        except Exception as error:  # one row must not hide the others
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.add(name, **{what: not_measured(reason)})
            print(f"{name}: {what}: {reason}", file=sys.stderr)
            if not peer:
                self.failed.append(f"{name}: {what}: {reason}")
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()  # an error that stays ends the script here
            return False

    def finish(self, tables: list[Table], remarks: list[str]) -> None:
        """Prints tables and the hardware line; ends the program, with status 1 if something failed."""
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        for table in tables:
            console.print(table)
        reasons: dict[str, None] = {}
        for row in self.rows.rows.values():
            for key, value in row.items():
                if isinstance(value, dict) and "not_measured" in value:
                    reasons[f"{key}: not measured: {value['not_measured']}"] = None
        if self.settings.smoke:
            remarks = [*remarks, "a smoke run: these figures mean nothing"]
        for line in [*remarks, *reasons, self.hardware["line"]]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self.failed:
            sys.exit(f"{len(self.failed)} failed: {'; '.join(self.failed)}")


def not_measured(reason: str) -> dict[str, str]:
    """Stands for a value that there is none of."""
    return {"not_measured": reason}


def was_measured(value: Any) -> bool:
    """Whether a value of a row is one."""
    return value is not None and not (isinstance(value, dict) and "not_measured" in value)


class Clock:
    """Times of a function on the device, each call with a cold L2 cache.

    On a GPU each call stands between two CUDA events of its own. Before it, a buffer of ``L2_READ`` times the L2 cache
    is read (not written, which would leave dirty lines for the function to evict). The device is kept waiting while the
    host queues ``ROUNDS_AT_ONCE`` calls, so that times hold no gap between launches, unless the function waits for the
    device itself. On a CPU it is the wall clock.
    """

    def __init__(self, smoke: bool) -> None:
        """Args: smoke: each thing once."""
        self.smoke = smoke
        self.other, self.sum = torch.empty(0, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
        if DEVICE.type == "cuda":
            l2_nbytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            self.other = torch.ones(L2_READ * l2_nbytes // 4, dtype=torch.int32, device=DEVICE)
            self.sum = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def measure(self, function: Callable[[], Any], *, cold: bool = True) -> dict[str, Any]:
        """Median, 20th and 80th percentile in milliseconds, after warm-up.

        Args:
            function: queues its work on the current stream.
            cold: whether the L2 cache holds other things before each call.
        """
        times_ms = [self._wall_ms(function)] if self.smoke else self._times_ms(function, cold)
        cut = statistics.quantiles(times_ms, n=5) if len(times_ms) > 1 else [times_ms[0]] * 4
        median_ms = statistics.median(times_ms)
        rounds = len(times_ms)
        return {"median_ms": median_ms, "p20_ms": cut[0], "p80_ms": cut[-1], "rounds": rounds}

    def _wall_ms(self, function: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def _times_ms(self, function: Callable[[], Any], cold: bool) -> list[float]:
        self._wall_ms(function)
        begin = time.perf_counter()
        function()
        queueing_s = time.perf_counter() - begin
        torch.cuda.synchronize()
        once_ms = max(self._round(function, cold, 2, queueing_s))
        wanted = int(1e3 * SECONDS_OF_A_CASE / max(once_ms, 1e-3))
        wanted = min(max(wanted, ROUNDS[0]), ROUNDS[1])
        times_ms: list[float] = []
        while len(times_ms) < wanted:
            times_ms += self._round(function, cold, ROUNDS_AT_ONCE, queueing_s)
        return times_ms

    def _round(
        self, function: Callable[[], Any], cold: bool, count: int, queueing_s: float
    ) -> list[float]:
        pairs = []
        torch.cuda._sleep(int(HZ * min(1e-3 + 1.5 * count * queueing_s, 0.1)))
        for _ in range(count):
            if cold:
                torch.sum(self.other, 0, out=self.sum)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def copy_gbps(self, nbytes: int) -> float:
        """GB/s of a copy on the device, bytes read and written."""
        source = torch.randint(-127, 128, (nbytes,), dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        return gbps(2 * nbytes, self.measure(lambda: target.copy_(source)))


def gbps(nbytes: int, times: dict[str, Any]) -> float:
    """GB/s at the median."""
    return nbytes / times["median_ms"] / 1e6


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64; not a number if one of them has any."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def numbers_table(title: str, headings: list[str]) -> Table:
    """An empty table whose first column is text and the others are numbers."""
    table = Table(title=title)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table
