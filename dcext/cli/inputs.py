"""Files that options name, read with messages that name the option."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def check_file(option: str, path: Path) -> None:
    """Checks that there is a file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is none, or a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path}: expected a file, found a folder")
    if not path.exists():
        raise FileNotFoundError(f"{option}: {path}: expected a file, found none")


def read_text(option: str, path: Path, most_chars: int = -1) -> str:
    """The start of a text, or all of it.

    Args:
        option: that names it, for the message.
        path: of a UTF-8 file.
        most_chars: to read; -1 for all.

    Raises:
        OSError: there is no such file.
        ValueError: it is empty or no text.
    """
    check_file(option, path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(most_chars)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: {path}: expected UTF-8 text, found {error.reason} at byte {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(
            f"{option}: {path}: expected text, found {'white space' if text else 'an empty file'}"
        )
    return text


def load_file(option: str, path: Path, load: Callable[[Path], T]) -> T:
    """What a function of ``dcext`` makes of a file; ``option`` stands in front of its messages."""
    check_file(option, path)
    try:
        return load(path)
    except ValueError as error:
        raise type(error)(f"{option}: {error}") from None


def to_nbytes(option: str, count: float, unit: float) -> int:
    """Bytes of a count of a unit.

    Raises:
        ValueError: no positive number.
    """
    if not 0 < count < math.inf:
        raise ValueError(f"{option}: expected a positive number, got {count:g}")
    return int(count * unit)
