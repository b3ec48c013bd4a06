"""Benchmarks run, and verify what they time; their figures are not looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize(
    ("script", "package", "heading"),
    [("bench_codec.py", "zipnn", "decode"), ("bench_layers.py", "torch", "layer forward")],
)
def test_smoke(script, package, heading):
    pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_files=bench_*.py",
    ]
    command += ["--benchmark-enable", str(ROOT / "bench" / script)]
    environment = {**os.environ, "DCEXT_BENCH_SMOKE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert f"\n{heading}\n" in result.stdout
    assert " x\n" in result.stdout
    assert "zstd 1.5.7" in result.stdout
