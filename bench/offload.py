"""How fast is a model that is larger than the memory it is given?

    python bench/offload.py [--rows REGEX] [--disk-limit "1GB/s"]... [--fresh] [--output FILE.json] [--smoke]

A model of Llama's shapes with 3 billion drawn weights is saved once with each codec and in bfloat16 (13 GB in
build/offload; delete it after a change of the format). Every row runs in a process of its own, held in less memory than
the model has, page cache included, and reads weights from the disk: dcext, dcext without overlap, and accelerate. The
disk is read in the same way before and after, by the same process, under the same limit: its bound is what that allows.
Passes of one token are those of generation, one sequence; the longer ones read a prompt. Rows of equal integers must
compute equal logits, bit for bit, wherever their weights are. Rows are kept as they finish, and a second run does only
what is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "third_party"))

from environments import output_of, run_job
from hardware import ROOT, hardware_line
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rowfile import Row, RowFile
from whole.checkpoints import make_checkpoint, weights_nbytes
from whole.disk import evict, files_in
from whole.limits import Limits, confined
from whole.offload_cases import LITTLE_NBYTES, LLAMA_3B, SMALL, Case, memory_cases, offload_cases
from whole.offload_tables import ratios, show, with_bounds

from dcext.sizes import parse_nbytes

WORKER = ROOT / "bench/whole/offload_worker.py"
PATIENCE_S = float(os.environ.get("DCEXT_BENCH_PATIENCE", "60"))  # as in generation.py
DISK_LIMITS = (None, 1e9)  # bytes/s; of a SATA disk or an old NVMe
# Activations of long passes go back to the system when they are freed: glibc, left alone, learns to keep them on a heap
# that grows by half a gigabyte in 512 tokens, of which less than a fifth is in use at a time. For all rows.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Tokens of passes, and of the prompt before those of one; passes of each; bytes for weights where they are few."""

    lengths: tuple[int, ...] = (1, 16, 512)
    prompt_length: int = 16
    repeats: int = 5
    little_nbytes: int = LITTLE_NBYTES

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "lengths": list(self.lengths)}


SMOKE_SIZES = Sizes(lengths=(1, 4), prompt_length=4, repeats=2, little_nbytes=9 << 20)
BANDWIDTH_S, SMOKE_BANDWIDTH_S = 0.5, 0.02


@dataclass(frozen=True)
class Measurement:
    """A case under a limit of the disk, in bytes/s, or None."""

    case: Case
    disk_limit: float | None

    def __str__(self) -> str:
        limit = "" if self.disk_limit is None else f", {self.disk_limit / 1e9:g} GB/s"
        return f"{self.case.model}: {self.case.name}{limit}"


def key_of(row: Row) -> Key:
    """What makes two rows the same measurement."""
    return row["model"], row["name"], row["disk_limit"], str(row["sizes"])


