"""Perplexity and divergence over stored bits per weight: dcext's recipes beside other quantizers.

    python bench/quality/run.py [--model NAME] [--rows REGEX] [--output DIR]

Compared are the linear layers of the blocks; embeddings and lm_head stay float32 for every method. Bits per weight
count all that is stored for these layers: quantized data, scales, zeros, tables. Divergence is KL(float || compressed)
of the next token's distribution, in nats per token. Peers are quantized by their own code and evaluated with their
dequantized weights in the float32 model, as W8A16 is in dcext. Rows are kept in quality.json as they finish, and a
second run does only what is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hardware import ROOT, hardware_line

from quality.measure import CachedReference, divergence
from quality.methods import Method, all_methods, dcext_layers, timed
from quality.models import NAMES, RANDOM, Sizes, Subject, load_subject
from quality.peers import ENVIRONMENT, Peers
from quality.plot import draw
from quality.results import Results, Row, key_of, show

SMOKE_SIZES = Sizes(evaluation=256, calibration=1024, context=64)
FORMS = {"none": "", "int8": ", int8 activations"}


class Run:
    """Measures methods on one model after the other."""

    def __init__(self, results: Results) -> None:
        """Args: results: where rows go; rows that are there already are not measured again."""
        self.results = results
        self.failed: list[str] = []
        self.hardware = hardware_line("csrc", "dcext", "bench/quality")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def measure(self, subject: Subject, methods: list[Method]) -> None:
        """Adds the missing rows of these methods. A method that fails is reported and the others go on."""
        reference = CachedReference(subject.model)
        for method in methods:
            keys = {
                form: key_of(subject.name, method.name, form, subject.sizes)
                for form in method.activations
            }
            missing = {form: key for form, key in keys.items() if key not in self.results.rows}
            if not missing:
                continue
            try:
                for form, row in self._rows(subject, method, list(missing), reference):
                    self.results.add(missing[form], row)
            except Exception as error:
                self.failed.append(f"{subject.name}: {method.name}")
                print(f"{self.failed[-1]}: {type(error).__name__}: {error}", file=sys.stderr)

    def _rows(
        self, subject: Subject, method: Method, forms: list[str], reference: CachedReference
    ) -> Iterator[tuple[str, Row]]:
        """Compresses once and yields (activations, row) for each form."""
        title = f"{subject.name}: {method.name}"
        with self._bar(f"{title}: quantizing", subject.num_weights()) as advance:
            applied, seconds = timed(method, subject, advance)
        row: Row = {
            "model": subject.name,
            "method": method.name,
            "series": method.series,
            "bits_per_weight": 8 * applied.stored_nbytes / subject.num_weights(),
            "stored_nbytes": applied.stored_nbytes,
            "num_weights": subject.num_weights(),
            "waterfilling_gap_bits": applied.waterfilling_gap_bits,
            "quantize_s": seconds,
            "note": applied.note,
            "sizes": vars(subject.sizes),
            "hardware": self.hardware,
        }
        context = subject.sizes.context
        for form in forms:
            for layer in dcext_layers(applied.model):
                layer.activations = form
            begin, ids = time.perf_counter(), subject.evaluation
            with self._bar(f"{title}{FORMS[form]}: evaluating", len(ids)) as advance:
                result = divergence(
                    applied.model, reference, ids, context=context, progress=advance
                )
            measured = {**result.to_dict(), "evaluate_s": time.perf_counter() - begin}
            print(
                f"{title}{FORMS[form]}: {row['bits_per_weight']:.3f} bits, "
                f"perplexity {result.perplexity:.4g}, KL {result.kl_nats:.5f}",
                file=sys.stderr,
            )
            yield form, {**row, "activations": form, **measured}

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[[float], None]]:
        """A progress bar while something runs; gives the function that advances it."""
        task = self.progress.add_task(title, total=total)
        try:
            yield lambda count: self.progress.advance(task, count)
        finally:
            self.progress.remove_task(task)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        action="append",
        help=f"{', '.join(NAMES)}, a folder, a GGUF file or a name on the hub; may be repeated",
    )
    parser.add_argument(
        "--rows", default="", metavar="REGEX", help="only methods whose name matches"
    )
    parser.add_argument("--no-peers", action="store_true", help="only dcext: nothing is installed")
    parser.add_argument("--fresh", action="store_true", help="measure the selected rows again")
    parser.add_argument("--tokens", type=int, default=Sizes.evaluation, help="to evaluate on")
    parser.add_argument("--calibration", type=int, default=Sizes.calibration, help="tokens")
    parser.add_argument("--context", type=int, default=Sizes.context, help="tokens per window")
    parser.add_argument("--output", type=Path, help="folder for quality.json and quality.png")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny model of random weights and no peers: its figures mean nothing",
    )
    arguments = parser.parse_args()
    try:
        arguments.rows = re.compile(arguments.rows)
    except re.error as error:
        parser.error(f"--rows: {error}")
    return arguments


def run(arguments: argparse.Namespace, output: Path, scratch: Path) -> list[str]:
    """Measures, prints and draws; returns what failed."""
    sizes = Sizes(arguments.tokens, arguments.calibration, arguments.context)
    names = arguments.model or list(NAMES)
    if arguments.smoke:
        sizes, names = SMOKE_SIZES, [RANDOM]
    measuring = Run(Results(output / "quality.json"))
    peers = None if arguments.no_peers or arguments.smoke else Peers(scratch)
    tables: dict[str, list[Row]] = {}
    for name in names:
        subject = load_subject(name, sizes)
        methods = all_methods(subject, peers)
        selected = [method for method in methods if arguments.rows.search(method.name)]
        keys = [
            key_of(subject.name, method.name, form, subject.sizes)
            for method in methods
            for form in method.activations
        ]
        if arguments.fresh:
            chosen = {method.name for method in selected}
            measuring.results.drop({key for key in keys if key[1] in chosen})
        if any(method.is_peer for method in selected):
            ENVIRONMENT.make()
        with measuring.progress:
            measuring.measure(subject, selected)
        rows = [measuring.results.rows[key] for key in keys if key in measuring.results.rows]
        if rows:
            show(rows, subject.note)
            tables[subject.name] = rows
    draw(tables, output / "quality.png")
    return measuring.failed


def main() -> None:
    """Command line: see above."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="dcext-quality-") as scratch:
        kept = Path(scratch) / "results" if arguments.smoke else ROOT / "bench/results"
        failed = run(arguments, arguments.output or kept, Path(scratch))
    if failed:
        sys.exit(f"{len(failed)} methods failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
