"""Where the tests of Triton kernels run: in Triton's interpreter, on a GPU, or in a process of their own."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"


def version(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="requires a GPU, or TRITON_INTERPRET=1",
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="requires a GPU")


def requires_interpreter(test):
    """For a test that starts pytest with TRITON_INTERPRET=1."""
    is_interpreter = pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
    is_broken = pytest.mark.skipif(
        version("triton") < (3, 7) and version("numpy") >= (2, 4),
        reason="requires triton 3.7: the interpreter of 3.6 does not know numpy 2.4",
    )
    return is_interpreter(is_broken(test))


def run_in_interpreter(path: str) -> int:
    """A file of tests in a process of its own: triton reads TRITON_INTERPRET when it is imported.

    Returns:
        How many passed; none failed.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    return int(passed[1]) if passed else 0
