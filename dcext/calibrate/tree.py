"""Tensors in what modules are called with and return: tuples, lists, dicts and the output classes of transformers."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

MAPPINGS = (dict, UserDict)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each tensor replaced.

    Containers in which nothing changes are returned themselves, so that a dict through which blocks hand each other
    state stays one object. Whatever is no container is returned as it is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MAPPINGS):
        mapped = {key: map_tensors(item, change) for key, item in value.items()}
        if all(mapped[key] is value[key] for key in mapped):
            return value
        is_output_class = hasattr(value, "__dataclass_fields__")
        return type(value)(**mapped) if is_output_class else type(value)(mapped)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a structure, in order; one that appears twice is there twice."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found


def first_float(value: Any) -> Tensor | None:
    """The first floating-point tensor in a structure: the hidden states, in what a block is called with."""
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point()), None)
