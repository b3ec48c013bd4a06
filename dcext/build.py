"""What was built, what this machine offers, and how many threads the codec uses."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from dcext import _C
from dcext import ops as _ops  # noqa: F401  (registers the fake implementations)
from dcext.checks import check_type


def build_info() -> dict[str, Any]:
    """Describes the extension module and the choices it made on this machine.

    Returns:
        A JSON-ready dict: ``torch``, ``zstd`` (versions), ``cuda`` (whether CUDA sources were built), ``isa`` (the
        instruction set in use; ``DCEXT_CPU`` forces one), ``isas`` (those this machine supports, worst first),
        ``num_threads`` (of the codec's pool) and ``available_cpus`` (the process's affinity).
    """
    return {
        "torch": torch.__version__,
        "zstd": _C.zstd_version,
        "cuda": _C.with_cuda,
        "isa": _C.selected_isa(),
        "isas": _C.supported_isas(),
        "num_threads": _C.get_num_threads(),
        "available_cpus": _C.available_cpus(),
    }


def set_num_threads(num_threads: int) -> None:
    """Sets how many threads ``encode`` and ``decode`` use. Layers use torch's (``torch.set_num_threads``).

    Raises:
        ValueError: ``num_threads`` is below 1.
    """
    check_type("set_num_threads: num_threads", num_threads, int, "a whole number")
    _C.set_num_threads(num_threads)


def get_num_threads() -> int:
    """How many threads ``encode`` and ``decode`` use; by default every CPU of the process's affinity mask."""
    return _C.get_num_threads()


def machine_info() -> dict[str, Any]:
    """CPU, memory and huge pages of this machine, JSON-ready."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
