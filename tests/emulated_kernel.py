"""Builds and runs ``tests/emulated/``: the CUDA kernel's own file on threads of a CPU, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

SANITIZERS = {"thread": "thread", "address": "address,undefined"}
BUILD = ROOT / "build" / "emulated"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-strict-aliasing", "-fno-sanitize-recover=all", "-pthread"]


@dataclass
class Job:
    """A matrix to decode: everything that the kernel is given of it."""

    payload: Tensor
    index: Tensor
    shape: tuple[int, int]


@dataclass
class Launch:
    jobs: list[Job]
    failures: int = 0
    outs: list[Tensor] = field(default_factory=list)


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("requires a C++ compiler")
    return found


def require_sanitizer(sanitizer: str) -> None:
    """Skips where the compiler or the machine has none: a program of one line tells."""
    probe = BUILD / f"probe_{sanitizer}"
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [
        compiler(),
        f"-fsanitize={SANITIZERS[sanitizer]}",
        "-x",
        "c++",
        "-",
        "-o",
        str(probe),
    ]
    built = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    if built.returncode != 0 or subprocess.run([probe], capture_output=True).returncode != 0:
        pytest.skip(f"requires a compiler and a machine with -fsanitize={SANITIZERS[sanitizer]}")


def build(sanitizer: str, changed: Path | None = None) -> Path:
    """The program, compiled again only where a source is newer.

    Args:
        sanitizer: one of ``SANITIZERS``.
        changed: a folder whose files replace those of ``csrc``; the program is put there.
    """
    program = (changed or BUILD) / f"decode_indexed_{sanitizer}"
    emulated, csrc = ROOT / "tests" / "emulated", ROOT / "csrc"
    sources = [*emulated.iterdir(), *csrc.rglob("*.h"), *csrc.rglob("*.cuh")]
    newest = max(path.stat().st_mtime for path in sources)
    if program.exists() and program.stat().st_mtime > newest:
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    partial = program.with_suffix(".partial")
    command = [compiler(), *FLAGS, f"-fsanitize={SANITIZERS[sanitizer]}"]
    command += [f"-I{path}" for path in (changed, emulated, csrc) if path is not None]
    command.append(str(emulated / "decode_indexed.cpp"))
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    partial.replace(program)
    return program


def _numbers(*values: int) -> bytes:
    return np.array(values, dtype=np.int64).tobytes()


def write_jobs(path: Path, launches: list[Launch]) -> None:
    with path.open("wb") as file:
        file.write(_numbers(len(launches)))
        for launch in launches:
            file.write(_numbers(len(launch.jobs)))
            for job in launch.jobs:
                file.write(_numbers(*job.shape, job.payload.numel(), job.index.shape[0]))
                file.write(job.payload.numpy().tobytes() + job.index.numpy().tobytes())


def read_results(path: Path, launches: list[Launch]) -> None:
    """Fills in what each launch reported and wrote."""
    with path.open("rb") as file:
        for launch in launches:
            launch.failures = int.from_bytes(file.read(8), "little")
            launch.outs = []
            for job in launch.jobs:
                data = bytearray(file.read(job.shape[0] * job.shape[1]))
                launch.outs.append(torch.frombuffer(data, dtype=torch.int8).reshape(job.shape))


def run(program: Path, folder: Path, launches: list[Launch], *arguments: str) -> str:
    """Runs all launches; returns what the sanitizer has to say, "" where all is well."""
    jobs, results = folder / "jobs", folder / "results"
    write_jobs(jobs, launches)
    environment = {**os.environ, "ASAN_OPTIONS": "redzone=2048", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), str(jobs), str(results), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if result.returncode != 0:
        return result.stderr or f"exit status {result.returncode}"
    read_results(results, launches)
    return ""
