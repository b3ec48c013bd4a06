"""The rows that were measured: kept as JSON, so that a run can be continued, and printed as tables."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quality.models import Sizes

ROOT = Path(__file__).resolve().parents[2]
TABLE_WIDTH = 170  # where stdout is not a terminal

Row = dict[str, Any]
Key = tuple[str, str, str, tuple[int, ...]]


def key_of(model: str, method: str, activations: str, sizes: Sizes) -> Key:
    """What makes two rows the same measurement."""
    return model, method, activations, tuple(asdict(sizes).values())


class Results:
    """Rows in a JSON file, in the order in which they were measured. Processes may share the file."""

    def __init__(self, path: Path) -> None:
        """Args: path: the file; read if it exists, its folder is created when the first row comes."""
        self.path = path
        self.rows = self._read()

    def add(self, key: Key, row: Row) -> None:
        """Adds a row, or replaces one of the same key, and writes the file."""
        self._change({key: row}, set())

    def drop(self, keys: set[Key]) -> None:
        """Removes rows, those of them that exist, and writes the file."""
        if keys & self.rows.keys():
            self._change({}, keys)

    def _read(self) -> dict[Key, Row]:
        if not self.path.is_file():
            return {}
        rows = json.loads(self.path.read_text())["rows"]
        return {
            key_of(r["model"], r["method"], r["activations"], Sizes(**r["sizes"])): r for r in rows
        }

    def _change(self, added: dict[Key, Row], dropped: set[Key]) -> None:
        """Changes what the file holds by now: another process may have added to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            rows = {key: row for key, row in self._read().items() if key not in dropped}
            self.rows = {**rows, **added}
            temporary = self.path.with_suffix(".part")
            report = {"kind": "measured", "rows": list(self.rows.values())}
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(temporary, self.path)
        finally:
            os.close(folder)


def uncommitted() -> bool:
    """Whether what is measured differs from the commit that the hardware line names."""
    command = ["git", "status", "--porcelain", "--", "csrc", "dcext", "bench/quality"]
    return bool(subprocess.run(command, cwd=ROOT, capture_output=True, check=False).stdout)


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
