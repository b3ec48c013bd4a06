"""Commands that write and check folders: compress, verify, decompress."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dcext.cli.inputs import read_text, to_nbytes
from dcext.cli.output import (
    JsonOption,
    OutFolder,
    byte_progress,
    console,
    print_json,
    share_progress,
)
from dcext.quantize.recipe import recipe_named, recipes


def _recipe_help() -> str:
    """All recipes that are registered when the command line is imported."""
    texts = []
    for recipe in recipes():
        notes = [recipe.note] * bool(recipe.note) + ["needs --calibration"] * recipe.calibrated
        texts.append(recipe.name + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(texts) + "."


def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, .gguf file, or name on the Hugging Face hub."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    recipe: Annotated[
        str,
        typer.Option(help=_recipe_help()),
    ] = "rate",
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text like what the model will read; 200 KB or more.")
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens to calibrate on, spread over the text.", min=64)
    ] = 49152,
    context: Annotated[int, typer.Option(help="Tokens of a calibration window.", min=8)] = 512,
    bits: Annotated[
        float | None,
        typer.Option(help="Stored bits per weight of linear layers (rate, data-free)."),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="The same as a ratio over INT8; 2.2 unless told otherwise.")
    ] = None,
    size_mb: Annotated[
        float | None, typer.Option(help="The same as the size of the whole folder, in MB (1e6).")
    ] = None,
    alpha: Annotated[
        str, typer.Option(help="Recipe paper: 0 to 1, or model or layer to search for it.")
    ] = "model",
    sparsity: Annotated[
        float, typer.Option(help="Recipe paper: share of weights that become zero.")
    ] = 0.0,
    granularity: Annotated[
        str,
        typer.Option(
            help="Recipe int8: one scale per output row (most accurate) or per tensor (smaller)."
        ),
    ] = "",
    codec: Annotated[
        str,
        typer.Option(help="auto, raw, zstd (smallest) or packed (fast at one token at a time)."),
    ] = "auto",
    level: Annotated[
        int | None, typer.Option(help="Zstandard level 1 to 22; the default codes literals only.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="int8 (quantized per token, W8A8) or none (W8A16).")
    ] = "int8",
    include: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Compress only layers in whose name this is found."),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Leave layers float in whose name this is found."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what recipe rate draws.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Load MODEL in this dtype: auto, float32, bfloat16, float16.")
    ] = "auto",
    low_memory: Annotated[
        bool | None,
        typer.Option(
            help="Read weights block by block from safetensors; by itself where the model fills half the memory."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also plot bits and error over depth to this PNG.")
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(help="Size of a shard, in GB (1e9 bytes).")] = 5.0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model into a folder: all of it, or nothing.

    A calibrated run that is interrupted goes on where it was when the same command is given again.
    """
    import dcext
    from dcext.calibrate.resume import remove_resume_folder
    from dcext.format.writer import check_target
    from dcext.hub import DTYPES
    from dcext.plots.figure import check_plot

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    config = dcext.CompressionConfig(
        recipe=recipe,
        target_bits=bits,
        target_ratio=ratio,
        target_nbytes=None if size_mb is None else to_nbytes("--size-mb", size_mb, 1e6),
        alpha=alpha if alpha in ("model", "layer") else _number("--alpha", alpha),
        sparsity=sparsity,
        granularity=granularity,
        codec=codec,
        level=level,
        activations=activations,
        seed=seed,
    )
    _check_calibration(recipe, calibration)
    shard_nbytes = to_nbytes("--max-shard-gb", max_shard_gb, 1e9)
    if plot is not None:
        check_plot(plot)
    check_target(output.absolute(), overwrite)
    begin = time.perf_counter()
    needs_text = calibration is not None
    float_model, tokenizer, source = _load_float(model, dtype, low_memory, needs_text)
    windows = None
    if calibration is not None:
        windows = _windows(float_model, tokenizer, calibration, calibration_tokens, context)
    config = _less_side_files(config, float_model, tokenizer)
    resume = output.absolute().parent / f".{output.name}.dcext-resume"
    with share_progress("compressing") as advance:
        dcext.compress_(
            float_model,
            config,
            windows,
            include=include,
            exclude=exclude,
            progress=advance,
            resume_dir=resume,
            source=source,
        )
    _save(float_model, output, tokenizer, config, shard_nbytes, overwrite)
    remove_resume_folder(resume)
    report = float_model.dcext_report
    if plot is not None:
        from dcext.plots.compression import plot_compression

        plot_compression(report, plot)
    _report_compressed(output, report, time.perf_counter() - begin, as_json)


