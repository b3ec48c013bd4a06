"""Machines that one does not have: ``dcext plan --machine pcie4``. Projections from data sheets, not measurements."""

from __future__ import annotations

import json
from importlib.resources import files

from dcext.policy.machine import Machine, machine_from_dict

PRESETS_FILE = "presets.json"


def presets() -> dict[str, Machine]:
    """All of them, by name."""
    text = files("dcext.policy").joinpath(PRESETS_FILE).read_text(encoding="utf-8")
    return {
        name: machine_from_dict(value, f"preset {name!r}")
        for name, value in json.loads(text).items()
    }


def preset(name: str) -> Machine:
    """One of them.

    Raises:
        ValueError: there is none of that name: which there are.
    """
    known = presets()
    if name not in known:
        raise ValueError(
            f"machine: expected a file or one of {', '.join(sorted(known))}, got {name!r}"
        )
    return known[name]
