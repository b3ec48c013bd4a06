"""A model seen as a chain of blocks, run one block at a time over the whole calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

HEAD_WINDOWS = 4  # windows per pass through what follows the blocks: logits are large


@dataclass
class Block:
    """One link of the chain: its name, the module, and what it is called with beside the hidden states."""

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


class _StopEarlyError(Exception):
    """Ends a forward pass at the point of interest."""


class _Stand(nn.Module):
    """Stands in for a block: records what it is called with and returns its input, or what it is told to."""

    block: Block
    on_call: Callable[[Tensor], Tensor]

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block  # a dataclass and so not a submodule: the model must not see its weights
        self.on_call = lambda hidden: hidden

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks, such as which kind of attention they have.
        return getattr(self.__dict__["block"].module, name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.block.args, self.block.kwargs = args, kwargs
        return self.on_call(hidden)


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a model: the elements of the ``nn.ModuleList`` that holds most weights of linear layers.

    Returns:
        The blocks in order; the model itself as the only one (with an empty name) where it has no such list.
    """
    best: list[Block] = []
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if weights > most:
                best = [Block(f"{name}.{i}", child) for i, child in enumerate(module)]
                most = weights
    return best or [Block("", model)]


@torch.no_grad()
def block_inputs(model: nn.Module, blocks: list[Block], calibration: Tensor) -> Tensor:
    """Runs what comes before the first block, and learns with what each block is called.

    Args:
        model: whose blocks they are.
        blocks: from ``find_blocks``; ``args`` and ``kwargs`` are filled in.
        calibration: ``(windows, tokens)`` int64, or float inputs ``(windows, ..)`` of a model without tokens.

    Returns:
        The hidden states that enter the first block, ``(windows, tokens, hidden)``; ``calibration`` itself where the
        model is its own only block.
    """
    if blocks[0].name == "":
        return calibration
    captured: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden

    def stop(hidden: Tensor) -> Tensor:
        raise _StopEarlyError

    with _standing_in(model, blocks) as stands:
        stands[0].on_call = keep
        if len(stands) > 1:
            stands[-1].on_call = stop
        else:
            stands[0].on_call = lambda hidden: stop(keep(hidden))
        with suppress(_StopEarlyError):
            _call(model, calibration)
    if not captured or any(block.kwargs is None for block in blocks):
        raise ValueError(
            f"calibration: expected {type(model).__name__} to call each of its {len(blocks)} blocks once, in order"
        )
    return captured[0]


def outputs(
    model: nn.Module, blocks: list[Block], calibration: Tensor, hidden: Tensor
) -> Iterator[tuple[Tensor, slice]]:
    """Runs what comes after the last block, a few windows at a time.

    Args:
        model: as for ``block_inputs``.
        blocks: as for ``block_inputs``.
        calibration: as for ``block_inputs``.
        hidden: what left the last block, of as many windows; may require gradients.

    Yields:
        The model's outputs (logits, where it has them) and the windows that they belong to.
    """
    for begin in range(0, calibration.shape[0], HEAD_WINDOWS):
        part = slice(begin, begin + HEAD_WINDOWS)
        if blocks[0].name == "":
            yield hidden[part], part
            continue
        with _standing_in(model, blocks) as stands:
            stands[-1].on_call = partial(_instead, hidden[part])
            output = _call(model, calibration[part])
        yield getattr(output, "logits", output), part


def _instead(chosen: Tensor, entering: Tensor) -> Tensor:
    return chosen.to(entering.dtype)


def run_block(block: Block, module: nn.Module, hidden: Tensor) -> Tensor:
    """A block's output for hidden states, run by ``module``, which is the block itself or a copy of it."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and hidden.is_floating_point():
            return value.to(hidden.dtype)
        if isinstance(value, tuple):
            return tuple(convert(item) for item in value)
        return value

    kwargs = {key: convert(value) for key, value in (block.kwargs or {}).items()}
    output = module(hidden, *map(convert, block.args), **kwargs)
    if block.name == "":
        output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple) else output


def linear_layers(block: Block) -> dict[str, nn.Linear]:
    """The linear layers in a block, by their name in the model."""
    prefix = f"{block.name}." if block.name else ""
    return {
        prefix + name: module
        for name, module in block.module.named_modules()
        if type(module) is nn.Linear
    }


@contextmanager
def input_hooks(
    layers: dict[str, nn.Linear], on_input: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``on_input`` with the name and the input of each layer before it runs; what it returns replaces the input."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            replaced = on_input(name, args[0])
            return None if replaced is None else (replaced, *args[1:])

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, calibration: Tensor) -> Any:
    if calibration.is_floating_point():
        return model(calibration)
    return model(input_ids=calibration, use_cache=False)


@contextmanager
def _standing_in(model: nn.Module, blocks: list[Block]) -> Iterator[list[_Stand]]:
    stands = [_Stand(block) for block in blocks]
    parent = cast(nn.ModuleList, model.get_submodule(blocks[0].name.rpartition(".")[0]))
    originals = list(parent)
    try:
        for i, stand in enumerate(stands):
            parent[i] = stand
        yield stands
    finally:
        for i, original in enumerate(originals):
            parent[i] = original
