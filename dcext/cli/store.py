"""Commands that write and check folders: compress, verify, decompress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dcext.cli.output import JsonOption, OutFolder, byte_progress, console, print_json


def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, .gguf file, or name on the Hugging Face hub."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="How weights become integers: int8.")] = "int8",
    granularity: Annotated[
        str,
        typer.Option(
            help="One scale per output row (most accurate) or per tensor (smaller): row, tensor."
        ),
    ] = "row",
    codec: Annotated[str, typer.Option(help="auto, raw or zstd.")] = "auto",
    level: Annotated[
        int | None, typer.Option(help="Zstandard level 1 to 22; the default codes literals only.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="int8 (quantized per token, W8A8) or none (W8A16).")
    ] = "int8",
    dtype: Annotated[
        str, typer.Option(help="Load MODEL in this dtype: auto, float32, bfloat16, float16.")
    ] = "auto",
    max_shard_gb: Annotated[float, typer.Option(help="Size of a shard, in GB (1e9 bytes).")] = 5.0,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model into a folder: all of it, or nothing."""
    import dcext
    from dcext.compress import compressible_modules
    from dcext.format.writer import check_target
    from dcext.hub import DTYPES, load_float_model

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    config = dcext.CompressionConfig(
        recipe=recipe, granularity=granularity, codec=codec, level=level, activations=activations
    )
    check_target(output.absolute(), overwrite)
    begin = time.perf_counter()
    float_model, tokenizer = load_float_model(model, dtype)
    weights = sum(module.weight.numel() for module in compressible_modules(float_model).values())
    with byte_progress("compressing", weights) as advance:
        dcext.compress_(float_model, config, progress=lambda name, count: advance(count))
    tensors = float_model.state_dict().values()
    total = sum(
        {tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()
    )  # shared ones once
    with byte_progress("writing", total) as advance:
        dcext.save_pretrained(
            float_model,
            output,
            tokenizer,
            config=config,
            max_shard_nbytes=int(max_shard_gb * 1e9),
            overwrite=overwrite,
            progress=advance,
        )
    _report_compressed(output, time.perf_counter() - begin, as_json)


def _report_compressed(output: Path, seconds: float, as_json: bool) -> None:
    from dcext.cli.report import summarize
    from dcext.format import CheckpointReader

    reader = CheckpointReader(output)
    summary = {**summarize(reader), "seconds": seconds, "output": str(output)}
    if as_json:
        print_json(summary)
        return
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
    """Unpack to plain INT8 safetensors: N.weight (int8) and N.row_scale instead of N.payload."""
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
            max_shard_nbytes=int(max_shard_gb * 1e9),
            overwrite=overwrite,
            progress=advance,
        )
    nbytes = CheckpointReader(output).nbytes
    if as_json:
        print_json({"output": str(output), "nbytes": nbytes, "tensors": len(tensors)})
        return
    console().print(f"{output}: {len(tensors)} tensors, {nbytes / 1e6:.1f} MB", soft_wrap=True)
