"""The seek index beside libzstd and RFC 8878, in C++ under sanitizers: tests/fuzz/ says how."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

FUZZ = ROOT / "tests" / "fuzz"
CORPUS = FUZZ / "corpus"
NOT_AVAILABLE = 77  # build.py: no compiler, or none with sanitizers
NUM_FRAMES = 100_000

# Inputs that once failed: frames that were taken for corrupt, damaged indices that led out of the matrix, and a stream
# with bits left over, which libzstd decodes and RFC 8878 forbids. The last two would, without checks that mutations of
# other inputs seldom reach.
REGRESSIONS = {
    "empty-compressed-block": "indexed, failures 0",
    "empty-huffman-literals": "indexed, failures 0",
    "two-frames": "outside, failures 0",
    "row-overflow": "indexed, failures 1",
    "empty-matrix": "indexed, failures 1",
    "libzstd-leftover-bits": "corrupt, failures 0",
    "segment-below-payload": "indexed, failures 4",
    "incomplete-code": "indexed, failures 2",
}


@pytest.fixture(scope="module")
def seek_fuzz() -> Path:
    done = subprocess.run([sys.executable, FUZZ / "build.py"], capture_output=True, text=True)
    if done.returncode == NOT_AVAILABLE:
        pytest.skip(f"requires a C++ compiler with sanitizers: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def run(folder: Path, *command: object) -> str:
    """Output of the program, in a folder where it may leave an input that fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_random_frames_decode_as_by_libzstd(seek_fuzz: Path, tmp_path: Path):
    lines = run(tmp_path, seek_fuzz, "frames", "--count", NUM_FRAMES, "--seed", 1).splitlines()
    assert int(lines[-1].split()[0]) >= NUM_FRAMES
    counts = dict(line.split() for line in lines[:-1])
    assert len(counts) > 80
    assert all(int(count) > 0 for count in counts.values())


def test_mutated_frames_stay_in_bounds(seek_fuzz: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    shutil.copytree(CORPUS, corpus)
    output = run(tmp_path, seek_fuzz, "fuzz", "--seconds", 5, "--seed", 1, "--corpus", corpus)
    # All kinds of inputs were met; what must hold of each aborts the program, which run() sees.
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (\w+)", output.splitlines()[-1])
    }
    assert counts["runs"] >= 1000
    assert min(counts[word] for word in ("indexed", "outside", "corrupt", "damaged", "edges")) > 0


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_failed(seek_fuzz: Path, tmp_path: Path, name: str):
    output = run(tmp_path, seek_fuzz, "run", CORPUS / f"regression-{name}")
    assert output.strip().endswith(REGRESSIONS[name])
