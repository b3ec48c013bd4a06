"""Layers that run more than once in a pass: what their later calls are run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Call, walk
from dcext.calibrate.inputs import ModelInputs
from dcext.calibrate.layers import input_hooks, layer_rows
from dcext.calibrate.source import BlockSource
from dcext.calibrate.trace import Trace
from dcext.quantize.statistics import InputStatistics


@torch.no_grad()
def later_statistics(
    model: nn.Module,
    source: BlockSource,
    inputs: ModelInputs,
    trace: Trace,
    dtype: torch.dtype,
    make: Callable[[int], InputStatistics],
) -> dict[str, InputStatistics]:
    """The inputs of all but the first calls of layers that are called several times, in the float model.

    Args:
        model: in evaluation mode.
        source: of weights.
        inputs: some windows.
        trace: of the model.
        dtype: of the blocks.
        make: gives empty statistics for a number of input features.

    Returns:
        By layer; nothing is run where no layer is called again.
    """
    found: dict[str, InputStatistics] = {}
    if not trace.repeated:
        return found
    called: set[str] = set()

    def visit(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = layer_rows(layer, x)
        if name in called and rows is not None:
            found.setdefault(name, make(rows.shape[-1])).update(rows)
        called.add(name)

    def on_call(call: Call) -> Any:
        with source.working_copy(call.block, dtype) as module:
            layers = trace.layers(replace(call.block, module=module))
            again = {name: layer for name, layer in layers.items() if name in trace.repeated}
            with input_hooks(again, visit):
                return module(*call.args, **call.kwargs)

    with source.skeleton(trace.blocks):
        walk(model, trace.blocks, inputs, on_call, dtype, len(trace.sequence))
    return found
