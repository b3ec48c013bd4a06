"""Commands of the policy: tune, plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dcext.cli.output import JsonOption, byte_progress, console, print_json, share_progress

if TYPE_CHECKING:
    from dcext.policy.machine import Machine, Processor
    from dcext.policy.plan import CurvePoint, Plan, PlannedLayer

MixOption = Annotated[
    str,
    typer.Option(
        help="What is planned for: tokens of a forward pass, or passes by tokens, such as 1:200,512:1 for answers of 200 "
        "tokens to prompts of 512.",
        metavar="TOKENS",
    ),
]
SlowdownOption = Annotated[
    str | None,
    typer.Option(
        help="Least memory instead of least time: a pass may take so much longer than with plain INT8, such as 5%.",
        metavar="SHARE",
    ),
]

HostBudget = Annotated[
    str | None, typer.Option(help="Memory for weights, such as 4GiB.", metavar="SIZE")
]
DeviceBudget = Annotated[
    str | None,
    typer.Option(
        help="The same on the GPU, which the model is to run on: this machine's, or a --machine's.",
        metavar="SIZE",
    ),
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        help="Plan for a machine that is not here: a file, or a preset (pcie3, pcie4, pcie5, nvlink-c2c, jetson, laptop).",
        metavar="FILE",
    ),
]
ShapesOption = Annotated[
    str | None,
    typer.Option(
        help="Instead of OUT, a model that is not here: opt-1.3b, opt-6.7b, opt-13b, llama-2-7b, llama-2-13b, llama-3-8b, "
        "llama-2-70b.",
        metavar="NAME",
    ),
]
PlotOption = Annotated[
    str | None,
    typer.Option(
        help="Draw roofline and time over memory as PNG; - draws them here.", metavar="PNG"
    ),
]
MeasureOption = Annotated[
    bool, typer.Option(help="Time the plan, and with --plot others, beside what is predicted.")
]


def parse_mix(text: str) -> dict[int, float]:
    """Passes by tokens: of ``"1:200,512:1"``, or of ``"1"``.

    Raises:
        ValueError: anything else.
    """
    mix: dict[int, float] = {}
    try:
        for part in text.split(","):
            tokens, _, weight = part.partition(":")
            mix[int(tokens)] = float(weight or 1)
    except ValueError:
        raise ValueError(
            f"--tokens: expected tokens, or passes by tokens such as 1:200,512:1, got {text!r}"
        ) from None
    return mix


def parse_share(text: str | None) -> float | None:
    """A share such as ``"5%"`` or ``"0.05"``.

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"--slowdown: expected a share such as 5% or 0.05, got {text!r}") from None


