"""Builds ``build/stream/stress_*``: the weight stream and what uses it in all ways, with a sanitizer or without.

    python tests/stream/build.py thread | address | none

Prints the program's path. Compiles only what is out of date. Exit status 77: there is no compiler, or it has no such
sanitizer.

Environment:
    CXX: compiler, by default ``c++``.
    MAX_JOBS: parallel compilations, by default the number of CPUs this process may use.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import sanitized  # noqa: E402  (tests/sanitized.py)

OUT = ROOT / "build" / "stream"
NOT_AVAILABLE = 77  # as automake's tests say that they were skipped
OURS = ["weight_stream", "read_threads", "direct_file", "thread_pool"]


def build(sanitizer: str | None) -> Path:
    sources = [ROOT / "csrc" / "runtime" / f"{name}.cpp" for name in OURS]
    sources += [ROOT / "csrc" / "base" / "status.cpp", *sorted(Path(__file__).parent.glob("*.cpp"))]
    include_dirs = [ROOT / "csrc", ROOT / "tests"]
    return sanitized.build(OUT / f"stress_{sanitizer or 'none'}", sources, include_dirs, sanitizer)


if __name__ == "__main__":
    wanted = None if sys.argv[1] == "none" else sys.argv[1]
    if what := sanitized.missing(OUT, wanted):
        print(what)
        sys.exit(NOT_AVAILABLE)
    try:
        print(build(wanted))
    except subprocess.CalledProcessError as error:  # the compiler has said why
        sys.exit(error.returncode)
