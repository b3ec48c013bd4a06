"""What all benchmarks share: settings, data that comes from memory and not from the cache, and the tables at the end.

DCEXT_BENCH_SMOKE=1       tiny sizes and one round: checks that everything runs; its figures mean nothing
DCEXT_BENCH_OUTPUT=DIR    also write the figures as JSON
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "third_party"))

from hardware import hardware

SMOKE = os.environ.get("DCEXT_BENCH_SMOKE") == "1"


def gaussian(rows: int, cols: int, sigma: float, seed: int) -> torch.Tensor:
    """Int8 weights, normally distributed, clamped to [-127, 127]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, cols, generator=generator) * sigma
    return noise.round_().clamp_(-127, 127).to(torch.int8)


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
        **extra: Any,
    ) -> None:
        """Each round calls the next function of the rotation. `nbytes`: decoded bytes, or weights, per call."""
        state = {"next": 0}

        def rotate() -> None:
            functions[state["next"] % len(functions)]()
            state["next"] += 1

        rounds = 1 if SMOKE else max(16, len(functions))
        self.benchmark.extra_info.update(
            question=question, case=case, row=row, nbytes=nbytes, **extra
        )
        self.benchmark.pedantic(rotate, rounds=rounds, warmup_rounds=0 if SMOKE else 3)


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


def collect(session: Any) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Question -> case -> rows, in the order in which they ran."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
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
            "gbps": info.pop("nbytes") / median / 1e9,
        }
        tables[info.pop("question")][info.pop("case")].append({**row, **info})
    return tables


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """One aligned table per question; ratios are speeds over the first row of each case."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    tables = collect(session)
    write = terminalreporter.write_line
    for question, cases in tables.items():
        write(f"\n{question}")
        for case, rows in cases.items():
            write(f"  {case}")
            for row in rows:
                bits = f"{row['bits']:6.3f} bits" if "bits" in row else " " * 11
                write(
                    f"    {row['row']:44s} {bits}  p50 {row['median_s'] * 1e3:9.3f} ms "
                    f"[{row['p20_s'] * 1e3:9.3f}, {row['p80_s'] * 1e3:9.3f}]  {row['gbps']:7.2f} G/s  "
                    f"{rows[0]['median_s'] / row['median_s']:6.2f} x"
                )
    write(f"\n{hardware()['line']}")
    output = os.environ.get("DCEXT_BENCH_OUTPUT")
    if output and not SMOKE:
        name = Path(session.benchmarks[0].fullname.partition("::")[0]).stem.removeprefix("bench_")
        report = {"kind": "measured", "hardware": hardware(), "tables": tables}
        Path(output).mkdir(parents=True, exist_ok=True)
        (Path(output) / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
