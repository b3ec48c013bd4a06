"""Rows of figures in a JSON file: kept as they are measured, so that a run can be continued."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


class RowFile(Generic[Key]):
    """Rows by key, in the order in which they were measured. Processes may share the file."""

    def __init__(
        self,
        path: Path,
        key_of: Callable[[Row], Key],
        figures: Callable[[list[Row]], dict[str, Any]] | None = None,
    ) -> None:
        """Reads what is there.

        Args:
            path: the file; its folder is created when the first row comes.
            key_of: what makes two rows the same measurement.
            figures: what the file holds beside the rows, computed from all of them.
        """
        self.path = path
        self.key_of = key_of
        self.figures = figures or (lambda rows: {})
        self.rows = self._read()

    def add(self, key: Key, row: Row) -> None:
        """Adds a row, or replaces one of the same key, and writes the file."""
        self._change({key: row}, set())

    def drop(self, keys: set[Key]) -> None:
        """Removes rows, those of them that exist, and writes the file."""
        if keys & self.rows.keys():
            self._change({}, keys)

    def _read(self) -> dict[Key, Row]:
        if not self.path.is_file():
            return {}
        return {self.key_of(row): row for row in json.loads(self.path.read_text())["rows"]}

    def _change(self, added: dict[Key, Row], dropped: set[Key]) -> None:
        """Changes what the file holds by now: another process may have added to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            rows = {key: row for key, row in self._read().items() if key not in dropped}
            self.rows = {**rows, **added}
            temporary = self.path.with_suffix(".part")
            rows_now = list(self.rows.values())
            report = {"kind": "measured", **self.figures(rows_now), "rows": rows_now}
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(temporary, self.path)
        finally:
            os.close(folder)
