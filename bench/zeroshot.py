"""Zero-shot accuracy of models on multiple-choice questions: what compression costs, with its standard error.

    python bench/zeroshot.py --model float=MODEL.gguf --model tensor=FOLDER [--items 500] [--output FILE.json]

A model is whatever `dcext compress` takes (folder, .gguf file, hub name) or a folder that it wrote. Prompts, choices and
metrics are those of EleutherAI's lm-evaluation-harness (lm-eval), zero-shot, without a chat template; the answer is the
choice of the largest log-likelihood (acc), or of the largest per character (acc_norm). Questions are the first of each
validation set (third_party/README.md). Differences are to the first model, on the same questions: their standard error
is that of the paired differences. With --output, a result is kept as soon as a task is done and a second run goes on
from there; one process per file.

With int8 activations the order of the float sums in attention decides how some values round, and what follows from that
is large: another grouping of the same texts changed one answer in 30 of SmolLM2-135M (W8A8), and another machine or torch
may. The number of threads changed none. In float32, log-likelihoods agree with the harness's own to 0.0005 nats.
500 questions of each of the four default tasks are 94,000 tokens with SmolLM2's tokenizer, texts in common read once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before torch: one bar of our own shows the progress

import numpy as np
import torch
from hardware import ROOT, hardware
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

sys.path.insert(0, str(ROOT / "third_party"))

import fetch
from dcext.format.manifest import MANIFEST_NAME
from dcext.hub import load_float_model, load_tokenizer
from dcext.nn.linear import CompressedLinear
from dcext.pretrained import from_pretrained
from tasks import DEFAULT_TASKS, HARNESS, PACK_TOKENS, TASKS, TreeLM, score

SMOKE_ITEMS = 4


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample deviation over the root of n), as the harness has it."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size))


def load_model(model: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer: a folder that dcext wrote, else what ``load_float_model`` takes."""
    if (Path(model).expanduser() / MANIFEST_NAME).is_file():
        folder = Path(model).expanduser()
        return from_pretrained(folder), load_tokenizer(folder)
    return load_float_model(model)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Has the compressed layers of ``model`` compute W8A16 meanwhile."""
    layers = {m: m.activations for m in model.modules() if isinstance(m, CompressedLinear)}
    for layer in layers:
        layer.activations = "none"
    try:
        yield
    finally:
        for layer, activations in layers.items():
            layer.activations = activations


def model_digest(model: str) -> str:
    """SHA-256 over the files of a model, names and content; of a name on the hub, over its commit.

    Raises:
        FileNotFoundError: neither a path that exists nor a name that can be had from the hub.
    """
    path = Path(model).expanduser()
    if path.is_file():
        lines = [fetch.sha256_of(path)]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{file.name} {fetch.sha256_of(file)}" for file in files]
    else:
        from transformers import AutoConfig

        try:
            lines = [f"{model} {AutoConfig.from_pretrained(model)._commit_hash}"]
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{model}: expected a folder, a .gguf file or a name on the hub: {error}"
            ) from None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Results:
    """Results of this and earlier runs, in a file if there is one.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            try:
                self.entries = dict(json.loads(path.read_text(encoding="utf-8"))["results"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}: expected figures of bench/zeroshot.py, found something else"
                ) from None

    def write(self, summary: Mapping[str, Any] | None = None) -> None:
        """Replaces the file, all of it or nothing; ``summary`` comes before the results."""
        if self.path is not None:
            report = {**(summary or {}), "results": self.entries}
            text = json.dumps(report, indent=1, ensure_ascii=False)
            fetch.write_atomically(self.path, io.BytesIO(f"{text}\n".encode()))


def result_key(digest: str, task: str, items: int) -> str:
    """What a result depends on: model, data, harness, how many questions, and how they are merged (int8 activations)."""
    archive = fetch.ARCHIVES["tasks"].sha256
    parts = (digest, task, str(items), archive, HARNESS, str(PACK_TOKENS))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def evaluate_model(
    label: str, model: str, tasks: Sequence[str], items: int, results: Results, bar: Progress
) -> dict[str, dict[str, Any]]:
    """Task to result; what ``results`` has is not run again, and a model that is not needed is not loaded."""
    digest = model_digest(model)
    keys = {task: result_key(digest, task, items) for task in tasks}
    missing = {task: key for task, key in keys.items() if key not in results.entries}
    lm: TreeLM | None = None
    for task, key in missing.items():
        row = bar.add_task(f"{label}: {task}", total=None)
        if lm is None:
            lm = TreeLM(*load_model(model))
            with float_activations(lm.model):
                lm.check()
        lm.progress = partial(show_progress, bar, row)
        lm.tokens_run = 0
        begin = time.perf_counter()
        correct = score(lm, task, items)
        metrics = {m: mean_stderr([int(c) for c in answers]) for m, answers in correct.items()}
        results.entries[key] = {
            "label": label,
            "model_sha256": digest,
            "task": task,
            "items": items,
            "metrics": {m: {"value": v, "stderr": e} for m, (v, e) in metrics.items()},
            "correct": correct,
            "seconds": time.perf_counter() - begin,
            "tokens": lm.tokens_run,
            "threads": torch.get_num_threads(),
            "hardware": hardware()["line"],
        }
        results.write()
    return {task: results.entries[key] for task, key in keys.items()}


