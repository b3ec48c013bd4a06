"""Builds ``build/fuzz/seek_fuzz``: the seek index and what tests it, with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/fuzz/build.py

Prints the program's path. Compiles only what is out of date; libzstd comes from the objects that setup.py has left in
``build/temp``. Exit status 77: there is no compiler, or it has no sanitizers.

Environment:
    CXX: compiler, by default ``c++``.
    MAX_JOBS: parallel compilations, by default the number of CPUs this process may use.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "third_party"), str(ROOT / "tests")]

import fetch  # noqa: E402  (third_party/fetch.py)
from sanitized import alone, compile_one, compiler, link, num_jobs  # noqa: E402  (tests/sanitized.py)

OUT = ROOT / "build" / "fuzz"
PROGRAM = OUT / "seek_fuzz"
NOT_AVAILABLE = 77  # as automake's tests say that they were skipped
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O2", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", *SANITIZE]
# Fuzzing is guided by what these do.
COVERED = ["codec/seek_index", "codec/seek_decode"]
OTHERS = [
    "codec/filter",
    "codec/packed",
    "codec/payload_decoder",
    "codec/unpack",
    "codec/zstd_frame",
    "format/payload",
    "base/checksum",
    "base/cpu_features",
    "base/status",
]


def missing_tools() -> str | None:
    """What is missing, or None where a program with sanitizers can be built and runs."""
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler ({compiler()[0]})"
    probe = OUT / "probe"
    if probe.exists():
        return None
    probe_source = OUT / "probe.cpp"
    probe_source.write_text("int main() { return 0; }\n")
    command = [*compiler(), *FLAGS, "-fsanitize-coverage=trace-pc", "-c", str(probe_source)]
    steps = [
        [*command, "-o", str(OUT / "probe.o")],
        [*compiler(), *SANITIZE, str(probe_source), "-o", str(probe)],
        [str(probe)],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode != 0:
            probe.unlink(missing_ok=True)
            return f"no sanitizers: {(done.stderr or done.stdout).strip()[:300]}"
    return None


def compile_source(source: Path, extra: list[str]) -> Path:
    include_dirs = [ROOT / "csrc", source.parent, fetch.zstd_lib_dir(), fetch.xxhash_dir()]
    command = [*compiler(), *FLAGS, *extra, *(f"-I{path}" for path in include_dirs)]
    return compile_one(source, OUT / f"{source.stem}.o", command, Path(__file__))


def build() -> Path:
    third_party = sorted((ROOT / "build" / "temp" / "third_party").glob("*.o"))
    if not third_party:
        raise SystemExit("expected libzstd's objects in build/temp/third_party; run make build")
    sources = [
        (ROOT / "csrc" / f"{name}.cpp", ["-fsanitize-coverage=trace-pc"]) for name in COVERED
    ]
    sources += [(ROOT / "csrc" / f"{name}.cpp", []) for name in OTHERS]
    sources += [(path, []) for path in sorted(Path(__file__).parent.glob("*.cpp"))]
    with ThreadPoolExecutor(num_jobs()) as pool:
        objects = list(pool.map(lambda item: compile_source(*item), sources))
    # libzstd's assembly does not say that it needs no executable stack
    command = [*compiler(), *SANITIZE, "-pthread", "-Wl,-z,noexecstack"]
    return link(PROGRAM, [*objects, *third_party], command)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    with alone(OUT / "probe"):
        missing = missing_tools()
    if missing:
        print(missing)
        sys.exit(NOT_AVAILABLE)
    try:
        print(build())
    except subprocess.CalledProcessError as error:  # the compiler has said why
        sys.exit(error.returncode)
