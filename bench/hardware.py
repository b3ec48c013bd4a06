"""The hardware line that every figure carries."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def hardware() -> dict[str, Any]:
    """Machine, build and commit, JSON-ready; ``line`` is the form that tables print."""
    import torch

    from dcext.build import build_info
    from dcext.cli.report import machine_info

    machine, build = machine_info(), build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    parts = [
        f"{machine['cpu']} ({', '.join(build['isas'][1:]) or 'scalar'})",
        f"{len(os.sched_getaffinity(0))} cores",
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        gpu or "no GPU",
        f"torch {torch.__version__}",
        f"zstd {build['zstd']}",
        f"commit {commit or 'unknown'}",
    ]
    return {**machine, **build, "gpu": gpu, "commit": commit, "line": " · ".join(parts)}


def hardware_line(*measured: str) -> str:
    """The line, with a remark if what is measured (paths) differs from the commit that it names."""
    command = ["git", "status", "--porcelain", "--", *measured]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).stdout
    return hardware()["line"] + (" with uncommitted changes" if changed else "")