def tune(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="On the disk that is measured; by default the cache's.", metavar="[FOLDER]"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Also measure a GPU, where models run: cuda, cuda:1 ..")
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option(help="Measure again, though figures of this machine and build are known."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the machine file here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: memory, disk, decoders, and layers over the number of tokens. Takes a few seconds."""
    from dcext.profiling.measure import tune as measured

    with share_progress("measuring") as advance:
        machine = measured(folder, device=device, refresh=refresh, progress=advance)
    if output is not None:
        machine.save(output)
    if as_json:
        print_json(machine.to_dict())
        return
    show_machine(machine)


def show_machine(machine: Machine) -> None:
    """Prints a machine's figures, each with its uncertainty."""
    table = Table(
        title=f"{machine.name} ({machine.kind})", caption="layers: ms for 1e9 weights, by tokens"
    )
    table.add_column("")
    table.add_column("figure", justify="right")
    table.add_column("±", justify="right")
    for threads, host in sorted(machine.host.items()):
        name = f"{threads} thread{'s' * (threads > 1)}"
        _show_processor(table, name, host, machine.uncertainty, f"host.{threads}.")
    if machine.device is not None:
        _show_processor(table, "device", machine.device, machine.uncertainty, "device.")
    for field, what in (("disk_gbps", "disk"), ("verify_gbps", "checksums"), ("link_gbps", "link")):
        value = getattr(machine, field)
        if value is not None:
            table.add_row(what, f"{value:.2f} GB/s", _percent(machine.uncertainty.get(field)))
    console().print(table)


def _show_processor(
    table: Table, name: str, processor: Processor, spread: Mapping[str, float], key: str
) -> None:
    def row(what: str, text: str, field: str) -> None:
        table.add_row(f"{name}: {what}", text, _percent(spread.get(key + field)))

    row("memory", f"{processor.memory_gbps:.1f} GB/s", "memory_gbps")
    row("INT8", f"{processor.int8_tops:.2f} TOPS", "int8_tops")
    for codec, speed in processor.decode_gweights.items():
        row(f"decoding {codec}", f"{speed:.2f} Gweights/s", f"decode_gweights.{codec}")
    for codec, layer in processor.layer_s.items():
        text = "  ".join(f"{tokens}: {seconds * 1e3:.0f}" for tokens, seconds in layer.items())
        row(f"layers, {codec}", text, f"layer_s.{codec}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def plan(
    folder: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder that `dcext compress` wrote.")
    ] = None,
    host_memory: HostBudget = None,
    device_memory: DeviceBudget = None,
    slowdown: SlowdownOption = None,
    tokens: MixOption = "1",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here, for --plan.")
    ] = None,
    machine: MachineOption = None,
    shapes: ShapesOption = None,
    plot: PlotOption = None,
    measure: MeasureOption = False,
    layers: Annotated[bool, typer.Option(help="Print every layer, not kinds of them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose for each layer where to keep it and how, for least time in the memory that is free, or that is given."""
    from dcext.plots.figure import check_plot
    from dcext.plots.plan import TERMINAL, plot_plan
    from dcext.profiling.study import checked_mix
    from dcext.sizes import check_nbytes

    if plot not in (None, TERMINAL):
        check_plot(str(plot))
    if (folder is None) == (shapes is None):
        raise ValueError(
            "plan: expected either OUT, a folder that `dcext compress` wrote, or --shapes, got "
            + ("neither" if folder is None else "both")
        )
    if measure and (machine is not None or shapes is not None):
        raise ValueError("--measure: expected a model and this machine, got --machine or --shapes")
    if measure and device_memory is not None:
        raise ValueError("--measure: expected a plan for the CPU, got --device-memory")
    mix = checked_mix(1, parse_mix(tokens), parse_share(slowdown))
    check_nbytes(host_memory=host_memory, device_memory=device_memory)
    on_device = device_memory is not None
    model: Any = None
    forward: Any = None
    if folder is not None:
        model, forward, studied = _study(folder, mix, machine, on_device)
    else:
        studied = _study_of_shapes(str(shapes), machine, on_device)
    made = studied.plan(
        host_memory=host_memory,
        device_memory=device_memory,
        slowdown=parse_share(slowdown),
        mix=mix,
    )
    points = _curve(studied, mix, model if measure else None, forward) if plot else []
    if measure:
        from dcext.planning.explain import measured

        made = measured(model, made, forward)
    if output is not None:
        made.save(output)
    text = None
    if plot is not None:
        predictor = studied.predictor(made.slots_nbytes)
        text = plot_plan(plot, predictor, studied.units, made, points)
    if as_json:
        print_json({**made.to_dict(), "curve": [asdict(point) for point in points]})
        return
    show_plan(made, layers)
    if text is not None:
        print(text)


def _study(
    folder: str, mix: Mapping[int, float], machine: str | None, on_device: bool
) -> tuple[Any, Any, Any]:
    """The model, what runs a pass of it, and what the policy knows of both."""
    import dcext
    from dcext.format import CheckpointReader
    from dcext.profiling.observe import forward_of
    from dcext.profiling.study import DEVICE, study

    with byte_progress("loading", CheckpointReader(folder).tensor_nbytes) as advance:
        model = dcext.from_pretrained(folder, progress=advance)
    with share_progress("studying") as report:
        device = DEVICE if on_device else None
        studied = study(model, tuple(mix), machine=machine, device=device, progress=report)
    return model, forward_of(model), studied


def _study_of_shapes(name: str, machine: str | None, on_device: bool) -> Any:
    from dcext.policy.shapes import units_of
    from dcext.profiling.study import DEVICE, study_of_units

    units, others = units_of(name)
    return study_of_units(units, others, machine, DEVICE if on_device else None)


def _curve(studied: Any, mix: Mapping[int, float], model: Any, forward: Any) -> list[CurvePoint]:
    from dcext.planning.explain import curve

    with share_progress("drawing") as report:
        return curve(studied, mix, model=model, forward=forward, progress=report)


def show_plan(plan: Plan, layers: bool) -> None:
    """Prints where layers are to be, kinds of them together unless ``layers``, and what follows."""
    from dcext.policy.plan import count_tokens

    lengths = [each.tokens for each in plan.passes]
    has_measured = any(layer.measured_s for layer in plan.layers)
    table = Table(caption="ms: predicted, of what a layer uses most" + " / as taken" * has_measured)
    table.add_column("layers", overflow="fold")
    for heading in ("", "tier", "MB", *(f"ms, {count_tokens(n)}" for n in lengths), "binds"):
        table.add_column(heading, justify="right")
    for (name, tier), members in _grouped(plan.layers, layers).items():
        figures = [_ms(members, n) for n in lengths]
        binds = sorted({layer.binds[n] for layer in members for n in lengths if n in layer.binds})
        megabytes = sum(layer.nbytes for layer in members) / 1e6
        count = "" if layers else f"{len(members)} x"
        table.add_row(name, count, tier, f"{megabytes:.2f}", *figures, ", ".join(binds))
    console().print(table)
    lines = [f"{plan.objective} ({plan.kind}: {plan.machine})"]
    for each in plan.passes:
        taken = "" if each.measured_s is None else f", {each.measured_s * 1e3:.2f} ms as taken"
        lines.append(
            f"{count_tokens(each.tokens)}: {each.seconds * 1e3:.2f} ms predicted{taken} ({each.other_s * 1e3:.2f} ms outside of "
            f"layers; {each.serial_s * 1e3:.2f} ms if nothing overlapped); plain INT8 {each.int8_s * 1e3:.2f} ms"
        )
    sizes = [("host", plan.host_nbytes), ("device", plan.device_nbytes)]
    memory = ", ".join(f"{n / 1e6:.1f} MB of {place} memory" for place, n in sizes if n)
    lines.append(f"{memory}; plain INT8 {plan.int8_nbytes / 1e6:.1f} MB")
    for line in [*lines, *plan.notes]:
        console().print(line, highlight=False, soft_wrap=True)


def _grouped(
    layers: Sequence[PlannedLayer], each: bool
) -> dict[tuple[str, str], list[PlannedLayer]]:
    """Layers by name, numbers left out unless each is wanted, and tier."""
    groups: dict[tuple[str, str], list[PlannedLayer]] = {}
    for layer in layers:
        name = layer.name if each else re.sub(r"\.\d+\.", ".*.", layer.name)
        groups.setdefault((name, str(layer.tier)), []).append(layer)
    return groups


def _ms(layers: Sequence[PlannedLayer], tokens: int) -> str:
    predicted = sum(layer.seconds.get(tokens, 0.0) for layer in layers)
    taken = [layer.measured_s[tokens] for layer in layers if tokens in layer.measured_s]
    text = f"{predicted * 1e3:.3f}"
    return f"{text} / {sum(taken) * 1e3:.3f}" if taken else text
