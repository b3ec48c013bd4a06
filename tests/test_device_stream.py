"""Units that travel to a device ahead of their use: under sanitizers, and as the operators that layers use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from emulated_kernel import SANITIZERS, require_sanitizer

sys.path.insert(0, str(Path(__file__).parent / "stream"))

import device_program  # noqa: E402  (tests/stream/device_program.py)


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request) -> Path:
    require_sanitizer(request.param)
    return device_program.build(request.param)


def test_kernels_see_their_units(program: Path):
    counts = device_program.run(program, "eager", rounds=60, steps=400, seed=1)
    # Otherwise the test would not show what it is for.
    assert counts["kernels"] > 10_000
    assert counts["hits"] > 1000
    assert counts["late"] > 0
    assert counts["failures"] > 0
    assert counts["closes"] > 0


def test_captured_kernels_see_their_units(program: Path):
    counts = device_program.run(program, "captures", rounds=20, steps=200, seed=1)
    assert counts["replays"] > 100
    assert counts["kernels"] > counts["begins"]
    assert counts["hits"] > 0


def test_the_expected_order_is_copied_ahead(program: Path):
    counts = device_program.run(program, "exact", rounds=20, steps=200, seed=1)
    assert counts["hits"] == counts["begins"] - 20
