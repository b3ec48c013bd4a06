"""What the commands print with: progress bars on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
OutFolder = Annotated[
    str, typer.Argument(metavar="OUT", help="Folder that `dcext compress` wrote.")
]


def console() -> Console:
    """Standard output; wide enough for tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output, and nothing else."""
    print(json.dumps(value, indent=2))


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes done, speed and time left; yields a function that takes the bytes since the last call."""
    columns = (DownloadColumn(binary_units=False), TransferSpeedColumn())
    with _progress(*columns) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextmanager
def token_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of tokens done and time left."""
    with _progress(MofNCompleteColumn(), TextColumn("tokens")) as bar:
        task = bar.add_task(label, total=total)
        yield lambda tokens: bar.advance(task, tokens)


@contextmanager
def share_progress(label: str) -> Iterator[Callable[[str, float], None]]:
    """A bar of all work with time left; yields a function that takes what was done and its share of the whole."""
    with _progress(TaskProgressColumn(), TextColumn("{task.fields[what]}")) as bar:
        task = bar.add_task(label, total=1.0, what="")
        yield lambda what, share: bar.update(task, advance=share, what=what)


def _progress(*columns: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
