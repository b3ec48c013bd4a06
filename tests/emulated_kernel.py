"""Builds and runs ``tests/emulated/``: the CUDA kernel's own file on threads of a CPU, under sanitizers."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sanitized
from conftest import ROOT
from sanitized import SANITIZERS as SANITIZERS

BUILD = ROOT / "build" / "emulated"


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


def require_sanitizer(sanitizer: str) -> None:
    """Skips where the compiler or the machine has none."""
    if what := sanitized.missing(BUILD, sanitizer):
        pytest.skip(f"requires {what}")


def build(sanitizer: str, changed: Path | None = None) -> Path:
    """The program, compiled again only where a source is newer.

    Args:
        sanitizer: one of ``SANITIZERS``.
        changed: a folder whose files replace those of ``csrc``; the program is put there.
    """
    program = (changed or BUILD) / f"decode_indexed_{sanitizer}"
    emulated = ROOT / "tests" / "emulated"
    include_dirs = [path for path in (changed, emulated, ROOT / "csrc") if path is not None]
    return sanitized.build(program, [emulated / "decode_indexed.cpp"], include_dirs, sanitizer)


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
