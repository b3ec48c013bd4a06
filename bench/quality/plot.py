"""The figure: perplexity and divergence over stored bits per weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quality.results import Row

# Series -> colour, marker. Filled and solid: float activations; hollow and dashed: int8.
CURVES = {
    "rate": ("tab:red", "o"),
    "rate packed": ("tab:pink", "h"),
    "data-free": ("tab:orange", "s"),
    "paper": ("tab:purple", "^"),
    "INT8": ("tab:brown", "D"),
}
JOINED = ("rate", "rate packed", "data-free")
PEERS = {
    "torchao": ("tab:blue", "P"),
    "NF4": ("tab:cyan", "X"),
    "HQQ": ("tab:green", "v"),
    "GPTQ": ("black", "*"),
}
BITS = (2.0, 9.0)
LABELS = (
    6.2,
    0.64,
)  # the first of the peers' names, ordered by height: bits, and share of the axis
LABEL_STEP = 0.042
WORST_PERPLEXITY = 2.5  # times the float model's; points above are drawn at the edge


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Writes the figure as PNG: a column for each model, perplexity above, KL divergence below.

    Args:
        tables: rows by model; a model without a float row is left out.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = {m: rows for m, rows in tables.items() if any(r["series"] == "float" for r in rows)}
    if not tables:
        return
    figure = Figure(figsize=(7.5 * len(tables), 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(tables), squeeze=False)
    for column, (model, rows) in enumerate(tables.items()):
        _perplexities(axes[0][column], model, rows)
        _divergences(axes[1][column], rows)
    figure.savefig(path, dpi=120)


def _perplexities(axis: Any, model: str, rows: list[Row]) -> None:
    best = next(row["perplexity"] for row in rows if row["series"] == "float")
    top = min(best * WORST_PERPLEXITY, 1.1 * max(row["perplexity"] for row in rows))
    axis.axhline(best, color="grey", linewidth=1)
    axis.annotate(f"float32: {best:.2f}", (BITS[0] + 0.05, best), va="top", color="grey")
    _curves(axis, rows, lambda row: min(row["perplexity"], top))
    _points(axis, rows, lambda row: min(row["perplexity"], top), top)
    axis.set(title=model, ylabel="perplexity", yscale="log")
    axis.set_ylim(best * 0.96, top * (top / best) ** 0.08)
    _plain_ticks(axis)
    _finish(axis)


def _divergences(axis: Any, rows: list[Row]) -> None:
    rows = [row for row in rows if row["kl_nats"] > 0]
    _curves(axis, rows, lambda row: row["kl_nats"])
    _points(axis, rows, lambda row: row["kl_nats"], float("inf"))
    axis.set(ylabel="KL(float || compressed), nats per token", yscale="log")
    axis.set(xlabel="stored bits per weight of the linear layers, everything counted")
    _finish(axis)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axis.yaxis.set_major_locator(MaxNLocator(10))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(ScalarFormatter())


def _finish(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.set_xlim(BITS)
    axis.legend(fontsize=7, ncols=2, loc="upper right" if axis.get_title() else "lower left")


def _curves(axis: Any, rows: list[Row], height: Callable[[Row], float]) -> None:
    """The rows of dcext."""
    for series, (color, marker) in CURVES.items():
        for activations, line, form in (("none", "-", "W8A16"), ("int8", "--", "W8A8")):
            points = [r for r in rows if r["series"] == series and r["activations"] == activations]
            points.sort(key=lambda row: row["bits_per_weight"])
            axis.plot(
                [row["bits_per_weight"] for row in points],
                [height(row) for row in points],
                label=f"{series}, {form}" if points else None,
                color=color,
                marker=marker,
                markerfacecolor=color if activations == "none" else "none",
                linestyle=line if series in JOINED else "",
            )


def _points(axis: Any, rows: list[Row], height: Callable[[Row], float], top: float) -> None:
    """The rows of peers, each with its name; beside one above ``top``, its perplexity too."""
    others = [row for row in rows if row["series"] not in (*CURVES, "float")]
    others.sort(key=height, reverse=True)
    for number, row in enumerate(others):
        color, marker = PEERS[row["series"]]
        position = (row["bits_per_weight"], height(row))
        axis.plot(*position, color=color, marker=marker, linestyle="")
        above = f" ({row['perplexity']:.3g})" if row["perplexity"] > top else ""
        axis.annotate(
            row["method"] + above,
            position,
            (LABELS[0], LABELS[1] - number * LABEL_STEP),
            textcoords=("data", "axes fraction"),
            fontsize=8,
            color=color,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.5,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
        )
