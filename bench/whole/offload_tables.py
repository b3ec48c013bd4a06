"""The rows of bench/offload.py as tables, their bounds and their ratios."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rowfile import Row
from watch import BUSY

from whole.offload_cases import baselines
from whole.tables import show_conditions

TABLE_WIDTH = 200  # where stdout is not a terminal


def with_bounds(measured: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Adds to each pass what it reads, and how fast it is beside a disk that does nothing but read that.

    Args:
        measured: what a worker found.
        repeats: passes of each length.
    """
    looks = [look for look in measured["disk_bytes_per_s"] if look is not None]
    for figures in measured["passes"]:
        used = figures["statistics"].get("used_nbytes")
        figures["pass_nbytes"] = figures["storage_nbytes"] if used is None else used // repeats
        if looks and figures["pass_nbytes"]:
            bound_s = figures["pass_nbytes"] / statistics.median(looks)
            figures["share_of_bound"] = bound_s / statistics.median(figures["seconds"])
    return measured


def speed_over(row: Row, rows: list[Row], name: str) -> list[float] | None:
    """How many times as fast as the row of that name each length of a pass is; None without it.

    What rests in memory does not depend on the disk's limit; all others are compared under the same.
    """
    found = [
        r for r in rows if (r["model"], r["name"], r["sizes"]) == (row["model"], name, row["sizes"])
    ]
    same = [r for r in found if r["disk_limit"] == row["disk_limit"] or r["engine"] == "memory"]
    if not same:
        return None
    pairs = zip(row["passes"], same[0]["passes"], strict=True)
    return [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]


def ratios(rows: list[Row]) -> dict[str, Any]:
    """Speeds over those of raw integers, of accelerate and of memory, for the JSON."""
    table = []
    for row in rows:
        key = {name: row[name] for name in ("model", "name", "disk_limit", "sizes")}
        over = {f"over_{k}": speed_over(row, rows, name) for k, name in baselines(row).items()}
        table.append({**key, **over})
    return {"ratios": table}


def show(rows: list[Row], others: list[Row]) -> None:
    """Prints rows of one model, a table for each limit of the disk.

    Args:
        rows: at least one.
        others: where the baselines are.
    """
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    for limit in dict.fromkeys(row["disk_limit"] for row in rows):
        console.print(_table([row for row in rows if row["disk_limit"] == limit], others))
    shared = max(figures["others"] for row in rows for figures in row["passes"])
    show_conditions(console, rows, shared)


def _table(rows: list[Row], others: list[Row]) -> Table:
    limit = rows[0]["disk_limit"]
    disk = "the disk as it is" if limit is None else f"disk limited to {limit / 1e9:g} GB/s"
    lengths = " / ".join(str(length) for length in rows[0]["sizes"]["lengths"])
    table = Table(title=f"{rows[0]['model']}, {disk}: passes of {lengths} tokens")
    table.add_column("", no_wrap=True)
    for heading in ("checkpoint", "memory limit", "peak RSS", "read a pass", "disk"):
        table.add_column(heading, justify="right")
    headings = ("tok/s", "of disk's bound, %", "waited, %", "x raw", "x accelerate", "x memory")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        passes = row["passes"]
        over = [speed_over(row, others, name) or [] for name in baselines(row).values()]
        looks = [look for look in row["disk_bytes_per_s"] if look is not None]
        limited = row["memory_limit"]
        table.add_row(
            row["name"],
            _mb(row["weights_nbytes"]),
            "" if limited is None else _mb(limited),
            _mb(max(figures["peak_rss_bytes"] for figures in passes)),
            _mb(passes[0]["pass_nbytes"]) if passes[0]["pass_nbytes"] else "",
            f"{statistics.median(looks) / 1e9:.2f} GB/s" if looks else "",
            _joined([figures["tokens_per_s"] for figures in passes], "{:.3g}"),
            _joined([100 * f["share_of_bound"] for f in passes if "share_of_bound" in f], "{:.0f}"),
            _joined([100 * share for share in map(_waited, passes) if share is not None], "{:.0f}"),
            *(_joined(values, "{:.2f}") for values in over),
            "*" if any(figures["others"] >= BUSY for figures in passes) else "",
        )
    return table


def _waited(figures: dict[str, Any]) -> float | None:
    """Share of the time in which a layer waited for the disk."""
    stall_s = figures["statistics"].get("stall_s")
    return None if stall_s is None else stall_s / sum(figures["seconds"])


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"


def _joined(values: list[float], form: str) -> str:
    return " / ".join(form.format(value) for value in values)
