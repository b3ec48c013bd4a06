"""How fast whole models read and write at batch 1, beside torch's bfloat16 and llama.cpp.

    python bench/generation.py [--rows REGEX] [--fresh] [--output FILE.json] [--smoke]

Two models: one of Llama's shapes with 3 billion drawn weights, for its size, and SmolLM2-135M-Instruct, for its sense.
Every row is measured in a process of its own, with one thread and with all: medians over three prompts and over the
tokens that follow, greedily. Memory is the peak while that runs, loading not counted. Rows of equal integers must write
equal tokens, whatever codec holds them. Rows are kept as they finish, and a second run does only what is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "third_party"))

from environments import output_of, run_job
from hardware import ROOT, hardware_line
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rowfile import Row, RowFile
from whole import llama_files
from whole.cases import DRAWN, SMOLLM2, Case, drawn_cases, prepare, smoke_cases, smollm2_cases
from whole.tables import ratios, show

import fetch
import wiki_text
from dcext.codec import CODECS

TORCH_WORKER = ROOT / "bench/whole/torch_worker.py"
# Seconds in all to wait for other processes to leave the CPUs alone.
PATIENCE_S = float(os.environ.get("DCEXT_BENCH_PATIENCE", "60"))
BYTES_PER_TOKEN = 16  # of text to tokenize: more than any tokenizer packs into a token on average

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompt, tokens written after it, and those of the text for perplexity, in windows of context."""

    prompt: int = 128
    new_tokens: int = 32
    evaluation: int = 4096
    context: int = 512


SMOKE_SIZES = Sizes(prompt=16, new_tokens=4)


def key_of(row: Row) -> Key:
    """What makes two rows the same measurement."""
    return row["model"], row["name"], *row["sizes"].values()


