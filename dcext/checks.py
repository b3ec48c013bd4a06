"""Checks of what callers hand in: each raises one line with function and argument, what was expected and what was got."""

from __future__ import annotations

import reprlib
from importlib import import_module

import torch
from torch import nn

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

_PLAIN = (str, bytes, int, float, type(None), type, torch.dtype, torch.device)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def shown(value: object) -> str:
    """A value in a message, on one line: itself where that is short, else its type."""
    if isinstance(value, _PLAIN):
        return _short.repr(value)
    name = type(value).__name__
    return (
        name
        if isinstance(value, (nn.Module, torch.Tensor))
        else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    )


def check_type(
    where: str, value: object, kinds: type | tuple[type, ...], expected: str = ""
) -> None:
    """Checks the type of an argument; True and False are no numbers.

    Args:
        where: function and argument, or field, for the message.
        value: what was handed in.
        kinds: the types that it may have.
        expected: the types in words; None for the name of the only one.

    Raises:
        TypeError: another type.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{where}: expected {expected or f'a {names}'}, got {shown(value)}")


def require(package: str, extra: str) -> None:
    """Checks that an optional package is there, before any work.

    Args:
        package: as it is imported.
        extra: of ``dcext``, which brings it.

    Raises:
        ImportError: it is missing: how to get it.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, and misses another
            raise
        raise ImportError(
            f"expected the package {package}, found none: pip install 'dcext[{extra}]'"
        ) from error


def check_model(function: str, model: object) -> None:
    """Checks that a model is one, and not its name or folder.

    Raises:
        TypeError: anything but a module.
    """
    check_type(f"{function}: model", model, nn.Module, "a torch.nn.Module that is loaded")


def torch_device(where: str, device: object) -> torch.device:
    """A device as callers write it, such as ``"cuda:1"``.

    Raises:
        TypeError: neither a device, nor its name or number.
        ValueError: there is no such kind of device.
    """
    check_type(where, device, (str, int, torch.device), "a device such as 'cpu' or 'cuda:1'")
    try:
        return torch.device(device)  # type: ignore[call-overload]
    except RuntimeError:
        raise ValueError(
            f"{where}: expected a device such as 'cpu' or 'cuda:1', got {shown(device)}"
        ) from None


def torch_dtype(where: str, dtype: object) -> torch.dtype | None:
    """A float dtype as callers write it: ``torch.bfloat16``, ``"bfloat16"``, or None or ``"auto"`` for the stored one.

    Raises:
        TypeError: neither a dtype nor a name.
        ValueError: another dtype.
    """
    expected = f"torch.{', torch.'.join(FLOAT_DTYPES)} or None"
    check_type(where, dtype, (str, torch.dtype, type(None)), expected)
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise ValueError(f"{where}: expected {expected}, got {shown(dtype)}")
    return getattr(torch, name)
