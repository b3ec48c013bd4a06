"""What all benchmarks share: settings, a machine that is watched, and the tables at the end.

DCEXT_BENCH_SMOKE=1       tiny sizes and one round: checks that everything runs; its figures mean nothing
DCEXT_BENCH_OUTPUT=DIR    also write the figures as JSON
DCEXT_BENCH_PATIENCE=S    seconds in all to wait for other processes to leave the machine alone (default 60)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "third_party"))

import watch
from hardware import ROOT, hardware
from watch import BUSY, Watch

SMOKE = os.environ.get("DCEXT_BENCH_SMOKE") == "1"
OUTPUT = os.environ.get("DCEXT_BENCH_OUTPUT")

# A ratio that a benchmark file wants shown by itself: what, in which case, the ratio, the least that is wanted (or 0).
Figure = tuple[str, str, float, float]
Tables = dict[str, dict[str, list[dict[str, Any]]]]
patience = [float(os.environ.get("DCEXT_BENCH_PATIENCE", "60"))]


def gaussian(rows: int, cols: int, sigma: float, seed: int) -> torch.Tensor:
    """Int8 weights, normally distributed, clamped to [-127, 127]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, cols, generator=generator) * sigma
    return noise.round_().clamp_(-127, 127).to(torch.int8)


def wait_until_quiet() -> None:
    """Returns when others let the CPUs idle, or when the patience of this run is used up."""
    if not SMOKE:
        patience[0] = watch.wait_until_quiet(patience[0])


class Timer:
    """Times one function over a rotation of its data and files the result under a question."""

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark

    def run(
        self,
        question: str,
        case: str,
        row: str,
        functions: list[Callable[[], Any]],
        nbytes: int,
        rounds: int = 16,
        **extra: Any,
    ) -> None:
        """Each round calls the next function of the rotation, every one at least once.

        Args:
            question: heading of the table.
            case: part of the table; ratios are to its first row.
            row: what is timed.
            functions: the rotation.
            nbytes: decoded bytes, or weights, per call.
            rounds: calls that are timed, at least.
            **extra: goes into the JSON; `bits` into the table too.
        """
        state = {"next": 0}

        def rotate() -> None:
            functions[state["next"] % len(functions)]()
            state["next"] += 1

        rounds = 1 if SMOKE else max(rounds, len(functions))
        wait_until_quiet()
        machine = Watch()
        self.benchmark.pedantic(rotate, rounds=rounds, warmup_rounds=0 if SMOKE else 3)
        self.benchmark.extra_info.update(
            question=question, case=case, row=row, nbytes=nbytes, others=machine.others(), **extra
        )


@pytest.fixture
def timer(benchmark: Any) -> Timer:
    return Timer(benchmark)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    """Threads of torch and of the codec, for one benchmark."""
    import dcext

    if request.param > len(os.sched_getaffinity(0)):
        pytest.skip(f"requires {request.param} CPUs")
    before = torch.get_num_threads(), dcext.get_num_threads()
    torch.set_num_threads(request.param)
    dcext.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before[0])
    dcext.set_num_threads(before[1])


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Rows of one case run one after the other, so that a change of the machine's speed meets all of them."""
    config.bench_modules = list({item.module.__name__: item.module for item in items}.values())

    def case_of(item: Any) -> list[int]:
        indices = item.callspec.indices if hasattr(item, "callspec") else {}
        return [indices.get(name, 0) for name in getattr(item.module, "CASE_FIXTURES", ())]

    items.sort(key=lambda item: (str(item.path), case_of(item)))


def collect(session: Any) -> Tables:
    """Question -> case -> rows, in the order in which they ran."""
    tables: Tables = defaultdict(lambda: defaultdict(list))
    for bench in session.benchmarks:
        info = dict(bench.extra_info)
        times = sorted(bench.stats.data)
        cut = statistics.quantiles(times, n=5) if len(times) > 1 else [times[0]] * 4
        median = statistics.median(times)
        row = {
            "row": info.pop("row"),
            "median_s": median,
            "p20_s": cut[0],
            "p80_s": cut[-1],
            "rounds": len(times),
            "gbps": info.pop("nbytes") / median / 1e9,
        }
        rows = tables[info.pop("question")][info.pop("case")]
        rows.append({**row, **info})
        rows[-1]["ratio"] = rows[0]["median_s"] / median
    return tables


def speed_ratio(rows: list[dict[str, Any]], row: str, baseline: str) -> float | None:
    """How many times as fast as `baseline` a row is; None if one of them was not run."""
    medians = {r["row"]: r["median_s"] for r in rows}
    return medians[baseline] / medians[row] if {row, baseline} <= medians.keys() else None


def show(write: Callable[[str], None], tables: Tables) -> None:
    """One aligned table per question; ratios are speeds over the first row of each case."""
    for question, cases in tables.items():
        write(f"\n{question}")
        for case, rows in cases.items():
            write(f"  {case}")
            for row in rows:
                bits = f"{row['bits']:6.3f} bits" if "bits" in row else " " * 11
                mark = f"  others {row['others']:.0%}" if row["others"] >= BUSY else ""
                write(
                    f"    {row['row']:52s} {bits}  p50 {row['median_s'] * 1e3:9.3f} ms "
                    f"[{row['p20_s'] * 1e3:9.3f}, {row['p80_s'] * 1e3:9.3f}]  {row['gbps']:7.2f} G/s  "
                    f"{row['ratio']:6.2f} x{mark}"
                )


def changed_files() -> list[str]:
    """What differs from the commit that the hardware line names."""
    command = ["git", "status", "--porcelain", "--", "csrc", "dcext", "setup.py", "bench/*.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line[3:] for line in result.stdout.splitlines()]


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """The tables, the figures that a file singles out, the hardware line; and the JSON."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    tables = collect(session)
    write = terminalreporter.write_line
    show(write, tables)
    figures: list[Figure] = []
    for module in getattr(config, "bench_modules", []):
        figures += getattr(module, "figures", lambda _: [])(tables)
    write("\nratios of speeds")
    for what, case, ratio, wanted in figures:
        least = f"  wanted {wanted:.2f}" if wanted and not SMOKE else ""
        verdict = "  missed" if least and ratio < wanted else ""
        rows = [row for cases in tables.values() for row in cases.get(case, [])]
        shared = "  beside other processes" if any(r["others"] >= BUSY for r in rows) else ""
        write(f"    {what:36s} {case:36s} {ratio:6.2f} x{least}{verdict}{shared}")
    machine, changed = hardware(), changed_files()
    write(f"\n{machine['line']}{' with uncommitted changes' if changed else ''}")
    busy = sum(
        row["others"] >= BUSY for cases in tables.values() for r in cases.values() for row in r
    )
    if busy and not SMOKE:
        write(
            f"{busy} rows ran while other processes took {BUSY:.0%} or more of the CPUs: see `others`"
        )
    if OUTPUT and not SMOKE:
        name = Path(session.benchmarks[0].fullname.partition("::")[0]).stem.removeprefix("bench_")
        keys = ("what", "case", "ratio", "wanted")
        report = {
            "kind": "measured",
            "hardware": {**machine, "uncommitted": changed},
            "figures": [dict(zip(keys, figure, strict=True)) for figure in figures],
            "tables": tables,
        }
        Path(OUTPUT).mkdir(parents=True, exist_ok=True)
        (Path(OUTPUT) / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
