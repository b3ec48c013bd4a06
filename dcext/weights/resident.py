"""Weights that are kept on a device, made once for all modules that share them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dcext.codec import payload_info
from dcext.weights.indexed import IndexedWeight
from dcext.weights.packed import PackedWeight

Made = TypeVar("Made")


def make_resident(payload: Tensor, device: torch.device) -> IndexedWeight | PackedWeight:
    """A payload as layers use it on a device; modules that share a payload share the result."""

    def make() -> IndexedWeight | PackedWeight:
        if payload_info(payload)["codec"] != "packed":
            return IndexedWeight(payload, device)
        return PackedWeight.from_payload(payload, device)

    return shared_result(payload, device, make)


_MADE: dict[tuple[int, torch.device], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}


def shared_result(source: Tensor, device: torch.device, make: Callable[[], Made]) -> Made:
    """What ``make`` gave for this tensor and device, as long as both live; else what it gives now."""
    for key, (of, value) in list(_MADE.items()):
        if of() is None or value() is None:
            del _MADE[key]
    key = (id(source), device)
    if key in _MADE:
        found = _MADE[key][1]()
        if found is not None:
            return found
    made = make()
    _MADE[key] = (weakref.ref(source), weakref.ref(made))
    return made
