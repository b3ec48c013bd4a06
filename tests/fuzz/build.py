"""Builds ``build/fuzz/seek_fuzz``: the seek index and what tests it, with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/fuzz/build.py

Prints the program's path. Compiles only what is out of date; libzstd comes from the objects that setup.py has left in
``build/temp``. Exit status 77: there is no compiler, or it has no sanitizers.

Environment:
    CXX: compiler, by default ``c++``.
    MAX_JOBS: parallel compilations, by default the number of CPUs this process may use.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "third_party"))

import fetch  # noqa: E402  (third_party/fetch.py)

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


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def missing_tools() -> str | None:
    """What is missing, or None where a program with sanitizers can be built and runs."""
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler ({compiler()[0]})"
    OUT.mkdir(parents=True, exist_ok=True)
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


def is_current(target: Path, source: Path) -> bool:
    """Whether an object is newer than all it was compiled from, which the compiler has listed beside it."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    files = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    newest = [Path(name) for name in [*files, __file__]]
    return source in newest and all(
        p.exists() and p.stat().st_mtime < target.stat().st_mtime for p in newest
    )


def compile_one(source: Path, extra: list[str]) -> Path:
    target = OUT / f"{source.stem}.o"
    if not is_current(target, source):
        include_dirs = [ROOT / "csrc", source.parent, fetch.zstd_lib_dir(), fetch.xxhash_dir()]
        includes = [f"-I{path}" for path in include_dirs]
        partial = target.with_suffix(".partial")
        command = [*compiler(), *FLAGS, *extra, *includes, "-MMD", "-MF", target.with_suffix(".d")]
        subprocess.run([*command, "-c", source, "-o", partial], check=True)
        partial.rename(target)
    return target


def build() -> Path:
    third_party = sorted((ROOT / "build" / "temp" / "third_party").glob("*.o"))
    if not third_party:
        raise SystemExit("expected libzstd's objects in build/temp/third_party; run make build")
    sources = [
        (ROOT / "csrc" / f"{name}.cpp", ["-fsanitize-coverage=trace-pc"]) for name in COVERED
    ]
    sources += [(ROOT / "csrc" / f"{name}.cpp", []) for name in OTHERS]
    sources += [(path, []) for path in sorted(Path(__file__).parent.glob("*.cpp"))]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda item: compile_one(*item), sources))
    inputs = [*objects, *third_party]
    if not PROGRAM.exists() or any(
        path.stat().st_mtime > PROGRAM.stat().st_mtime for path in inputs
    ):
        # libzstd's assembly does not say that it needs no executable stack
        command = [*compiler(), *SANITIZE, *inputs, "-pthread", "-Wl,-z,noexecstack"]
        subprocess.run([*command, "-o", PROGRAM], check=True)
    return PROGRAM


if __name__ == "__main__":
    if missing := missing_tools():
        print(missing)
        sys.exit(NOT_AVAILABLE)
    try:
        print(build())
    except subprocess.CalledProcessError as error:  # the compiler has said why
        sys.exit(error.returncode)
