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


def arguments_of(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What ``make`` is called with to make a class of ``make_class``."""
    return getattr(kind, _RECIPE)[1]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _blank, getattr(type(self), _RECIPE), state


def _blank(make: Callable[..., type[nn.Module]], arguments: tuple[Any, ...]) -> nn.Module:
    kind = make(*arguments)
    return kind.__new__(kind)
