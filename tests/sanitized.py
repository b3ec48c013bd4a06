"""Builds C++ programs of tests, compiling only what is out of date, and tells whether there are sanitizers."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SANITIZERS = {"thread": "thread", "address": "address,undefined"}
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-strict-aliasing", "-fno-sanitize-recover=all", "-pthread"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def flags_of(sanitizer: str | None) -> list[str]:
    return FLAGS + ([f"-fsanitize={SANITIZERS[sanitizer]}"] if sanitizer else [])


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Holds what is made against other processes and threads that make the same."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing(folder: Path, sanitizer: str | None) -> str | None:
    """What is missing, or None: a program of one line, put into the folder, tells."""
    if shutil.which(compiler()[0]) is None:
        return f"a C++ compiler ({compiler()[0]})"
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"probe_{sanitizer}"
    command = [*compiler(), *flags_of(sanitizer), "-x", "c++", "-", "-o", str(probe)]
    with alone(probe):
        built = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
        runs = built.returncode == 0
        runs = runs and subprocess.run([probe], capture_output=True).returncode == 0
    if not runs:
        return f"a compiler and a machine with {' '.join(flags_of(sanitizer)[len(FLAGS) :])}"
    return None


def is_current(target: Path, source: Path, *others: Path) -> bool:
    """Whether an object is newer than other files and all it was compiled from, which the compiler has listed beside it."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    files = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    newest = [*(Path(name) for name in files), *others]
    return source in newest and all(
        p.exists() and p.stat().st_mtime < target.stat().st_mtime for p in newest
    )


def compile_one(source: Path, target: Path, command: Sequence[str | Path], *others: Path) -> Path:
    """An object, compiled where it is not current; a compiler that is stopped leaves none."""
    with alone(target):
        if not is_current(target, source, *others):
            partial = target.with_suffix(".partial")
            dependencies = ["-MMD", "-MF", target.with_suffix(".d")]
            subprocess.run([*command, *dependencies, "-c", source, "-o", partial], check=True)
            partial.rename(target)
    return target


def link(program: Path, inputs: Sequence[Path], command: Sequence[str | Path]) -> Path:
    with alone(program):
        newest = max(path.stat().st_mtime for path in inputs)
        if not program.exists() or newest > program.stat().st_mtime:
            subprocess.run([*command, *inputs, "-o", program], check=True)
    return program


def num_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def build(
    program: Path, sources: Sequence[Path], include_dirs: Sequence[Path], sanitizer: str | None
) -> Path:
    """The program, its objects in a folder beside it.

    Raises:
        CalledProcessError: the compiler has said why.
    """
    objects = program.with_suffix(".objects")
    objects.mkdir(parents=True, exist_ok=True)
    command = [*compiler(), *flags_of(sanitizer)]
    compile_command = [*command, *(f"-I{path}" for path in include_dirs)]

    def compile_source(source: Path) -> Path:
        return compile_one(source, objects / f"{source.stem}.o", compile_command, Path(__file__))

    with ThreadPoolExecutor(num_jobs()) as pool:
        return link(program, list(pool.map(compile_source, sources)), command)
