"""Builds and runs ``tests/device/device_stress.cpp``: the device stream on threads of a CPU, under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "third_party")]

import fetch  # noqa: E402  (third_party/fetch.py)
from sanitized import compile_one, compiler, flags_of, link, num_jobs  # noqa: E402

BUILD = ROOT / "build" / "device"
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
        sanitizer: one of ``sanitized.SANITIZERS``.
        changed: a source that replaces the one of its name; the program is put beside it.
    """
    third_party = sorted((ROOT / "build" / "temp" / "third_party").glob("*.o"))
    if not third_party:
        pytest.skip("requires libzstd's objects in build/temp/third_party (make build)")
    folder = BUILD / f"device_{sanitizer}"
    folder.mkdir(parents=True, exist_ok=True)
    here, csrc = ROOT / "tests" / "device", ROOT / "csrc"
    sources = [csrc / room / f"{name}.cpp" for room, names in SOURCES.items() for name in names]
    sources += [csrc / "cuda" / "cuda_link.cu", here / "cudart.cpp", here / "device_stress.cpp"]
    includes = [here / "cudart", here, csrc, fetch.zstd_lib_dir(), fetch.xxhash_dir()]
    command = [*compiler(), *flags_of(sanitizer)]
    compile_command = [*command, *(f"-I{path}" for path in includes), "-x", "c++"]

    def compile_source(source: Path) -> Path:
        if changed is not None and source.name == changed.name:
            return compile_one(changed, changed.with_suffix(".o"), compile_command)
        return compile_one(source, folder / f"{source.stem}.o", compile_command, Path(__file__))

    with ThreadPoolExecutor(num_jobs()) as pool:
        objects = list(pool.map(compile_source, sources))
    program = (changed.parent if changed else folder) / "device_stress"
    # libzstd's assembly does not say that it needs no executable stack
    return link(program, [*objects, *third_party], [*command, "-Wl,-z,noexecstack"])


def run(
    program: Path, mode: str, rounds: int, steps: int, seed: int, over: str = "host"
) -> dict[str, int]:
    """The counts that the program prints.

    Raises:
        AssertionError: it or the sanitizer has found something.
    """
    command = [str(program), mode, str(rounds), str(steps), str(seed), over]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr or f"exit status {result.returncode}"
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", result.stdout)}


if __name__ == "__main__":
    print(build(sys.argv[1]))
