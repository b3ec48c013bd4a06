"""A model run by its own code, its blocks by somebody else.

The model's ``forward`` decides which block is called when and with what; each call of a block is handed to a function
that runs it, and may calibrate it or look at it first. So encoders and decoders, skip connections, state that blocks
hand on and blocks that are called several times all are as they are in the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dcext.calibrate.inputs import ModelInputs
from dcext.calibrate.stacks import (
    Block,
    find_blocks,
    linear_layers,
    owners,
    split_block,
    whole_model,
)
from dcext.calibrate.tree import first_float, map_tensors, tensors_in
from dcext.nn.matrix import input_rows, is_patchwise

if TYPE_CHECKING:
    from dcext.calibrate.source import BlockSource

__all__ = [
    "Block",
    "Call",
    "Trace",
    "find_blocks",
    "input_hooks",
    "linear_layers",
    "run_in_place",
    "trace_calls",
    "walk",
]

TRACED_TOKENS = (8, 7, 9, 11, 13)
CONVOLUTIONS = torch.nn.modules.conv._ConvNd


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
Shapes = list[torch.Size]


def run_in_place(call: Call) -> Any:
    """What a block returns, run by itself and not by a copy. For use in ``walk``."""
    module = call.block.module
    intercept = module.__dict__["forward"]
    intercept.remove_from(module)
    try:
        return module.forward(*call.args, **call.kwargs)
    finally:
        module.__dict__["forward"] = intercept


@dataclass
class Trace:
    """How a model calls its blocks, the same for all inputs.

    Attributes:
        blocks: of the model; some may never be called.
        sequence: the name of the block of each call.
        shapes: of each call, those of the tensors that it returns for one window.
        layer_calls: how often each layer runs in a pass, by the name of its owner.
        last_call: index of the last call of a block that holds the layer, by the name of its owner.
        owners: of the names of all layers (``stacks.owners``).
    """

    blocks: list[Block]
    sequence: list[str] = field(default_factory=list)
    shapes: list[Shapes] = field(default_factory=list)
    layer_calls: dict[str, int] = field(default_factory=dict)
    last_call: dict[str, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def layers(self, block: Block) -> dict[str, nn.Module]:
        """The layers of a block, or of a copy of it, by the names of their owners."""
        return {self.owners[name]: layer for name, layer in linear_layers(block).items()}

    @property
    def repeated(self) -> set[str]:
        """Layers that run more than once."""
        return {name for name, calls in self.layer_calls.items() if calls > 1}


class _StopEarlyError(Exception):
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
            raise _StopEarlyError
        return stream.leave(output, None if entering is None else entering.dtype)

    with ExitStack() as stack:
        for block in blocks:
            intercept = Intercept(block, intercepted)
            block.module.__dict__["forward"] = intercept
            stack.callback(intercept.remove_from, block.module)
        with suppress(_StopEarlyError):
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


@torch.no_grad()
def trace_calls(
    model: nn.Module,
    blocks: list[Block],
    source: BlockSource,
    inputs: ModelInputs,
    dtype: torch.dtype | None,
) -> Trace:
    """Runs one window, of few tokens where that is possible, to learn how the model calls its blocks.

    Blocks that are not called though their parts are (a container that only holds them) are replaced by the parts; a
    model that calls none becomes its own only block.

    Args:
        model: in evaluation mode.
        blocks: from ``find_blocks``.
        source: of weights.
        inputs: of which the first window is run.
        dtype: of the blocks.
    """
    tokens = next((t.shape[1] for n, t in inputs.tensors.items() if n.endswith("input_ids")), 0)
    # A dimension that counts tokens must not look like one that counts windows (``batch_dim``).
    count = next((n for n in TRACED_TOKENS if tokens % n), tokens)
    window = inputs.first_tokens(count)
    names = owners(model)
    while True:
        trace = Trace(blocks, owners=names)
        bypassed = _trace(model, source, window, dtype, trace)
        if bypassed is not None:
            stack = bypassed.rpartition(".")[0]
            blocks = [
                part
                for block in blocks
                for part in (
                    split_block(block)
                    if block.name not in trace.sequence and block.name.rpartition(".")[0] == stack
                    else [block]
                )
            ]
        elif not trace.sequence and blocks[0].name:
            blocks = whole_model(model)
        else:
            return trace


def _trace(
    model: nn.Module,
    source: BlockSource,
    window: ModelInputs,
    dtype: torch.dtype | None,
    trace: Trace,
) -> str | None:
    """Fills in a trace; stops at a layer that runs though its block was not called, and returns the block's name."""
    block_of = {
        name: block.name
        for block in trace.blocks
        for name in linear_layers(block)
        if name != block.name
    }
    originals = {
        name: layer
        for block in trace.blocks
        for name, layer in linear_layers(block).items()
        if name in block_of
    }
    ids = {id(layer) for layer in originals.values()}  # hooks are copied with their layers
    bypassed: str | None = None

    def count(name: str, layer: nn.Module, x: Tensor) -> None:
        trace.layer_calls[name] = trace.layer_calls.get(name, 0) + 1

    def on_call(call: Call) -> Any:
        with source.working_copy(call.block, dtype) as module:
            layers = trace.layers(replace(call.block, module=module))
            trace.last_call.update(dict.fromkeys(layers, call.index))
            with input_hooks(layers, count):
                output = module(*call.args, **call.kwargs)
        trace.sequence.append(call.block.name)
        trace.shapes.append([tensor.shape for tensor in tensors_in(output)])
        return output

    def on_original(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal bypassed
        if id(layer) in ids and block_of[name] not in trace.sequence:
            bypassed = block_of[name]
            raise _StopEarlyError

    with source.skeleton(trace.blocks), input_hooks(originals, on_original):
        walk(model, trace.blocks, window, on_call, dtype)
    return bypassed


def batch_dim(one: torch.Size, all_windows: torch.Size, windows: int) -> int | None:
    """The dimension that counts windows, from the shapes of a tensor for one window and for all; None if there is none."""
    for dim, (single, several) in enumerate(zip(one, all_windows, strict=True)):
        if single * windows == several:
            return dim
    return None


@contextmanager
def input_hooks(
    layers: dict[str, nn.Module], on_input: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``on_input`` before a layer runs; a tensor that it returns replaces the input.

    Args:
        layers: by name.
        on_input: given the name, the layer, and its input, whether that is an argument or a keyword.
    """

    def hook(name: str) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            key = next((k for k, value in given.items() if isinstance(value, Tensor)), None)
            if key is None:
                return None
            replaced = on_input(name, module, given[key])
            if replaced is None:
                return None
            given[key] = replaced
            return tuple(given[i] for i in range(len(args))), {k: given[k] for k in kwargs}

        return before

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_rows(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers multiply the same vectors when they are called with the same tensor."""
    shapes = [
        (layer.kernel_size, layer.stride) if isinstance(layer, CONVOLUTIONS) else None
        for layer in (a, b)
    ]
    return shapes[0] == shapes[1] and has_rows(a) and has_rows(b)


def has_rows(layer: nn.Module) -> bool:
    """Whether the inputs of a layer are one list of vectors that it multiplies."""
    return is_patchwise(layer) if isinstance(layer, CONVOLUTIONS) else True


def layer_rows(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The vectors that a layer multiplies, ``(.., in_features)``; None where it has no such list."""
    return input_rows(layer, x) if isinstance(layer, CONVOLUTIONS) else x


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's outputs, or derivatives by them, as ``(.., out_features)``."""
    if isinstance(layer, CONVOLUTIONS):
        return y.movedim(y.dim() - len(layer.kernel_size) - 1, -1)
    return y
