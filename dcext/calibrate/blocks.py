"""A model run by its own code, its blocks by somebody else.

The model's ``forward`` decides which block is called when and with what; each call of a block is handed to a function
that runs it, and may calibrate it or look at it first. So encoders and decoders, skip connections, state that blocks
hand on and blocks that are called several times all are as they are in the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dcext.calibrate.inputs import ModelInputs
from dcext.calibrate.stacks import Block, find_blocks, linear_layers
from dcext.calibrate.tree import first_float, map_tensors, tensors_in

__all__ = ["Block", "Call", "find_blocks", "linear_layers", "run_in_place", "walk"]


@dataclass
class Call:
    """One call of a block.

    Attributes:
        index: of all calls in the pass.
        block: which.
        args: what it is called with, floating-point tensors in the pass's dtype.
        kwargs: the same, by name.
    """

    index: int
    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor | None:
        """What enters: the first floating-point tensor, or else the first tensor."""
        inputs = (self.args, self.kwargs)
        found = first_float(inputs)
        return next(iter(tensors_in(inputs)), None) if found is None else found


OnCall = Callable[[Call], Any]


def run_in_place(call: Call) -> Any:
    """What a block returns, run by itself and not by a copy. For use in ``walk``."""
    module = call.block.module
    intercept = module.__dict__["forward"]
    intercept.remove_from(module)
    try:
        return module.forward(*call.args, **call.kwargs)
    finally:
        module.__dict__["forward"] = intercept


class StopEarlyError(Exception):
    """Ends a forward pass at the point of interest."""


class Intercept:
    """Stands in for the ``forward`` of a block."""

    def __init__(self, block: Block, on_call: Callable[[Block, Any, Any], Any]) -> None:
        self.block = block
        self.on_call = on_call
        self.previous = block.module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.on_call(self.block, args, kwargs)

    def __deepcopy__(self, memo: object) -> Intercept:
        return self

    def remove_from(self, module: nn.Module) -> None:
        """Gives the block, or a copy of it, its own ``forward`` again."""
        module.__dict__.pop("forward", None)
        if self.previous is not None:
            module.__dict__["forward"] = self.previous


def walk(
    model: nn.Module,
    blocks: list[Block],
    inputs: ModelInputs,
    on_call: OnCall,
    dtype: torch.dtype | None,
    calls: int | None = None,
) -> Any:
    """Runs a model; ``on_call`` runs its blocks.

    Outside the blocks the model computes in its own dtype, in the blocks in ``dtype``. What goes from one block
    straight to another is not rounded to the model's dtype in between.

    Args:
        model: in evaluation mode.
        blocks: none within another.
        inputs: of the model.
        on_call: given each call, returns what the block does.
        dtype: of the blocks; None for the model's own.
        calls: after how many to stop; None to run to the end.

    Returns:
        The model's output; None where the pass was stopped.
    """
    stream = _Stream(dtype)
    count = 0

    def intercepted(block: Block, args: Any, kwargs: Any) -> Any:
        nonlocal count
        entering = first_float((args, kwargs))
        args, kwargs = map(_without_cache, args), {k: _without_cache(v) for k, v in kwargs.items()}
        call = Call(count, block, stream.enter(tuple(args)), stream.enter(kwargs))
        count += 1
        output = on_call(call)
        if count == calls:
            raise StopEarlyError
        return stream.leave(output, None if entering is None else entering.dtype)

    with ExitStack() as stack:
        for block in blocks:
            intercept = Intercept(block, intercepted)
            block.module.__dict__["forward"] = intercept
            stack.callback(intercept.remove_from, block.module)
        with suppress(StopEarlyError):
            return inputs.call(model)
    return None


def _without_cache(value: Any) -> Any:
    """None for a cache of keys and values, which some models make unasked: blocks run more than once on the same inputs."""
    module = sys.modules.get("transformers.cache_utils")
    return None if module is not None and isinstance(value, module.Cache) else value


class _Stream:
    """Knows, of what the model holds in its own dtype, the same in the dtype of the blocks."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._known = WeakTensorKeyDictionary()

    def enter(self, value: Any) -> Any:
        return map_tensors(value, self._enter)

    def leave(self, value: Any, dtype: torch.dtype | None) -> Any:
        def leave(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            given = tensor if dtype is None else tensor.to(dtype)
            if given is tensor and tensor.is_leaf and tensor.requires_grad:
                given = tensor.clone()  # the model may change what it is given
            if given is not tensor:
                self._known[given] = (tensor, given._version)
            return given

        return map_tensors(value, leave)

    def _enter(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        known, version = self._known.get(tensor, (None, 0))
        if known is not None and tensor._version == version:
            return known
        if self._dtype is None or tensor.dtype == self._dtype:
            return tensor
        entered = _narrowed(tensor, self._dtype)
        self._known[tensor] = (entered, tensor._version)
        return entered


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; what is finite, such as the least number in a mask, stays so."""
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max or tensor.requires_grad:
        return converted
    overflown = torch.isinf(converted) & ~torch.isinf(tensor)
    if not bool(overflown.any()):
        return converted
    largest = torch.full_like(converted, torch.finfo(dtype).max)
    return torch.where(overflown, largest.copysign(converted), converted)