class Run:
    """Measures cases and keeps their rows."""

    def __init__(self, results: RowFile[Key], sizes: Sizes, folder: Path, smoke: bool) -> None:
        """Args: folder: for models that are made. smoke: does not wait for a quiet machine."""
        self.results = results
        self.sizes = sizes
        self.folder = folder
        self.patience_s = 0.0 if smoke else PATIENCE_S
        self.hardware = hardware_line("csrc", "dcext", "bench/generation.py", "bench/whole")
        self.failed: list[str] = []

    def key(self, case: Case) -> Key:
        """The key of a case's row."""
        return case.model, case.name, *asdict(self.sizes).values()

    def measure(self, cases: list[Case], fresh: bool) -> None:
        """Adds the missing rows. One that fails is reported and the others go on."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                title = f"{case.model}: {case.name}"
                progress.update(task, description=title)
                try:
                    if fresh or self.key(case) not in self.results.rows:
                        self.results.add(self.key(case), self._row(case, fresh))
                except Exception as error:
                    self.failed.append(title)
                    print(f"{title}: {type(error).__name__}: {error}", file=sys.stderr)
                progress.advance(task)

    def _row(self, case: Case, fresh: bool) -> Row:
        source, disk_nbytes = prepare(case, self.folder, fresh)
        prompt, evaluation = texts(case.model, self.sizes)
        job = {
            "source": source,
            "prompt": prompt,
            "new_tokens": self.sizes.new_tokens,
            "threads": sorted({1, len(os.sched_getaffinity(0))}),
            "compiled": case.compiled,
            "evaluation": [] if case.compiled else evaluation,
            "context": self.sizes.context,
            "split": not case.compiled,
            "patience_s": self.patience_s,
        }
        measured = llama_files.run(job) if case.llama else run_job(python, TORCH_WORKER, job)
        self.patience_s = measured.pop("patience_s")
        return {
            "model": case.model,
            "name": case.name,
            "note": case.note,
            "integers": case.integers,
            "compiled": case.compiled,
            "sizes": asdict(self.sizes),
            "disk_nbytes": disk_nbytes,
            **measured,
            "hardware": self.hardware,
        }


def texts(model: str, sizes: Sizes) -> tuple[list[int], list[int]]:
    """Prompt and evaluation text as token ids; none of the latter for a model without sense."""
    if model != SMOLLM2:
        return [(7 * i) % 1000 for i in range(sizes.prompt)], []
    ids = smollm2_ids(sizes.evaluation)
    return ids[: sizes.prompt], ids


@cache
def smollm2_ids(count: int) -> list[int]:
    """The first tokens of the evaluation text."""
    from transformers import AutoTokenizer

    gguf = fetch.smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = wiki_text.enwik8_text("evaluation").read_text(encoding="utf-8")
    return tokenizer(text[: BYTES_PER_TOKEN * count], verbose=False).input_ids[:count]


def python(*arguments: str) -> str:
    """Runs the Python of this environment."""
    return output_of([sys.executable, *arguments])


def disagreements(rows: list[Row]) -> list[str]:
    """What is wrong with rows of dcext: equal integers are to be equal, and then to write equal tokens.

    Those that are compiled round otherwise and may write other tokens.
    """
    by_name: dict[tuple[Any, ...], Row] = {}
    by_digest: dict[tuple[Any, ...], Row] = {}
    found = []
    for row in rows:
        if row.get("digest") is None:
            continue
        pair = f"{row['model']}: {row['name']} and"
        model = row["model"], *row["sizes"].values()
        if row["integers"] is not None:
            other = by_name.setdefault((*model, row["integers"]), row)
            if row["digest"] != other["digest"]:
                found.append(f"{pair} {other['name']} hold other integers")
        if not row["compiled"]:
            other = by_digest.setdefault((*model, row["digest"]), row)
            if tokens_of(row) != tokens_of(other):
                found.append(f"{pair} {other['name']} write other tokens")
    return found


def tokens_of(row: Row) -> list[list[int]]:
    """What a row wrote, for each number of threads."""
    return [speed["tokens"] for speed in row["speeds"]]


def select(arguments: argparse.Namespace) -> list[Case]:
    """The cases that were asked for and that this build can run."""
    cases = smoke_cases() if arguments.smoke else [*drawn_cases(DRAWN), *smollm2_cases()]
    cases = [case for case in cases if arguments.rows.search(f"{case.model}: {case.name}")]
    left_out = [case for case in cases if case.codec not in (None, *CODECS)]
    if left_out:
        codecs = ", ".join(sorted({str(case.codec) for case in left_out}))
        print(f"{len(left_out)} rows left out: this build has no codec {codecs}", file=sys.stderr)
    cases = [case for case in cases if case not in left_out]
    peers = not arguments.no_peers
    if arguments.smoke:
        peers = peers and llama_files.ENVIRONMENT.is_ready()
    return [case for case in cases if peers or not case.llama]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="", metavar="REGEX", help="only rows whose 'model: name' matches"
    )
    parser.add_argument("--no-peers", action="store_true", help="no llama.cpp: nothing is built")
    parser.add_argument("--fresh", action="store_true", help="measure the selected rows again")
    parser.add_argument("--new-tokens", type=int, default=Sizes.new_tokens, help="at least 2")
    parser.add_argument("--output", type=Path, help="instead of bench/results/generation.json")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model in seconds: its figures mean nothing"
    )
    arguments = parser.parse_args()
    try:
        arguments.rows = re.compile(arguments.rows)
    except re.error as error:
        parser.error(f"--rows: {error}")
    if arguments.new_tokens < 2:
        parser.error(f"--new-tokens: expected at least 2, got {arguments.new_tokens}")
    return arguments


def run(arguments: argparse.Namespace, scratch: Path) -> list[str]:
    """Measures and prints; returns what failed."""
    kept = (
        scratch / "generation.json" if arguments.smoke else ROOT / "bench/results/generation.json"
    )
    sizes = SMOKE_SIZES if arguments.smoke else Sizes(new_tokens=arguments.new_tokens)
    results = RowFile(arguments.output or kept, key_of, ratios)
    folder = scratch if arguments.smoke else ROOT / "build/generation"
    measuring = Run(results, sizes, folder, arguments.smoke)
    cases = select(arguments)
    if any(case.llama for case in cases):
        llama_files.ENVIRONMENT.make()
    measuring.measure(cases, arguments.fresh)
    keys = [measuring.key(case) for case in cases]
    rows = [results.rows[key] for key in keys if key in results.rows]
    same = [row for row in results.rows.values() if row["sizes"] == asdict(sizes)]
    for model in dict.fromkeys(row["model"] for row in rows):
        show([row for row in rows if row["model"] == model], same)
    return [*measuring.failed, *disagreements(rows)]


def main() -> None:
    """Command line: see above."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="dcext-generation-") as scratch:
        failed = run(arguments, Path(scratch))
    if failed:
        sys.exit(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
