"""Sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
MOST_NBYTES = 2**63 - 1  # that torch and the system can count
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_nbytes(name: str, size: int | str) -> int:
    """Bytes of a size such as ``"8GiB"``, ``"500 MB"`` or ``2**30``.

    Args:
        name: of the argument, for the message.
        size: bytes, or a number and a unit: B, KB, MB, GB, TB (powers of 1000), KiB .. TiB (of 1024).

    Raises:
        ValueError: anything else, a negative number, or more than any machine has.
    """
    if isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MOST_NBYTES:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    nbytes = None
    if match is not None and match[2].upper() in _UNITS:
        nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes is None or nbytes > MOST_NBYTES:
        raise ValueError(
            f"{name}: expected bytes or a size such as '8GiB' or '500MB', got {size!r}"
        )
    return nbytes


def check_nbytes(**sizes: int | str | None) -> None:
    """Checks sizes, by the names of their arguments, long before they are needed; None is none.

    Raises:
        ValueError: as ``parse_nbytes``.
    """
    for name, size in sizes.items():
        if size is not None:
            parse_nbytes(name, size)


def format_nbytes(nbytes: int) -> str:
    """A size to read, in powers of 1024 and three digits, such as ``"1.25 GiB"``."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" else max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f} {unit}"


def free_memory() -> int:
    """Bytes that this process could take now: what is available, or what its control group leaves, if that is less.

    Control groups are those of Linux: ``memory.max`` of cgroups(7), version 2, or ``memory.limit_in_bytes`` of version 1.
    """
    room = [psutil.virtual_memory().available]
    membership = Path("/proc/self/cgroup")
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, usage = names if controllers else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(root):
                break
            bound = _number_in(folder / limit)
            if bound is not None:
                room.append(max(bound - (_number_in(folder / usage) or 0), 0))
    return min(room)


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
