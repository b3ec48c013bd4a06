"""Commands that tell: inspect, info."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dcext.cli.output import JsonOption, OutFolder, byte_progress, console, print_json


def inspect(folder: OutFolder, as_json: JsonOption = False) -> None:
    """Show, for each compressed tensor: shape, codec, entropy, bits per weight and ratio; and the totals."""
    from dcext.format import CheckpointReader

    summary = summarize(CheckpointReader(folder), with_entropy=True)
    if as_json:
        print_json(summary)
        return
    table = Table(
        caption="entropy: order 0; bits/weight and ratio count every stored byte of a layer"
    )
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "codec", "entropy", "bits/weight", "ratio"):
        table.add_column(heading, justify="right")
    for row in [*summary["tensors"], {**summary, "name": "total", "shape": [], "codec": ""}]:
        shape = " x ".join(str(size) for size in row["shape"])
        figures = (f"{row['entropy']:.3f}", f"{row['bits_per_weight']:.3f}", f"{row['ratio']:.3f}")
        table.add_row(row["name"], shape, row["codec"], *figures)
    console().print(table)
    console().print(f"{summary['nbytes'] / 1e6:.1f} MB on disk", highlight=False)


def show_layers(report: Any) -> None:
    """Prints what compression did to each layer, and what fell short of the recipe."""
    table = Table(caption="zero: share of integers; pruned: of them, not by rounding to nearest")
    table.add_column("layer", overflow="fold")
    packed = any(layer.packed_width is not None for layer in report.layers)
    more = ("width", "exceptions") if packed else ()
    for heading in ("bits/weight", "error", "zero", "pruned", "outlier columns", *more):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        snr = "" if layer.output_snr_db is None else f"{-layer.output_snr_db:.1f} dB"
        shares = (f"{layer.zero_share:.1%}", f"{layer.pruned_share:.1%}")
        outliers = str(layer.outlier_columns or "")
        figures = [f"{layer.bits_per_weight:.3f}", snr, *shares, outliers]
        if packed:
            known = layer.packed_width is not None
            figures += [f"{layer.packed_width:.2f}" if known else ""]
            figures += [f"{layer.packed_exceptions:.2%}" if known else ""]
        table.add_row(layer.name, *figures)
    console().print(table)
    for row in report.alphas:
        console().print(
            f"alpha {row['alpha']:.1f}: {row['entropy_bits']:.3f} bits, error {-row['output_snr_db']:.1f} dB, "
            f"cost {row['cost']:.3f} bits",
            highlight=False,
        )
    console().print(report.describe_coverage(), highlight=False)
    for layer in report.layers:
        if layer.fallback is not None:
            console().print(f"[yellow]{layer.name}[/]: {layer.fallback}", highlight=False)
    recipe = report.config["recipe"]
    if report.target_bits is not None and any(layer.recipe == recipe for layer in report.layers):
        gap = report.waterfilling_gap_bits
        console().print(
            f"{recipe}: {report.bits_per_weight(recipe):.3f} bits/weight in linear layers, target "
            f"{report.target_bits:.3f}" + ("" if gap is None else f", water-filling {-gap:+.2f}"),
            highlight=False,
        )


def summarize(reader: Any, *, with_entropy: bool = False) -> dict[str, Any]:
    """Sizes of a checkpoint's compressed tensors and their total, JSON-ready.

    Args:
        reader: an open ``CheckpointReader``.
        with_entropy: decode every tensor for its order-0 entropy.
    """
    from dcext import payload_info

    names = [name.removesuffix(".payload") for name in reader.names() if name.endswith(".payload")]
    rows = [_describe(reader, name, payload_info(reader.get(f"{name}.payload"))) for name in names]
    weights = sum(row["weights"] for row in rows)
    stored = sum(row["nbytes"] for row in rows)
    summary = {
        "bits_per_weight": 8 * stored / weights if weights else None,
        "ratio": weights / stored if stored else None,
        "nbytes": reader.nbytes,
        "weights": weights,
    }
    if with_entropy:
        _add_entropies(reader, rows, weights)
        summary["entropy"] = sum(row["entropy"] * row["weights"] for row in rows) / weights
    return {**summary, "tensors": rows}


def _describe(reader: Any, name: str, info: dict[str, Any]) -> dict[str, Any]:
    stored = info["nbytes"]
    for leaf in ("row_scale", "col_scale", "outlier_index", "outlier_weight"):
        if f"{name}.{leaf}" in reader:
            stored += reader.info(f"{name}.{leaf}").nbytes
    weights = info["shape"][0] * info["shape"][1]
    return {
        "name": name,
        "shape": list(info["shape"]),
        "codec": info["codec"],
        "level": info["level"],
        "weights": weights,
        "nbytes": stored,
        "bits_per_weight": 8 * stored / weights,
        "ratio": weights / stored,
    }


def _add_entropies(reader: Any, rows: list[dict[str, Any]], weights: int) -> None:
    from dcext import FormatError, decode, entropy

    with byte_progress("decoding", weights) as advance:
        for row in rows:
            name = f"{row['name']}.payload"
            try:
                row["entropy"] = entropy(decode(reader.get(name)))
            except FormatError as error:
                raise FormatError(f"{reader.info(name).file}: tensor {name!r}: {error}") from None
            advance(row["weights"])


def info(as_json: JsonOption = False) -> None:
    """Show the machine, what was built, and which instruction set is in use."""
    from dcext.build import build_info, machine_info

    described = {**machine_info(), **build_info()}
    if as_json:
        print_json(described)
        return
    table = Table(show_header=False)
    for key, value in described.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    console().print(table)
