"""The roofline of a machine with layers on it, and time over memory: as PNG, or in the terminal.

matplotlib and plotext (extra ``plot``) are imported when one is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcext.codecs import codec_names
from dcext.plots.figure import check_plot, new_figure, save_figure
from dcext.policy.plan import CurvePoint, Plan, count_tokens
from dcext.policy.predict import Predictor, Unit

TERMINAL = "-"  # instead of a file
TERMINAL_SIZE = (100, 26)
CODEC_MARKERS = "osD^vPX<>"  # in the order of codecs
INTENSITIES = [
    10 ** (i / 20) for i in range(-10, 81)
]  # INT8 operations for each byte: 0.3 to 10,000


@dataclass(frozen=True)
class RooflinePoint:
    """Layers of a kind: operations for each stored byte, and TOPS, predicted and as taken."""

    codec: str
    tokens: int
    intensity: float
    tops: float
    measured_tops: float | None


def roofline_points(predictor: Predictor, units: Sequence[Unit], plan: Plan) -> list[RooflinePoint]:
    """A point for each kind of layer, tier and number of tokens of a plan.

    Not of embeddings, nor of layers of which there is one: a head multiplies fewer tokens than its pass has.
    """
    by_name = {unit.name: unit for unit in units}
    count = Counter(unit.kind for unit in units)
    found: dict[tuple[object, ...], RooflinePoint] = {}
    for layer in plan.layers:
        unit = by_name[layer.name]
        codec = layer.tier.codec
        for each in plan.passes:
            key = (unit.kind, layer.tier, each.tokens)
            if key in found or unit.looked_up or count[unit.kind] == 1:
                continue
            operations = 2 * unit.weights * each.tokens * unit.multiplied
            seconds = predictor.compute_s(unit, codec, each.tokens)
            taken = layer.measured_s.get(each.tokens)
            found[key] = RooflinePoint(
                codec=codec,
                tokens=each.tokens,
                intensity=operations / (unit.nbytes[codec] * unit.multiplied),
                tops=operations / seconds / 1e12,
                measured_tops=operations / taken / 1e12 if taken else None,
            )
    return list(found.values())


def roofs(predictor: Predictor) -> dict[str, list[float]]:
    """TOPS that the machine allows at each of ``INTENSITIES``, of its memory and of its disk or link if there is one."""
    machine = predictor.machine
    processor = machine.device or predictor.host
    sources = {"memory": processor.memory_gbps}
    if machine.link_gbps is not None:
        sources["link"] = machine.link_gbps
    if predictor.disk is not None:
        sources["disk"] = predictor.disk_gbps
    return {
        f"{name}, {gbps:.1f} GB/s": [
            min(processor.int8_tops, gbps * intensity / 1e3) for intensity in INTENSITIES
        ]
        for name, gbps in sources.items()
    }


def plot_plan(
    path: str | Path,
    predictor: Predictor,
    units: Sequence[Unit],
    plan: Plan,
    curve: Sequence[CurvePoint],
) -> str | None:
    """Draws both plots.

    Args:
        path: of the PNG file, replaced at once; or ``"-"`` for text.
        predictor: of the plan's times.
        units: of the model.
        plan: whose layers are drawn.
        curve: of plans.

    Returns:
        The text, with ``"-"``.

    Raises:
        RuntimeError: matplotlib, or plotext, is missing.
        ValueError, FileNotFoundError: as ``dcext.plots.figure.check_plot``.
    """
    points = roofline_points(predictor, units, plan)
    if str(path) == TERMINAL:
        return _as_text(predictor, points, curve)
    check_plot(path)
    figure = new_figure(1, 2)
    _draw_roofline(figure.add_subplot(1, 2, 1), predictor, points)
    _draw_curve(figure.add_subplot(1, 2, 2), plan, curve)
    save_figure(figure, path)
    return None


def _draw_roofline(axis: Any, predictor: Predictor, points: Sequence[RooflinePoint]) -> None:
    for label, tops in roofs(predictor).items():
        axis.plot(INTENSITIES, tops, "-", color="grey", linewidth=1)
        axis.annotate(label, (INTENSITIES[8], tops[8]), fontsize=7, rotation=32, color="grey")
    tokens = sorted({point.tokens for point in points})
    seen = set()
    for point in points:
        color = f"C{tokens.index(point.tokens)}"
        key = (point.codec, point.tokens)
        label = "" if key in seen else f"{point.codec}, {count_tokens(point.tokens)}"
        seen.add(key)
        look = {
            "color": color,
            "marker": CODEC_MARKERS[codec_names().index(point.codec)],
            "linestyle": "",
        }
        axis.plot([point.intensity], [point.tops], markersize=5, label=label or None, **look)
        if point.measured_tops is not None:
            look["fillstyle"] = "none"
            axis.plot([point.intensity], [point.measured_tops], markersize=9, **look)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="INT8 operations for each stored byte",
        ylabel="TOPS (outlined: as taken)",
        title=predictor.machine.name,
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _draw_curve(axis: Any, plan: Plan, curve: Sequence[CurvePoint]) -> None:
    megabytes = [point.nbytes / 1e6 for point in curve]
    axis.plot(megabytes, [1e3 * p.predicted_s for p in curve], "-o", label="predicted")
    taken = [(p.nbytes / 1e6, 1e3 * p.measured_s) for p in curve if p.measured_s is not None]
    if taken:
        axis.plot(*zip(*taken, strict=True), "--s", label="measured")
    nbytes = plan.device_nbytes or plan.host_nbytes
    axis.plot([nbytes / 1e6], [1e3 * plan.seconds], "k*", markersize=12, label="this plan")
    axis.axvline(plan.int8_nbytes / 1e6, color="grey", linestyle=":", label="plain INT8")
    axis.set(xlabel="MB of weights in memory", ylabel="ms a pass of the mix")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _as_text(
    predictor: Predictor, points: Sequence[RooflinePoint], curve: Sequence[CurvePoint]
) -> str:
    try:
        import plotext
    except ImportError as error:
        raise RuntimeError(
            f"plots: expected plotext, found none ({error}): pip install 'dcext[plot]'"
        ) from error
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*TERMINAL_SIZE)
    plotext.xscale("log")
    plotext.yscale("log")
    for label, tops in roofs(predictor).items():
        plotext.plot(INTENSITIES, tops, label=label)
    for codec in codec_names():
        mine = [point for point in points if point.codec == codec]
        if mine:
            intensities, tops = [p.intensity for p in mine], [p.tops for p in mine]
            plotext.scatter(intensities, tops, marker=codec[0], label=codec)
    plotext.xlabel("INT8 operations for each stored byte")
    plotext.ylabel("TOPS")
    roofline = plotext.build()
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(*TERMINAL_SIZE)
    megabytes = [point.nbytes / 1e6 for point in curve]
    plotext.plot(megabytes, [1e3 * point.predicted_s for point in curve], label="predicted")
    taken = [(p.nbytes / 1e6, 1e3 * p.measured_s) for p in curve if p.measured_s is not None]
    if taken:
        plotext.scatter(*zip(*taken, strict=True), marker="x", label="measured")
    plotext.xlabel("MB of weights in memory")
    plotext.ylabel("ms a pass of the mix")
    return str(plotext.uncolorize(f"{roofline}\n{plotext.build()}"))
