"""What the decode kernel takes of a multiprocessor, as its header says; ptxas tells, with no GPU."""

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

CSRC = ROOT / "csrc"
SHARED_NBYTES = 16 << 10
THREADS, REGISTERS = 128, 64


def number(report: str, pattern: str) -> int:
    found = re.search(pattern, report)
    assert found is not None, report
    return int(found[1])


@pytest.fixture(scope="module", params=["80", "90", "100", "120"])
def report(request: pytest.FixtureRequest, nvcc: str, tmp_path_factory) -> str:
    output: Path = tmp_path_factory.mktemp("cubin") / "kernel.cubin"
    command = [nvcc, "-cubin", "-O3", "--fmad=false", "-std=c++17", f"-arch=sm_{request.param}"]
    command += ["-Xptxas", "-v", f"-I{CSRC}", str(CSRC / "cuda" / "decode_indexed.cu")]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Used ") == 1  # one kernel
    return result.stderr


def test_nothing_is_in_local_memory(report: str):
    for what in ("stack frame", "spill stores", "spill loads"):
        assert number(report, rf"(\d+) bytes {what}") == 0


def test_eight_blocks_fit(report: str):
    """By registers everywhere, and by shared memory where an SM has 128 KiB or more of it."""
    assert number(report, r"Used (\d+) registers") <= REGISTERS
    assert 8 * REGISTERS * THREADS <= 65536
    assert number(report, r"(\d+) bytes smem") <= SHARED_NBYTES - 1024  # of which CUDA takes 1 KiB
