"""Figures over the depth of a model, as PNG. matplotlib (extra ``plot``) is imported when one is drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcext.analyze import LayerAnalysis, ModelAnalysis
from dcext.plots.figure import check_plot, new_figure, save_figure
from dcext.quantize.report import CompressionReport

MARKERS = "osD^vPX<>"  # nine, beside ten colours: ninety kinds can be told apart


@dataclass(frozen=True)
class Point:
    """One layer in one panel: its kind, the index of its block (None outside of them), weight in a mean, and value."""

    kind: str
    depth: int | None
    count: int
    value: float


@dataclass(frozen=True)
class Panel:
    """One axis: its label, and by the name of each series its line style (``"-"`` or ``"--"``) and its points."""

    label: str
    series: dict[str, tuple[str, list[Point]]]


def plot_analysis(analysis: ModelAnalysis, path: str | Path) -> None:
    """Draws entropy, ratio and near-zero share of a model's weights over depth, and of its layer inputs where known.

    One colour for each kind of layer (last component of the name); layers outside of the blocks are dotted horizontal
    lines. Layers of one kind in one block (experts) are averaged over their weights.

    Args:
        analysis: from ``dcext.analyze.analyze_model``.
        path: of the PNG file; replaced at once or left as it is.

    Raises:
        ValueError: there is no layer, or the name does not end in ``.png``.
        FileNotFoundError, RuntimeError: as for ``check_plot``.
    """
    layers = analysis.layers
    entropies = _weights_panel("INT8 weights: entropy, bits per weight", layers, "entropy_bits")
    ratios = _weights_panel("INT8 weights: INT8 bytes / stored bytes", layers, "ratio")
    near_zero = [
        Point(layer.kind, layer.block, layer.weight.values, 100 * layer.weight.near_zero)
        for layer in layers
    ]
    panels = [entropies, ratios, Panel("weights that round to zero, %", {"": ("-", near_zero)})]
    zero_inputs = [
        Point(layer.kind, layer.block, layer.input.values, 100 * layer.input.near_zero)
        for layer in layers
        if layer.input is not None
    ]
    if zero_inputs:
        panels.append(Panel("layer inputs that round to zero, %", {"": ("-", zero_inputs)}))
    _draw(panels, 2, path)


def plot_compression(report: CompressionReport, path: str | Path) -> None:
    """Draws stored bits per weight over depth and, where it was measured, the error of the outputs below.

    Colours, dotted lines and averages are those of ``plot_analysis``. The depth of a layer is the first number in its
    name.

    Args:
        report: of ``dcext.compress_`` (``model.dcext_report``).
        path: of the PNG file; replaced at once or left as it is.

    Raises:
        ValueError: there is no layer, or the name does not end in ``.png``.
        FileNotFoundError, RuntimeError: as for ``check_plot``.
    """
    bits, errors = [], []
    for layer in report.layers:
        kind, depth = layer.name.rpartition(".")[2], _depth(layer.name)
        bits.append(Point(kind, depth, layer.weights, layer.bits_per_weight))
        if layer.output_snr_db is not None:
            errors.append(Point(kind, depth, layer.weights, -layer.output_snr_db))
    panels = [Panel("stored bits per weight", {"": ("-", bits)})]
    if errors:
        panels.append(Panel("output error over output power, dB", {"": ("-", errors)}))
    _draw(panels, 1, path)


def _weights_panel(label: str, layers: Iterable[LayerAnalysis], attribute: str) -> Panel:
    """One figure of the INT8 weights: solid with one scale per tensor, dashed with one per row."""

    def points(scales: str) -> list[Point]:
        return [
            Point(
                layer.kind,
                layer.block,
                layer.weight.values,
                getattr(layer.weight.int8[scales], attribute),
            )
            for layer in layers
        ]

    return Panel(
        label,
        {
            "one scale per tensor": ("-", points("tensor")),
            "one per row": ("--", points("row")),
        },
    )


def _depth(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if numbers else None


def _draw(panels: list[Panel], columns: int, path: str | Path) -> None:
    """Draws panels row by row with one legend of kinds, and writes the file."""
    check_plot(path)
    every = [point for panel in panels for _, points in panel.series.values() for point in points]
    kinds = list(dict.fromkeys(point.kind for point in every))
    if not kinds:
        raise ValueError(f"{path}: expected layers to draw, got none")
    rows = -(-len(panels) // columns)
    figure = new_figure(rows, columns)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, kinds)
    handles, labels = axes[0].get_legend_handles_labels()
    by_kind = dict(zip(labels, handles, strict=True))
    figure.legend(by_kind.values(), by_kind.keys(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def _draw_panel(axis: Any, panel: Panel, kinds: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    for number, (style, points) in enumerate(panel.series.values()):
        for index, kind in enumerate(kinds):
            look = {"color": f"C{index % 10}", "label": kind if number == 0 else None}
            line = _means(point for point in points if point.kind == kind)
            marker = MARKERS[index % len(MARKERS)]
            if line:
                axis.plot(*zip(*line, strict=True), style, marker=marker, markersize=3, **look)
            for point in points:
                if point.kind == kind and point.depth is None:
                    axis.axhline(point.value, linestyle=":", alpha=1 - 0.4 * number, **look)
    axis.set(xlabel="block", ylabel=panel.label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(panel.series) > 1:
        styles: list[Any] = [style for style, _ in panel.series.values()]
        keys = [Line2D([], [], color="grey", linestyle=style) for style in styles]
        axis.legend(keys, list(panel.series), fontsize=8)


def _means(points: Iterable[Point]) -> list[tuple[int, float]]:
    """Depth and mean value of the points that have a depth, by depth."""
    groups: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        if point.depth is not None:
            groups[point.depth].append(point)
    return [
        (depth, sum(p.value * p.count for p in group) / sum(p.count for p in group))
        for depth, group in sorted(groups.items())
    ]
