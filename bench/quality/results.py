"""The rows that were measured, and their tables."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rowfile import Row, RowFile

from quality.models import Sizes

TABLE_WIDTH = 170  # where stdout is not a terminal

Key = tuple[str, str, str, tuple[int, ...]]


def key_of(model: str, method: str, activations: str, sizes: Sizes) -> Key:
    """What makes two rows the same measurement."""
    return model, method, activations, tuple(asdict(sizes).values())


class Results(RowFile[Key]):
    """The rows of quality.json."""

    def __init__(self, path: Path) -> None:
        """Args: path: the file."""
        super().__init__(path, _key_of_row)


def _key_of_row(row: Row) -> Key:
    return key_of(row["model"], row["method"], row["activations"], Sizes(**row["sizes"]))


def show(rows: list[Row], note: str) -> None:
    """Prints the rows of one model as a table, with the hardware they were measured on."""
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    sizes = rows[0]["sizes"]
    about = f"{sizes['evaluation']} tokens, context {sizes['context']}"
    table = Table(title=f"{rows[0]['model']}: {about}" + (f"; {note}" if note else ""))
    table.add_column("", no_wrap=True)
    table.add_column("activations")
    headings = ("bits/weight", "perplexity", "KL, nats/token", "same top-1", "gap, bits")
    for heading in (*headings, "quantize", "evaluate"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        gap, error = row["waterfilling_gap_bits"], row["kl_standard_error"]
        table.add_row(
            row["method"],
            "int8" if row["activations"] == "int8" else "float",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.4g}",
            f"{row['kl_nats']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            f"{row['top1_agreement']:.1%}",
            "" if gap is None else f"{gap:.2f}",
            *(_seconds(row[key]) for key in ("quantize_s", "evaluate_s")),
            row["note"],
        )
    console.print(table)
    for line in dict.fromkeys(row["hardware"] for row in rows):
        console.print(line, highlight=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    """None where other work ran beside: the row's figures hold, its times do not."""
    return "" if value is None else f"{value:.0f} s"
