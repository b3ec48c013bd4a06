"""Builds and runs ``tests/stream/device_stress.cpp``: the device stream on threads of a CPU, under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "third_party")]

from emulated_kernel import SANITIZERS, compiler  # noqa: E402

import fetch  # noqa: E402  (third_party/fetch.py)

BUILD = ROOT / "build" / "stream"
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer"]
FLAGS += ["-fno-sanitize-recover=all", "-pthread"]
SOURCES = {
    "runtime": ["device_slots", "device_stream", "host_link", "memory", "read_threads"],
    "codec": ["filter", "packed", "payload_decoder", "payload_encoder", "unpack", "zstd_frame"],
    "format": ["payload"],
    "base": ["checksum", "cpu_features", "status"],
}
SOURCES["runtime"] += ["thread_pool", "unit_copier", "weight_stream"]


def build(sanitizer: str, changed: Path | None = None) -> Path:
    """The program, of which only what is out of date is compiled again.

    Args:
        sanitizer: one of ``emulated_kernel.SANITIZERS``.
        changed: a source that replaces the one of its name; the program is put beside it.
    """
    third_party = sorted((ROOT / "build" / "temp" / "third_party").glob("*.o"))
    if not third_party:
        pytest.skip("requires libzstd's objects in build/temp/third_party (make build)")
    folder = BUILD / f"device_{sanitizer}"
    folder.mkdir(parents=True, exist_ok=True)
    program = (changed.parent if changed else folder) / "device_stress"
    sources = [
        ROOT / "csrc" / room / f"{name}.cpp" for room, names in SOURCES.items() for name in names
    ]
    here = ROOT / "tests" / "stream"
    sources += [ROOT / "csrc" / "cuda" / "cuda_link.cu", here / "cudart.cpp"]
    sources.append(here / "device_stress.cpp")
    command = [compiler(), *FLAGS, f"-fsanitize={SANITIZERS[sanitizer]}"]
    headers = [
        *(ROOT / "csrc").rglob("*.h"),
        *here.rglob("*.h"),
        Path(__file__),
    ]
    newest = max(path.stat().st_mtime for path in headers)
    includes = [here / "cudart", here, ROOT / "csrc", fetch.zstd_lib_dir(), fetch.xxhash_dir()]
    objects = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        if changed is not None and source.name == changed.name:
            source, target = changed, changed.with_suffix(".o")
        objects.append(target)
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        partial = target.with_suffix(".partial")
        flags = [*(f"-I{path}" for path in includes), "-x", "c++"]
        _run([*command, *flags, "-c", str(source), "-o", str(partial)])
        partial.replace(target)
    inputs = [*objects, *third_party]
    if not program.exists() or program.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
        # libzstd's assembly does not say that it needs no executable stack
        _run([*command, *map(str, inputs), "-Wl,-z,noexecstack", "-o", str(program)])
    return program


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def run(
    program: Path, mode: str, rounds: int, steps: int, seed: int, link: str = "host"
) -> dict[str, int]:
    """The counts that the program prints.

    Raises:
        AssertionError: it or the sanitizer has found something.
    """
    command = [str(program), mode, str(rounds), str(steps), str(seed), link]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr or f"exit status {result.returncode}"
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", result.stdout)}


if __name__ == "__main__":
    print(build(sys.argv[1]))
