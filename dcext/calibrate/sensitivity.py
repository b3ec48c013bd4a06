"""How much the loss minds errors at the outputs of each linear layer, and which layers read the same input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import (
    Block,
    block_inputs,
    input_hooks,
    linear_layers,
    outputs,
    run_block,
)
from dcext.calibrate.source import BlockSource
from dcext.quantize.feedback import cholesky_factor
from dcext.quantize.output_moment import OutputMoment
from dcext.quantize.rate import MOST_POWER, WeightSample, rounding_order, sample_weights
from dcext.quantize.statistics import InputStatistics


@dataclass
class Sensitivity:
    """What the backward pass tells of the layers of a model.

    Attributes:
        output: by layer, blocks on the diagonal of the second moment of the derivatives of the loss (nats, summed over
            all tokens) by its outputs, mean over tokens (``OutputMoment.moment``). Layers that no calibration token
            reached, or whose derivatives are not finite, are missing.
        groups: layers that read the same tensor, in the order in which they ran.
        samples: by layer, some of its weights. Layers whose inputs have no usable second moment are missing.
    """

    output: dict[str, Tensor] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    samples: dict[str, WeightSample] = field(default_factory=dict)


def measure_sensitivity(
    model: nn.Module,
    blocks: list[Block],
    source: BlockSource,
    calibration: Tensor,
    *,
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> Sensitivity:
    """One forward and one backward pass, block by block: a block's activations are computed again when they are needed.

    The loss is the negative log-likelihood of labels drawn from the model's own predictions, so that the mean squares
    are the diagonal of the Fisher information; for a model without logits over tokens, ``sum(output * noise)`` with
    normal noise, whose mean squares are those of the Jacobian.

    Args:
        model: any that ``find_blocks`` accepts.
        blocks: from ``find_blocks``.
        source: gives each block's weights.
        calibration: as for ``block_inputs``.
        dtype: of the passes.
        seed: of labels or noise.
        progress: called with 1 after each block, forward and backward: ``2 * len(blocks)`` times.
    """
    result = Sensitivity()
    with source.skeleton():
        hidden = block_inputs(model, blocks, calibration)
    if hidden.is_floating_point():
        hidden = hidden.to(dtype)
    entering = []
    for block in blocks:
        entering.append(hidden)
        with source.working_copy(block, dtype) as module, torch.no_grad():
            hidden = _forward(block, module, hidden, result)
        progress(1)
    with source.skeleton():
        gradient = _head_gradient(model, blocks, calibration, hidden, seed)
    tokens = calibration.shape[0] * (1 if calibration.is_floating_point() else calibration.shape[1])
    for block in reversed(blocks):
        with source.working_copy(block, dtype) as module:
            gradient, moments = _backward(block, module, entering.pop(), gradient)
        for name, total in moments.items():
            moment = total.moment(tokens)
            if bool(torch.isfinite(moment).all()):
                result.output[name] = moment
        progress(1)
    return result


def _forward(block: Block, module: nn.Module, hidden: Tensor, result: Sensitivity) -> Tensor:
    """Runs a block; notes which layers share an input, and that input's statistics."""
    last: Tensor | None = None
    pivots: Tensor | None = None
    seen: set[str] = set()
    layers = _layers_of(block, module)

    def note(name: str, x: Tensor) -> None:
        nonlocal last, pivots
        if name in seen:
            return  # called again, with other inputs
        seen.add(name)
        if x is last:
            result.groups[-1].append(name)
        else:
            result.groups.append([name])
            last, pivots = x, _pivots(x)
        if pivots is not None:
            result.samples[name] = sample_weights(layers[name].weight, pivots, seed=len(seen))

    with input_hooks(layers, note):
        return run_block(block, module, hidden)


def _pivots(x: Tensor) -> Tensor | None:
    """``L_kk`` of each input, in the inputs' own order; None where the second moment is unusable."""
    statistics = InputStatistics(x.shape[-1], with_values=False, most_power=MOST_POWER)
    statistics.update(x)
    moment = statistics.second_moment
    try:
        order = rounding_order(moment)
        factor = cholesky_factor(moment[order][:, order])
    except ValueError:
        return None
    return factor.diagonal().float()[order.argsort()]


def _backward(
    block: Block, module: nn.Module, entering: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, OutputMoment]]:
    """The gradient at a block's input, and the second moments of those at its layers' outputs."""
    moments: dict[str, OutputMoment] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def accumulate(grad: Tensor) -> None:
            moments.setdefault(name, OutputMoment(grad.shape[-1])).update(grad)

        def after(module: nn.Module, args: object, result: Tensor) -> None:
            if result.requires_grad:
                result.register_hook(accumulate)

        return after

    layers = _layers_of(block, module)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            start = entering.detach()
            if start.is_floating_point():
                start.requires_grad_(True)
            result = run_block(block, module, start)
            if not start.requires_grad:
                return gradient, moments
            (before,) = torch.autograd.grad(result, start, gradient.to(result.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return before, moments


def _layers_of(block: Block, module: nn.Module) -> dict[str, nn.Linear]:
    return linear_layers(Block(block.name, module))


def _head_gradient(
    model: nn.Module, blocks: list[Block], calibration: Tensor, hidden: Tensor, seed: int
) -> Tensor:
    """The gradient of the loss at the last block's output."""
    generator = torch.Generator().manual_seed(seed)
    final = hidden.detach().requires_grad_(True)
    half = hidden.dtype != torch.float32
    gradient = torch.zeros_like(hidden)
    with torch.enable_grad():
        cast = torch.autocast("cpu", hidden.dtype) if half else nullcontext()
        with cast:
            for output, part in outputs(model, blocks, calibration, final):
                is_logits = not calibration.is_floating_point()
                at_output = (_nll_gradient if is_logits else _noise)(output.detach(), generator)
                (grad,) = torch.autograd.grad(output, final, at_output)
                gradient[part] = grad[part]
    return gradient


def _nll_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``softmax(logits) - onehot(label)`` with a label drawn from the softmax for each token."""
    p = logits.float().softmax(-1).reshape(-1, logits.shape[-1])
    cumulative = p.cumsum(-1)
    drawn = torch.rand((p.shape[0], 1), generator=generator) * cumulative[:, -1:]
    label = torch.searchsorted(cumulative, drawn).clamp_(max=p.shape[1] - 1)
    p.scatter_add_(1, label, torch.full_like(drawn, -1.0))
    return p.reshape(logits.shape).to(logits.dtype)


def _noise(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator).to(output.dtype)