def _less_side_files(config: Any, model: Any, tokenizer: Any) -> Any:
    """The configuration with what tokenizer, configuration and headers take away from a target in bytes."""
    from dcext.pretrained import side_nbytes

    if config.target_nbytes is None:
        return config
    side = side_nbytes(model, tokenizer)
    if config.target_nbytes <= side:
        raise ValueError(
            f"--size-mb: expected more than {side / 1e6:.3f}, for tokenizer and config, got {config.target_nbytes / 1e6:g}"
        )
    return replace(config, target_nbytes=config.target_nbytes - side)


def _windows(model: Any, tokenizer: Any, calibration: Path, tokens: int, context: int) -> Any:
    """Calibration windows of a text, for a model that reads tokens."""
    import inspect

    from dcext.calibrate.text import text_windows

    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"--calibration: expected a model that reads text, got {type(model).__name__}; choose --recipe data-free, or "
            "calibrate in Python: dcext.compress_(model, config, {argument: tensor, ..})"
        )
    text = read_text("--calibration", calibration)
    reader = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    try:
        return text_windows(reader, text, tokens=tokens, context=context)
    except ValueError as error:
        raise ValueError(f"{error} (--calibration-tokens)") from None


def _number(option: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{option}: expected a number, model or layer, got {value!r}") from None


def _check_calibration(recipe: str, calibration: Path | None) -> None:
    is_calibrated = recipe_named(recipe).calibrated
    if is_calibrated and calibration is None:
        others = " or ".join(each.name for each in recipes() if not each.calibrated)
        raise ValueError(
            f"--calibration: expected a text file for --recipe {recipe}, got none; "
            f"give one, or choose --recipe {others}"
        )
    if not is_calibrated and calibration is not None:
        raise ValueError(
            f"--calibration: expected none for --recipe {recipe}, got {str(calibration)!r}"
        )
    if calibration is not None:
        read_text("--calibration", calibration, most_chars=1 << 16)


def _load_float(
    model: str, dtype: str, low_memory: bool | None, needs_tokenizer: bool
) -> tuple[Any, Any, Any]:
    import os

    from dcext.hub import load_float_model, load_lazy_model, weights_nbytes

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if low_memory is None:
        low_memory = dtype == "auto" and weights_nbytes(model) > memory / 2
    loaded: tuple[Any, Any, Any]
    if low_memory:
        if dtype != "auto":
            raise ValueError(f"--low-memory: expected --dtype auto, got {dtype!r}")
        loaded = load_lazy_model(model, needs_tokenizer=needs_tokenizer)
    else:
        loaded = (*load_float_model(model, dtype, needs_tokenizer=needs_tokenizer), None)
    reason = "none found" if loaded[1] is None else getattr(loaded[1], "reason", None)
    if reason is not None:
        typer.echo(f"tokenizer: not loaded, stored as it is: {reason}", err=True)
    return loaded


def _save(
    model: Any, output: Path, tokenizer: Any, config: Any, max_shard_nbytes: int, overwrite: bool
) -> None:
    import dcext

    tensors = model.state_dict().values()
    total = sum({t.data_ptr(): t.nbytes for t in tensors}.values())  # shared ones once
    with byte_progress("writing", total) as advance:
        dcext.save_pretrained(
            model,
            output,
            tokenizer,
            config=config,
            max_shard_nbytes=max_shard_nbytes,
            overwrite=overwrite,
            progress=advance,
        )


def _report_compressed(output: Path, report: Any, seconds: float, as_json: bool) -> None:
    from dcext.cli.report import show_layers, summarize
    from dcext.format import CheckpointReader

    reader = CheckpointReader(output)
    summary = {**summarize(reader), "seconds": seconds, "output": str(output)}
    if as_json:
        print_json({**summary, "report": report.to_dict()})
        return
    show_layers(report)
    console().print(
        f"{output}: {summary['nbytes'] / 1e6:.1f} MB on disk, {summary['bits_per_weight']:.3f} bits/weight, "
        f"ratio {summary['ratio']:.2f} over INT8, {seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def verify(folder: OutFolder, as_json: JsonOption = False) -> None:
    """Check every byte of a folder against its checksums, and decode every weight."""
    import dcext
    from dcext.format import CheckpointReader

    reader = CheckpointReader(folder)
    payloads = [name for name in reader.names() if name.endswith(".payload")]
    with byte_progress("checksums", reader.tensor_nbytes) as advance:
        reader.verify_all(advance)
    weights = sum(_num_weights(reader, name) for name in payloads)
    with byte_progress("decoding", weights) as advance:
        for name in payloads:
            try:
                advance(dcext.decode(reader.get(name)).numel())
            except dcext.FormatError as error:
                raise dcext.FormatError(
                    f"{reader.info(name).file}: tensor {name!r}: {error}"
                ) from None
    result = {
        "ok": True,
        "files": len(reader.file_names) + 1,
        "nbytes": reader.nbytes,
        "weights": weights,
    }
    if as_json:
        print_json(result)
        return
    console().print(
        f"{folder}: every byte of {result['files']} files verified ({reader.nbytes / 1e6:.1f} MB), "
        f"{weights / 1e6:.1f} M weights decoded",
        highlight=False,
        soft_wrap=True,
    )


def _num_weights(reader: object, name: str) -> int:
    from dcext import payload_info

    rows, cols = payload_info(reader.get(name))["shape"]  # type: ignore[attr-defined]
    return rows * cols


def decompress(
    folder: OutFolder,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    max_shard_gb: Annotated[float, typer.Option(help="Size of a shard, in GB (1e9 bytes).")] = 5.0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Unpack to plain INT8 safetensors: N.weight (int8) instead of N.payload; scales and the rest stay."""
    import dcext
    from dcext.format import CheckpointReader, write_checkpoint
    from dcext.format.manifest import INDEX_NAME

    reader = CheckpointReader(folder)
    with byte_progress("checksums", reader.tensor_nbytes) as advance:
        reader.verify_all(advance)
    tensors = {}
    payloads = [name for name in reader.names() if name.endswith(".payload")]
    with byte_progress("decoding", sum(_num_weights(reader, name) for name in payloads)) as advance:
        for name in reader.names():
            tensor = reader.get(name)
            if name in payloads:
                tensor, name = dcext.decode(tensor), name.removesuffix(".payload") + ".weight"
                advance(tensor.numel())
            tensors[name] = tensor
    files = reader.read_files()
    files.pop(INDEX_NAME, None)
    with byte_progress("writing", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        write_checkpoint(
            output,
            tensors,
            files,
            max_shard_nbytes=to_nbytes("--max-shard-gb", max_shard_gb, 1e9),
            overwrite=overwrite,
            progress=advance,
        )
    nbytes = CheckpointReader(output).nbytes
    if as_json:
        print_json({"output": str(output), "nbytes": nbytes, "tensors": len(tensors)})
        return
    console().print(f"{output}: {len(tensors)} tensors, {nbytes / 1e6:.1f} MB", soft_wrap=True)
