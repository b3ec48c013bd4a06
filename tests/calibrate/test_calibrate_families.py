"""Calibration over the families of transformers and plain torch: blocks that run one by one are the model, and gradients are those of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import FAMILIES, Case, hf
from torch import Tensor, nn

from dcext.calibrate.blocks import Call, find_blocks, walk
from dcext.calibrate.inputs import ModelInputs, calibrating, model_inputs
from dcext.calibrate.objective import output_gradients
from dcext.calibrate.sensitivity import HEAD_WINDOWS, measure_sensitivity
from dcext.calibrate.source import BlockSource
from dcext.calibrate.stacks import owners
from dcext.calibrate.trace import trace_calls
from dcext.calibrate.tree import tensors_in
from dcext.nn.matrix import is_multiplied
from dcext.quantize.output_moment import diagonal

SOURCE = BlockSource()


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    return FAMILIES[request.param]()


def test_blocks_run_one_by_one_are_the_model(case):
    model, calibration = case
    inputs = model_inputs(model, calibration)
    modules = dict(model.named_modules())

    def run(call: Call) -> Any:
        with SOURCE.working_copy(call.block, torch.float32) as module:
            return module(*call.args, **call.kwargs)

    with torch.no_grad(), calibrating(model):
        trace = trace_calls(model, find_blocks(model), SOURCE, inputs, torch.float32)
        found = walk(model, trace.blocks, inputs, run, torch.float32)
        expected = inputs.call(model)
    assert len(trace.sequence) > 1
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        torch.testing.assert_close(a, b)
    assert dict(model.named_modules()) == modules
    assert not any("forward" in module.__dict__ for module in model.modules())


def mean_squares(model: nn.Module, inputs: ModelInputs, seed: int) -> dict[str, Tensor]:
    """By layer, the mean squares of the gradients at its outputs, by autograd through the whole model."""
    generator = torch.Generator().manual_seed(seed)
    owner = owners(model)
    sums: dict[str, Tensor] = {}

    def hook(name: str, layer: nn.Module) -> Any:
        def add(gradient: Tensor) -> None:
            if hasattr(layer, "kernel_size"):
                gradient = gradient.movedim(-1 - len(layer.kernel_size), -1)
            square = gradient.flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, 0) + square

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return after

    handles = [
        module.register_forward_hook(hook(owner[name], module))
        for name, module in model.named_modules()
        if is_multiplied(module)
    ]
    with calibrating(model):
        for begin in range(0, inputs.windows, HEAD_WINDOWS):
            output = inputs.select(slice(begin, begin + HEAD_WINDOWS)).call(model)
            pairs = output_gradients(output, inputs.has_ids, generator)
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
    for handle in handles:
        handle.remove()
    return {name: total / inputs.tokens for name, total in sums.items()}


def test_sensitivity_is_that_of_autograd(case):
    """Through cross attention, projectors, skip connections, and layers that run several times."""
    model, calibration = case
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if isinstance(model, hf.DebertaV2PreTrainedModel):
        # Its positions are projected once for all windows, so that it matters which share a pass.
        calibration = model_inputs(model, calibration).select(slice(HEAD_WINDOWS)).tensors
    blocks = find_blocks(model)
    found = measure_sensitivity(model, blocks, SOURCE, calibration, dtype=torch.float32, seed=3)
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)  # in parts that are frozen too
    expected = mean_squares(model, model_inputs(model, calibration), seed=3)
    rounding = 1e-9 * max(float(squares.norm()) for squares in expected.values())
    assert len(found.output) > 3
    for name, moment in found.output.items():
        error = diagonal(moment, len(expected[name])) - expected[name]
        assert error.norm() <= 1e-3 * expected[name].norm() + rounding, name
