"""The rows of bench/generation.py, and what must be made before they can be measured."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import output_of

import fetch
import wiki_text
from whole import llama_files

SMOLLM2 = "SmolLM2-135M-Instruct"
DRAWN = "Llama 3B"
TINY = "tiny"
BASELINES = {
    "raw": "INT8 raw",
    "bfloat16": "bfloat16",
}  # names of the rows that others are compared with
INT8 = ("--recipe", "int8")
RATE = ("--ratio", "2.2")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: its table.
        name: its row.
        source: of what it runs: that of a torch worker's job, or ``{"compress": options}``, ``{"quantize": type}``.
        codec: of a row of dcext.
        integers: what a row of dcext holds; those of one model with the same hold the same, whatever their codec.
        compiled: whether torch.compile makes the steps.
        llama: whether llama.cpp runs it.
        note: what a reader must know.
    """

    model: str
    name: str
    source: dict[str, Any]
    codec: str | None = None
    integers: str | None = None
    compiled: bool = False
    llama: bool = False
    note: str = ""


def drawn_cases(shape: str) -> list[Case]:
    """A model of drawn weights.

    Nothing is compiled: at this size torch.compile gains less than 3 % of a token. What does gain is to compute in
    float32, because torch's attention for bfloat16 is slow for one token on CPUs without AMX.
    """

    def llama(kind: str) -> Case:
        return Case(shape, f"llama.cpp {kind}", {"quantize": kind}, llama=True)

    return [
        drawn_case(shape, "bfloat16", None),
        drawn_case(shape, "INT8 raw", "raw"),
        drawn_case(shape, "zstd", "zstd"),
        drawn_case(shape, "packed", "packed", "levels"),
        drawn_case(shape, "packed, float32", "packed", "levels", "float32"),
        llama("Q8_0"),
        llama("Q4_K_M"),
        llama("Q4_0"),
    ]


def drawn_case(
    shape: str,
    name: str,
    codec: str | None,
    integers: str = "normal",
    dtype: str = "bfloat16",
    compiled: bool = False,
) -> Case:
    """A row of dcext or torch; codec and integers as for ``drawn_model``, dtype of all that is not a weight."""
    source = {"shape": shape, "integers": integers, "codec": codec, "dtype": dtype}
    return Case(shape, name, source, codec, f"{integers} {dtype}" if codec else None, compiled)


def smoke_cases() -> list[Case]:
    """A tiny model, each kind of row once."""
    return [*drawn_cases(TINY), drawn_case(TINY, "INT8 raw, compiled", "raw", compiled=True)]


def smollm2_cases() -> list[Case]:
    """The real model."""
    gguf = str(fetch.smollm2_gguf())

    def case(name: str, options: tuple[str, ...], codec: str, **extra: Any) -> Case:
        source = {"compress": [*options, "--codec", codec]}
        # Recipe rate chooses others for another codec.
        integers = "INT8" if options == INT8 else None
        return Case(SMOLLM2, name, source, codec, integers, **extra)

    def llama(kind: str, note: str) -> Case:
        return Case(SMOLLM2, f"llama.cpp {kind}", {"quantize": kind}, llama=True, note=note)

    return [
        Case(SMOLLM2, "float32", {"gguf": gguf, "dtype": "float32"}),
        Case(SMOLLM2, "bfloat16", {"gguf": gguf, "dtype": "bfloat16"}),
        case("INT8 raw", INT8, "raw"),
        case("INT8 zstd", INT8, "zstd"),
        case("INT8 packed", INT8, "packed"),
        case("rate zstd", RATE, "zstd"),
        case("rate packed", (), "packed"),
        case("INT8 raw, compiled", INT8, "raw", compiled=True),
        case("rate packed, compiled", (), "packed", compiled=True),
        Case(SMOLLM2, "llama.cpp Q4_1", {"gguf": gguf}, llama=True, note="the file as shipped"),
        llama("Q8_0", "made from Q4_1"),
        llama("Q4_K_M", "made from Q4_1"),
    ]


def prepare(case: Case, folder: Path, fresh: bool) -> tuple[dict[str, Any], int | None]:
    """Makes the files that a case needs, unless they are there.

    Args:
        case: the row.
        folder: where they are kept.
        fresh: compress again: the code may have changed.

    Returns:
        The ``source`` of the worker's job, and the bytes on disk, None for a model that is not there.
    """
    if "compress" in case.source:
        path = _compressed(case.source["compress"], folder, fresh)
        return {"folder": str(path)}, sum(f.stat().st_size for f in path.iterdir())
    if "quantize" in case.source:
        path = _quantized(case, folder)
        return {"gguf": str(path)}, path.stat().st_size
    if case.llama:
        return case.source, Path(case.source["gguf"]).stat().st_size
    return case.source, None


def _compressed(options: list[str], folder: Path, fresh: bool) -> Path:
    path = folder / "-".join([SMOLLM2, *(option.lstrip("-") for option in options)])
    if fresh and path.exists():
        shutil.rmtree(path)
    if not path.exists():
        command = [sys.executable, "-c", "from dcext.cli.app import main; main()", "compress"]
        command += [str(fetch.smollm2_gguf()), "-o", str(path), *options]
        if "--recipe" not in options:
            command += ["--calibration", str(wiki_text.enwik8_text("calibration"))]
        output_of(command)
    return path


def _quantized(case: Case, folder: Path) -> Path:
    """A GGUF file of the type; drawn ones are written as Q8_0 and the others made from it."""
    kind = case.source["quantize"]
    path = folder / f"{case.model.replace(' ', '-')}-{kind}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path
    if case.model == SMOLLM2:
        source = fetch.smollm2_gguf()
    elif kind == "Q8_0":
        llama_files.write_drawn(path, case.model)
        return path
    else:
        source = _quantized(Case(case.model, "", {"quantize": "Q8_0"}), folder)
    llama_files.quantize(source, path, kind, len(os.sched_getaffinity(0)))
    return path