class Run:
    """Measures and keeps rows."""

    def __init__(self, results: RowFile[Key], sizes: Sizes, folder: Path, smoke: bool) -> None:
        """Args: folder: for checkpoints. smoke: does not wait for a quiet machine."""
        self.results = results
        self.sizes = sizes
        self.folder = folder
        self.patience_s = 0.0 if smoke else PATIENCE_S
        self.bandwidth_s = SMOKE_BANDWIDTH_S if smoke else BANDWIDTH_S
        self.hardware = hardware_line("csrc", "dcext", "bench/offload.py", "bench/whole")
        self.failed: list[str] = []

    def key(self, measurement: Measurement) -> Key:
        """The key of its row."""
        case = measurement.case
        return case.model, case.name, measurement.disk_limit, str(self.sizes.to_dict())

    def measure(self, measurements: list[Measurement], fresh: bool) -> None:
        """Adds the missing rows. One that fails is reported and the others go on."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("", total=len(measurements))
            for measurement in measurements:
                progress.update(task, description=str(measurement))
                try:
                    if fresh or self.key(measurement) not in self.results.rows:
                        self.results.add(self.key(measurement), self._row(measurement))
                except Exception as error:
                    self.failed.append(str(measurement))
                    print(f"{measurement}: {type(error).__name__}: {error}", file=sys.stderr)
                progress.advance(task)

    def _row(self, measurement: Measurement) -> Row:
        case = measurement.case
        checkpoint = make_checkpoint(case.model, case.codec, self.folder)
        nbytes = weights_nbytes(checkpoint)
        host_nbytes = case.host_nbytes(nbytes, self.sizes.little_nbytes)
        limits = Limits(case.memory_nbytes(host_nbytes), measurement.disk_limit, checkpoint)
        job = {
            "folder": str(checkpoint),
            "engine": case.engine,
            "host_nbytes": host_nbytes,
            "prompt": [
                (7 * i) % 1000 for i in range(max(*self.sizes.lengths, self.sizes.prompt_length))
            ],
            **self.sizes.to_dict(),
            "bandwidth_s": self.bandwidth_s,
            "threads": len(os.sched_getaffinity(0)),
            "patience_s": self.patience_s,
        }
        evict(files_in(checkpoint))
        with confined(limits) as confinement:

            def python(*arguments: str) -> str:
                command = [*confinement.prefix, sys.executable, *arguments]
                return output_of(command, variables=MALLOC)

            measured = run_job(python, WORKER, job)
            peak_nbytes = confinement.peak_nbytes()
        self.patience_s = measured.pop("patience_s")
        return {
            "model": case.model,
            "name": case.name,
            "codec": case.codec,
            "engine": case.engine,
            "resident": case.resident,
            "integers": case.integers,
            "disk_limit": measurement.disk_limit,
            "sizes": self.sizes.to_dict(),
            "threads": job["threads"],
            "weights_nbytes": nbytes,
            "host_nbytes": host_nbytes,
            "memory_limit": limits.memory_nbytes,
            "confined_by": confinement.means,
            "peak_charged_nbytes": peak_nbytes,
            **with_bounds(measured, self.sizes.repeats),
            "hardware": self.hardware,
        }


def disagreements(rows: list[Row]) -> list[str]:
    """What is wrong with rows of dcext: equal integers are to give equal tokens and logits, wherever they rest."""
    first: dict[Key, Row] = {}
    found = []
    for row in rows:
        if row["integers"] is None:
            continue
        other = first.setdefault((row["model"], row["integers"], str(row["sizes"])), row)
        for a, b in zip(row["passes"], other["passes"], strict=True):
            if (a["tokens"], a["logits_hash"]) != (b["tokens"], b["logits_hash"]):
                names = f"{row['model']}: {row['name']} and {other['name']}"
                found.append(f"{names} compute other logits in passes of {a['length']} tokens")
    return found


def select(arguments: argparse.Namespace) -> list[Measurement]:
    """What was asked for: all rows for each limit of the disk, and once those that are in memory."""
    model = SMALL if arguments.smoke else LLAMA_3B
    measurements = [Measurement(case, None) for case in memory_cases(model)]
    for limit in arguments.disk_limit:
        measurements += [Measurement(case, limit) for case in offload_cases(model)]
    return [m for m in measurements if arguments.rows.search(str(m))]


def disk_limit(text: str) -> float | None:
    """Bytes/s of an argument such as ``1GB/s``; None for ``none``."""
    if text == "none":
        return None
    try:
        limit = parse_nbytes("--disk-limit", text.removesuffix("/s"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if limit == 0:
        raise argparse.ArgumentTypeError("expected more than 0")
    return float(limit)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="", metavar="REGEX", help="only rows whose 'model: name, limit' matches"
    )
    parser.add_argument(
        "--disk-limit",
        action="append",
        type=disk_limit,
        metavar="RATE",
        help="such as 1GB/s, or none; may be repeated; by default none and 1GB/s",
    )
    parser.add_argument(
        "--lengths",
        type=lambda text: tuple(int(length) for length in text.split(",")),
        default=Sizes.lengths,
        metavar="N,N..",
        help="tokens of passes, by default 1,16,512",
    )
    parser.add_argument("--fresh", action="store_true", help="measure the selected rows again")
    parser.add_argument("--output", type=Path, help="instead of bench/results/offload.json")
    parser.add_argument(
        "--smoke", action="store_true", help="a small model in seconds: its figures mean nothing"
    )
    arguments = parser.parse_args()
    try:
        arguments.rows = re.compile(arguments.rows)
    except re.error as error:
        parser.error(f"--rows: {error}")
    if arguments.disk_limit is None:
        arguments.disk_limit = [None] if arguments.smoke else list(DISK_LIMITS)
    return arguments


def run(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Measures and prints; returns what failed."""
    kept = scratch / "offload.json" if arguments.smoke else ROOT / "bench/results/offload.json"
    results = RowFile(arguments.output or kept, key_of, ratios)
    folder = scratch if arguments.smoke else ROOT / "build/offload"
    sizes = SMOKE_SIZES if arguments.smoke else Sizes(lengths=arguments.lengths)
    measuring = Run(results, sizes, folder, arguments.smoke)
    measurements = select(arguments)
    measuring.measure(measurements, arguments.fresh)
    keys = [measuring.key(measurement) for measurement in measurements]
    rows = [results.rows[key] for key in keys if key in results.rows]
    if rows:
        show(rows, list(results.rows.values()))
    return [*measuring.failed, *disagreements(rows)]


def main() -> None:
    """Command line: see above."""
    arguments = parse()
    # Ends the worker and removes its limits, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="dcext-offload-") as scratch:
        failed = run(arguments, Path(scratch))
    if failed:
        sys.exit(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