def show_progress(bar: Progress, row: Any, done: int, total: int) -> None:
    """Requests done and in all, for ``TreeLM``."""
    bar.update(row, completed=done, total=total)


def table_rows(
    models: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str
) -> list[dict[str, Any]]:
    """Per model its accuracies and their differences to the first model, each with its standard error.

    Args:
        models: label to task to result, all on the same questions.
        metric: ``acc`` or ``acc_norm``; ``acc`` where a task has no other.

    Returns:
        Rows of ``label`` and ``cells``: task, and ``mean`` of all tasks, to value, stderr, difference, difference_stderr.
    """
    rows, first = [], next(iter(models.values()))
    for label, entries in models.items():
        cells = {}
        for task, entry in entries.items():
            name = metric if metric in entry["correct"] else "acc"
            right, base = ([int(c) for c in e["correct"][name]] for e in (entry, first[task]))
            paired = [a - b for a, b in zip(right, base, strict=True)]
            cells[task] = (*mean_stderr(right), *mean_stderr(paired))
        columns = list(zip(*cells.values(), strict=True))
        means = [sum(column) / len(cells) for column in columns]
        errors = [math.sqrt(sum(e * e for e in column)) / len(cells) for column in columns]
        cells["mean"] = (means[0], errors[1], means[2], errors[3])
        names = ("value", "stderr", "difference", "difference_stderr")
        rows.append(
            {
                "label": label,
                "cells": {t: dict(zip(names, cell, strict=True)) for t, cell in cells.items()},
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], title: str) -> None:
    """The table in percent; below each model but the first, its differences."""
    table = Table(title=title)
    table.add_column("")
    for task in rows[0]["cells"]:
        table.add_column(headings.get(task, task), justify="right")
    for row in rows:
        cells = row["cells"].values()
        table.add_row(
            row["label"], *(f"{100 * c['value']:.1f} ± {100 * c['stderr']:.1f}" for c in cells)
        )
        if row is not rows[0]:
            differences = [
                f"{100 * c['difference']:+.1f} ± {100 * c['difference_stderr']:.1f}" for c in cells
            ]
            table.add_row(f"  - {rows[0]['label']}", *differences, style="dim")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates what the command line names, prints the table and writes the file."""
    items = SMOKE_ITEMS if arguments.smoke else arguments.items
    results = Results(arguments.output)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    models = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        for label, model in arguments.model:
            models[label] = evaluate_model(label, model, arguments.tasks, items, results, bar)
    first = next(iter(models.values()))
    headings = {
        task: f"{task} {arguments.metric if arguments.metric in entry['correct'] else 'acc'}"
        for task, entry in first.items()
    }
    rows = table_rows(models, arguments.metric)
    smoke = "smoke run: " if arguments.smoke else ""
    show(rows, headings, f"{smoke}zero-shot accuracy in percent, first {items} questions of each")
    for label, entries in models.items():
        tokens = sum(entry["tokens"] for entry in entries.values())
        seconds = sum(entry["seconds"] for entry in entries.values())
        threads = "/".join(map(str, sorted({entry["threads"] for entry in entries.values()})))
        print(f"{label}: {tokens} tokens in {seconds:.0f} s on {threads} threads")
    print(f"± standard error; differences: paired, same questions · {HARNESS}")
    print(*dict.fromkeys(e["hardware"] for m in models.values() for e in m.values()), sep="\n")
    summary = {"hardware": hardware(), "harness": HARNESS, "headings": headings, "table": rows}
    results.write(summary)


def named_model(text: str) -> tuple[str, str]:
    """LABEL=MODEL."""
    label, equals, model = text.partition("=")
    if not (label and equals and model):
        raise argparse.ArgumentTypeError(f"expected LABEL=MODEL, got {text!r}")
    return label, model


def task_list(text: str) -> list[str]:
    """Comma-separated tasks."""
    tasks = text.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(TASKS)}, got {unknown[0]!r}")
    return list(dict.fromkeys(tasks))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", required=True, type=named_model, metavar="LABEL=MODEL"
    )
    parser.add_argument("--items", type=int, default=500, help="questions per task, 2 or more")
    parser.add_argument(
        "--tasks",
        type=task_list,
        default=list(DEFAULT_TASKS),
        help=f"comma-separated, of {', '.join(TASKS)}; by default {', '.join(DEFAULT_TASKS)}",
    )
    parser.add_argument(
        "--metric",
        choices=("acc", "acc_norm"),
        default="acc_norm",
        help="what the table shows where a task has both (the file has both); default: acc_norm",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write results to and go on from")
    parser.add_argument(
        "--smoke", action="store_true", help=f"{SMOKE_ITEMS} questions, to see that it runs"
    )
    arguments = parser.parse_args(argv)
    labels = [label for label, _ in arguments.model]
    if arguments.items < 2:
        parser.error(f"--items: expected at least 2, got {arguments.items}")
    if len(set(labels)) < len(labels):
        parser.error(f"--model: expected different labels, got {', '.join(labels)}")
    if arguments.smoke and arguments.output:
        parser.error("--smoke: its figures are not kept, expected no --output")
    try:
        run(arguments)
    except (fetch.FetchError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
