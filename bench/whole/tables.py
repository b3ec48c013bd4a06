"""The rows of bench/generation.py as tables, and their ratios."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rowfile import Row
from watch import BUSY

from whole.cases import BASELINES

TABLE_WIDTH = 190  # where stdout is not a terminal


def speed_over(row: Row, rows: list[Row], baseline: str) -> list[float] | None:
    """How many times as fast as the row of that name each number of threads writes; None without it."""
    found = [r for r in rows if (r["model"], r["name"]) == (row["model"], baseline)]
    if not found:
        return None
    pairs = zip(row["speeds"], found[0]["speeds"], strict=True)
    return [a["generation_tokens_per_s"] / b["generation_tokens_per_s"] for a, b in pairs]


def ratios(rows: list[Row]) -> dict[str, Any]:
    """Generation over the baselines, for the JSON."""
    table = []
    for row in rows:
        same = [other for other in rows if other["sizes"] == row["sizes"]]
        over = {
            f"over_{key}": speed_over(row, same, baseline) for key, baseline in BASELINES.items()
        }
        table.append({"model": row["model"], "name": row["name"], "sizes": row["sizes"], **over})
    return {"ratios": table}


def show(rows: list[Row], others: list[Row]) -> None:
    """Prints rows of one model: first speeds, then where the time of a token goes.

    Args:
        rows: at least one.
        others: where the baselines are, with the same sizes.
    """
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(_speeds(rows, others))
    if any("split" in row for row in rows):
        console.print(_splits(rows))
    show_conditions(console, rows, max(speed["others"] for row in rows for speed in row["speeds"]))


def show_conditions(console: Console, rows: list[Row], shared: float) -> None:
    """Under what rows were measured: whether they are to be trusted, and the lines of their hardware.

    Args:
        console: to print on.
        rows: at least one.
        shared: the largest share of the CPUs that others took.
    """
    if shared >= BUSY:
        text = (
            f"others took up to {shared:.0%} of the CPUs: rows marked * are better measured again"
        )
        console.print(text, highlight=False)
    for line in dict.fromkeys(row["hardware"] for row in rows):
        console.print(line, highlight=False, soft_wrap=True)


def _speeds(rows: list[Row], others: list[Row]) -> Table:
    sizes = rows[0]["sizes"]
    threads = " / ".join(str(speed["threads"]) for speed in rows[0]["speeds"])
    table = Table(
        title=f"{rows[0]['model']}: {sizes['prompt']} tokens read, {sizes['new_tokens']} written, {threads} threads"
    )
    table.add_column("", no_wrap=True)
    for heading in ("bits/weight", "weights", "peak memory", "on disk", "perplexity"):
        table.add_column(heading, justify="right")
    for heading in ("prefill, tok/s", "generation, tok/s", "x INT8 raw", "x bfloat16"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        speeds = row["speeds"]
        busy = any(speed["others"] >= BUSY for speed in speeds)
        over = [speed_over(row, others, baseline) for baseline in BASELINES.values()]
        table.add_row(
            row["name"],
            f"{8 * row['weights_nbytes'] / row['num_weights']:.2f}",
            f"{row['weights_nbytes'] / 1e6:.0f} MB",
            f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
            "" if row["disk_nbytes"] is None else f"{row['disk_nbytes'] / 1e6:.0f} MB",
            f"{row['perplexity']:.2f}" if "perplexity" in row else "",
            _pair([speed["prefill_tokens_per_s"] for speed in speeds], ".1f"),
            _pair([speed["generation_tokens_per_s"] for speed in speeds], ".2f"),
            *(_pair(values or [], ".2f") for values in over),
            row["note"] + (" *" if busy else ""),
        )
    return table


def _splits(rows: list[Row]) -> Table:
    table = Table(title=f"{rows[0]['model']}: milliseconds of a token, 1 thread")
    table.add_column("", no_wrap=True)
    for heading in ("token", "products", "other operators", "Python and dispatch"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "split" in row:
            keys = ("token_ms", "products_ms", "others_ms", "python_ms")
            table.add_row(row["name"], *(f"{row['split'][key]:.2f}" for key in keys))
    return table


def _pair(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)
