"""The weight stream used in all ways, in C++ under sanitizers: tests/stream/ says how. ``make stress`` runs more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

NOT_AVAILABLE = 77  # build.py: no compiler, or none with that sanitizer
# Steps that take some 10 s on two cores.
STEPS = {"thread": 12_000, "address": 15_000}


def program(sanitizer: str) -> Path:
    command = [sys.executable, ROOT / "tests" / "stream" / "build.py", sanitizer]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NOT_AVAILABLE:
        pytest.skip(f"requires {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def run(folder: Path, *command: object) -> str:
    """Output of the program, in a folder for the file that it reads."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    words = [str(part) for part in command]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("sanitizer", STEPS)
def test_all_bytes_arrive_whatever_happens(tmp_path: Path, sanitizer: str):
    output = run(tmp_path, program(sanitizer), "--steps", STEPS[sanitizer], "--seed", 1)
    # What must hold ends the program, which run() sees; all kinds of events were met.
    counts = json.loads(output)
    assert counts["steps"] >= STEPS[sanitizer]
    assert min(counts.values()) > 0
    assert counts["read_bytes"] == counts["used_bytes"] + counts["dropped_bytes"]


@pytest.mark.parametrize("sanitizer", STEPS)
def test_who_waits_gets_the_slots_of_who_does_not(tmp_path: Path, sanitizer: str):
    # A case that stops for ever ends the program, which run() sees.
    assert run(tmp_path, program(sanitizer), "cases") == "8 cases\n"


@pytest.mark.parametrize("sanitizer", ["none", "address"])
def test_changed_files_are_noticed(tmp_path: Path, sanitizer: str):
    output = run(tmp_path, program(sanitizer), "files", tmp_path)
    assert re.fullmatch(r"bypassed: (not )?direct\nkept: not direct\n", output)


def test_files_in_memory_are_read(tmp_path: Path):
    """tmpfs has O_DIRECT only in kernels from 6.6 on."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("requires /dev/shm")
    folder = shared / f"dcext-stream-stress-{os.getpid()}"
    folder.mkdir()
    try:
        output = run(tmp_path, program("none"), "files", folder)
    finally:
        folder.rmdir()
    assert output.startswith("bypassed: ")


def test_idle_stream_takes_no_cpu_time(tmp_path: Path):
    # ThreadSanitizer has a thread of its own, which is not idle.
    output = run(tmp_path, program("none"), "idle")
    assert len(output.splitlines()) == 3
