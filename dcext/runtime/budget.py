"""Sizes as people write them."""

from __future__ import annotations

import re

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
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_nbytes(name: str, size: int | str) -> int:
    """Bytes of a size such as ``"8GiB"``, ``"500 MB"`` or ``2**30``.

    Args:
        name: of the argument, for the message.
        size: bytes, or a number and a unit: B, KB, MB, GB, TB (powers of 1000), KiB .. TiB (of 1024).

    Raises:
        ValueError: anything else, or a negative number.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"{name}: expected bytes or a size such as '8GiB' or '500MB', got {size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_nbytes(nbytes: int) -> str:
    """A size to read, in powers of 1024 and three digits, such as ``"1.25 GiB"``."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" else max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f} {unit}"
