"""Classes made at run time, for modules that change what an attribute means but stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_RECIPE = "_dcext_class_recipe"


def make_class(
    name: str,
    bases: tuple[type, ...],
    members: dict[str, Any],
    make: Callable[..., type[nn.Module]],
    *arguments: Any,
) -> type[nn.Module]:
    """A class whose instances can be copied and pickled though no module has its name.

    Args:
        name: of the class.
        bases: its bases.
        members: what it adds to them.
        make: an importable function that returns this class,
        arguments: when it is called with these.
    """
    recipe = {_RECIPE: (make, arguments), "__reduce_ex__": _reduce}
    return type(name, bases, {**members, **recipe})


def arguments_of(kind: type) -> tuple[Any, ...]:
    """What ``make`` was called with for a class.

    Raises:
        TypeError: it was not made by ``make_class``.
    """
    recipe = vars(kind).get(_RECIPE)
    if recipe is None:
        raise TypeError(f"derived: expected a class that dcext made, got {kind.__name__}")
    arguments: tuple[Any, ...] = recipe[1]
    return arguments


def _reduce(self: nn.Module, protocol: Any) -> Any:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _blank, getattr(type(self), _RECIPE), state


def _blank(make: Callable[..., type[nn.Module]], arguments: tuple[Any, ...]) -> nn.Module:
    kind = make(*arguments)
    return kind.__new__(kind)
