"""The command that measures how compressible a float model is: analyze."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dcext.cli.inputs import read_text
from dcext.cli.output import JsonOption, console, print_json

if TYPE_CHECKING:
    from dcext.analyze import LayerAnalysis, ModelAnalysis, Total, ValueAnalysis


def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, .gguf file, or name on the Hugging Face hub."
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to run, for the inputs of the layers; without it weights only."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Use at most so many tokens of the text.", min=1)
    ] = 4096,
    context: Annotated[int, typer.Option(help="Tokens per window of the text.", min=1)] = 512,
    dtype: Annotated[
        str, typer.Option(help="Load MODEL in this dtype: auto, float32, bfloat16, float16.")
    ] = "auto",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the figures over depth, too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show per layer how compressible a float model's INT8 weights, and its layer inputs on a text, are."""
    from dcext.analyze import analyze_model
    from dcext.hub import DTYPES, load_float_model
    from dcext.plots.compression import plot_analysis
    from dcext.plots.figure import check_plot

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if plot is not None:
        check_plot(plot)
    content = None if text is None else read_text("--text", text, 16 * max_tokens + 1024)
    float_model, tokenizer = load_float_model(model, dtype)
    ids = None
    if content is not None:
        ids = _windows(float_model, tokenizer, content, max_tokens, context)
    with _work_progress("analyzing") as advance:
        analysis = analyze_model(float_model, ids, advance)
    if as_json:
        print_json({"model": model, **analysis.to_dict()})
    else:
        console().print(_weights_table(analysis))
        if analysis.tokens:
            console().print(_inputs_table(analysis))
    if plot is not None:
        plot_analysis(analysis, plot)


def _windows(model: Any, tokenizer: Any, content: str, max_tokens: int, context: int) -> Any:
    """``(windows, tokens)`` int64: the text cut into windows of one size, what is left over dropped."""
    import torch

    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"--context: expected at most {positions} for this model, got {context}")
    ids = torch.tensor(tokenizer(content, verbose=False).input_ids)[:max_tokens]
    if ids.numel() == 0:
        raise ValueError("--text: expected tokens, found none")
    size = min(context, ids.numel())
    count = ids.numel() // size
    return ids[: count * size].reshape(count, size)


@contextmanager
def _work_progress(label: str) -> Iterator[Callable[[str, float], None]]:
    """A bar of work done and time left; yields a function that takes what was done and its share of all work."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(label, total=1.0, name="")
        yield lambda name, share: bar.update(task, advance=share, name=name)


def _weights_table(analysis: ModelAnalysis) -> Table:
    table = Table(
        title="INT8 weights, one scale per tensor and one per row",
        caption="near 0: round to zero with one scale per tensor; entropy: order 0, bits per weight; "
        "ratio: INT8 bytes over stored bytes, scales not counted",
    )
    table.add_column("layer", overflow="fold")
    headings = ("range", "absmax", "near 0", "entropy", "ratio", "entropy/row", "ratio/row")
    for heading in ("shape", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in analysis.layers:
        shape = " x ".join(str(size) for size in layer.shape)
        table.add_row(_label(layer), shape, *_cells(layer.weight))
    for name, total in _totals(analysis):
        table.add_row(name, f"{total.weight.values / 1e6:.1f} M", *_cells(total.weight))
    return table


def _inputs_table(analysis: ModelAnalysis) -> Table:
    table = Table(
        title=f"INT8 inputs of the layers, one scale per token, over {analysis.tokens} tokens",
        caption="near 0: round to zero; entropy: order 0, bits per value; "
        "ratio: INT8 bytes over stored bytes, scales not counted",
    )
    table.add_column("layer", overflow="fold")
    for heading in ("range", "absmax", "near 0", "entropy", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(_label(layer), layer.input) for layer in analysis.layers if layer.block is not None]
    rows.append(("total", analysis.total.input))
    for name, values in rows:
        table.add_row(name, *(["-"] * 5 if values is None else _cells(values)))
    return table


def _label(layer: LayerAnalysis) -> str:
    return " = ".join((layer.name, *layer.tied))


def _totals(analysis: ModelAnalysis) -> list[tuple[str, Total]]:
    """The total, and before it that of the blocks where there is more than these."""
    blocks, total = analysis.blocks, analysis.total
    if blocks is None or blocks.weight.values == total.weight.values:
        return [("total", total)]
    return [("blocks", blocks), ("total", total)]


def _cells(values: ValueAnalysis) -> list[str]:
    """Range, absmax, near-zero share, and entropy and ratio for each kind of scale."""
    cells = [f"{values.minimum:.3g} .. {values.maximum:.3g}", f"{values.absmax:.3g}"]
    cells.append(f"{100 * values.near_zero:.1f} %")
    for size in values.int8.values():
        cells += [f"{size.entropy_bits:.3f}", f"{size.ratio:.3f}"]
    return cells
