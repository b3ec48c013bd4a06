"""How a model calls its blocks, learnt from one window."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Call, StopEarlyError, walk
from dcext.calibrate.inputs import ModelInputs
from dcext.calibrate.layers import input_hooks
from dcext.calibrate.source import BlockSource
from dcext.calibrate.stacks import Block, linear_layers, owners, split_block, whole_model
from dcext.calibrate.tree import tensors_in

TRACED_TOKENS = (8, 7, 9, 11, 13)
Shapes = list[torch.Size]


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
            raise StopEarlyError

    with source.skeleton(trace.blocks), input_hooks(originals, on_original):
        walk(model, trace.blocks, window, on_call, dtype)
    return bypassed


def batch_dim(one: torch.Size, all_windows: torch.Size, windows: int) -> int | None:
    """The dimension that counts windows, from the shapes of a tensor for one window and for all; None if there is none."""
    for dim, (single, several) in enumerate(zip(one, all_windows, strict=True)):
        if single * windows == several:
            return dim
    return None
