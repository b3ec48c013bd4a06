"""The CUDA sources compile without a warning for every architecture that we name, with no GPU and no torch."""

import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "90", "100", "120")
SOURCES = sorted(CSRC.rglob("*.cu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings(nvcc, tmp_path: Path, source: Path, architecture: str):
    command = [nvcc, "-c", "-O3", "--fmad=false", "-std=c++17", f"-arch=sm_{architecture}"]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", f"-I{CSRC}"]
    command += [str(source), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


@pytest.mark.parametrize("path", sorted(CSRC.glob("cuda/*")), ids=lambda path: path.name)
def test_kernels_do_not_see_torch(path: Path):
    text = path.read_text()
    for folder in ("torch/", "ATen/", "c10/", "pybind11/"):
        assert f"#include <{folder}" not in text
