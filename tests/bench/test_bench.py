"""Benchmarks run, and verify what they time; their figures are not looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize(
    ("script", "packages", "heading"),
    [
        ("bench_codec.py", ("zstandard", "blosc2", "zipnn"), "decode"),
        ("bench_layers.py", (), "layer forward"),
    ],
)
def test_smoke(script, packages, heading, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "python_files=bench_*.py", "--benchmark-enable", "--benchmark-quiet"]
    command += [str(ROOT / "bench" / script)]
    # Within a worker of xdist nothing would be timed.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment = {**own, "DCEXT_BENCH_SMOKE": "1", "DCEXT_BENCH_OUTPUT": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"\n{heading}\n" in result.stdout
    assert "\nratios of speeds\n" in result.stdout
    assert "zstd 1.5.7" in result.stdout
    assert not list(tmp_path.iterdir()), "figures of a smoke run are not kept"
