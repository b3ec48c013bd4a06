"""Leaves of the graphs around blocks and within them: where the gradients of one are handed to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Call
from dcext.calibrate.tree import MAPPINGS


class Piece:
    """Some windows of a tensor that a block returned, as a leaf of its own."""

    def __init__(self, whole: Tensor, dim: int | None, rows: slice) -> None:
        self._whole = whole
        self._index = () if dim is None else (*[slice(None)] * dim, rows)
        self.value = whole.detach()[self._index]
        if whole.requires_grad:
            self.value.requires_grad_()

    def give_back(self) -> None:
        """Adds the gradient to that of the whole."""
        if self.value.grad is None:
            return
        if self._whole.grad is None:
            self._whole.grad = torch.zeros_like(self._whole)
        self._whole.grad[self._index] += self.value.grad


class Starts:
    """Inputs of a block as leaves: those that gradients are wanted for, and what enters it."""

    def __init__(self, call: Call) -> None:
        self._hidden = call.hidden
        self._made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def start(self, tensor: Tensor) -> Tensor:
        """What the block is given instead of ``tensor``; it may change it."""
        wanted = tensor.requires_grad or tensor is self._hidden
        if not wanted or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in self._made:
            leaf = tensor.detach().requires_grad_()
            self._made[id(tensor)] = (tensor, leaf, leaf.clone())
        return self._made[id(tensor)][2]

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The inputs that others depend on, with the gradients by them."""
        return [
            (tensor, leaf.grad)
            for tensor, leaf, _ in self._made.values()
            if tensor.requires_grad and leaf.grad is not None
        ]


def mappings_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments in which a block may leave something for later ones."""
    return {name: value for name, value in kwargs.items() if isinstance(value, MAPPINGS)}


def leaf_of(tensor: Tensor) -> Tensor:
    """A tensor cut off from what it was computed from; one of floating point collects gradients."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While entered, no parameter requires gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
