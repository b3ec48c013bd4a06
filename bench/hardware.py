"""The hardware line that every figure carries."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NVIDIA_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def hardware() -> dict[str, Any]:
    """Machine, build and commit, JSON-ready; ``line`` is the form that tables print."""
    import torch

    from dcext.build import build_info, machine_info

    machine, build = machine_info(), build_info()
    gpu = gpu_info() if torch.cuda.is_available() else None
    commit = git("rev-parse", "--short", "HEAD").strip()
    parts = [
        f"{machine['cpu']} ({', '.join(build['isas'][1:]) or 'scalar'})",
        f"{len(os.sched_getaffinity(0))} cores",
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        gpu["line"] if gpu else "no GPU",
        f"torch {torch.__version__}",
        f"zstd {build['zstd']}",
        f"commit {commit or 'unknown'}",
    ]
    name = gpu["name"] if gpu else None
    figures = {"gpu": name, "gpu_info": gpu, "commit": commit}
    return {**machine, **build, **figures, "line": " · ".join(parts)}


def git(*arguments: str) -> str:
    """What git prints; nothing where there is no git, or no repository."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return ""


def gpu_info() -> dict[str, Any]:
    """The current GPU, its driver and what runs on it; clocks as they are right now, None where they cannot be read."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    info: dict[str, Any] = {
        "name": device.name,
        "architecture": f"sm_{device.major}{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": triton,
        **nvidia_smi(str(getattr(device, "uuid", ""))),
    }
    parts = [f"{info['name']} ({info['memory_bytes'] / 2**30:.0f} GiB)", f"CUDA {info['cuda']}"]
    parts += [f"driver {info['driver']}"] if info["driver"] else []
    parts += [f"triton {triton}"] if triton else []
    return {**info, "line": " · ".join(parts)}


def nvidia_smi(uuid: str) -> dict[str, str | None]:
    """``NVIDIA_SMI_FIELDS`` of the GPU with this UUID, or of the first one; None for those that cannot be read."""
    query = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS.values())}"]
    query += ["--format=csv,noheader,nounits"]
    query += [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        values = result.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        values = []
    readable = len(values) == len(NVIDIA_SMI_FIELDS)
    return dict(
        zip(NVIDIA_SMI_FIELDS, values if readable else [None] * len(NVIDIA_SMI_FIELDS), strict=True)
    )


def hardware_line(*measured: str) -> str:
    """The line, with a remark if what is measured (paths) differs from the commit that it names."""
    changed = git("status", "--porcelain", "--", *measured)
    return hardware()["line"] + (" with uncommitted changes" if changed else "")
