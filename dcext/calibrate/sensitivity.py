"""How much the loss minds errors at the outputs of each layer, and which layers read the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Block, Call, walk
from dcext.calibrate.inputs import Calibration, ModelInputs, calibrating, model_inputs
from dcext.calibrate.layers import has_rows, input_hooks, layer_rows, output_rows, same_rows
from dcext.calibrate.leaves import Piece, Starts, frozen, leaf_of, mappings_in
from dcext.calibrate.objective import output_gradients
from dcext.calibrate.source import BlockSource
from dcext.calibrate.trace import Trace, batch_dim, trace_calls
from dcext.calibrate.tree import map_tensors, tensors_in
from dcext.nn.matrix import matrix_of
from dcext.quantize.feedback import cholesky_factor
from dcext.quantize.output_moment import OutputMoment
from dcext.quantize.rate import MOST_POWER, WeightSample, rounding_order, sample_weights
from dcext.quantize.statistics import InputStatistics

HEAD_WINDOWS = 4  # windows per pass through what follows the blocks: logits are large


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


@dataclass
class _Record:
    """A call of a block in the forward pass, and what came of it: leaves of the graph around the blocks.

    Attributes:
        call: the call.
        output: what it returned.
        left: what it left for later blocks in a mapping that it was given, by the argument's name and the key: Gemma 4's
            shared keys and values.
    """

    call: Call
    output: Any
    left: dict[tuple[str, Any], Any]

    @property
    def leaves(self) -> list[Tensor]:
        """All floating-point tensors that came of it."""
        return [t for t in tensors_in([self.output, *self.left.values()]) if t.is_floating_point()]


def measure_sensitivity(
    model: nn.Module,
    blocks: list[Block],
    source: BlockSource,
    calibration: Calibration,
    *,
    dtype: torch.dtype,
    seed: int,
    progress: Callable[[int], None] = lambda steps: None,
    trace: Trace | None = None,
    later: Mapping[str, InputStatistics] | None = None,
) -> Sensitivity:
    """One forward and one backward pass, block by block: a block's activations are computed again when they are needed.

    The loss is the negative log-likelihood of labels drawn from the model's own predictions, so that the mean squares
    are the diagonal of the Fisher information; for a model without logits, ``sum(output * noise)`` with normal noise,
    whose mean squares are those of the Jacobian. What the model computes between its blocks (the norm behind an
    encoder, a projector of images) is differentiated too: gradients reach an encoder through all cross attentions.

    Args:
        model: any that ``find_blocks`` accepts.
        blocks: from ``find_blocks``.
        source: gives each block's weights.
        calibration: as for ``model_inputs``.
        dtype: of the passes.
        seed: of labels or noise.
        progress: called with 1 after each call of a block, forward and backward.
        trace: from ``trace_calls``, if it was called already.
        later: from ``later_statistics``, of layers that run several times.
    """
    inputs = model_inputs(model, calibration)
    with calibrating(model), frozen(model):
        trace = trace or trace_calls(model, blocks, source, inputs, dtype)
        measured = _Pass(model, source, inputs, trace, dtype, progress, later or {})
        with source.skeleton(trace.blocks), torch.enable_grad():
            measured.forward()
            measured.head(torch.Generator().manual_seed(seed))
        measured.backward()
    return measured.result


class _Pass:
    """The state of one ``measure_sensitivity``."""

    def __init__(
        self,
        model: nn.Module,
        source: BlockSource,
        inputs: ModelInputs,
        trace: Trace,
        dtype: torch.dtype,
        progress: Callable[[int], None],
        later: Mapping[str, InputStatistics],
    ) -> None:
        self.result = Sensitivity()
        self._model = model
        self._source = source
        self._inputs = inputs
        self._trace = trace
        self._dtype = dtype
        self._progress = progress
        self._later = later
        self._noted: set[str] = set()
        self._records: list[_Record] = []
        self._moments: dict[str, OutputMoment] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []

    def forward(self) -> None:
        """Runs the blocks on all windows."""
        calls = len(self._trace.sequence)
        walk(self._model, self._trace.blocks, self._inputs, self._forward, self._dtype, calls)
        if len(self._records) != calls:
            raise ValueError(
                f"calibration: expected {type(self._model).__name__} to call its blocks as often for all inputs: "
                f"{calls} times, got {len(self._records)}"
            )

    def _forward(self, call: Call) -> Any:
        """Runs a block; notes which layers share an input, and that input's statistics."""
        notes = _Notes(self.result, self._noted, self._later)
        before = {name: dict(mapping) for name, mapping in mappings_in(call.kwargs).items()}
        with self._source.working_copy(call.block, self._dtype) as module, torch.no_grad():
            layers = self._trace.layers(replace(call.block, module=module))
            with input_hooks(layers, notes.visit):
                output = module(*call.args, **call.kwargs)
        output = map_tensors(output, leaf_of)
        left = {}
        for name, mapping in mappings_in(call.kwargs).items():
            for key, value in mapping.items():
                if value is not before[name].get(key):
                    left[name, key] = mapping[key] = map_tensors(value, leaf_of)
        self._records.append(_Record(call, output, left))
        self._progress(1)
        return output

    def head(self, generator: torch.Generator) -> None:
        """The gradient of the loss at what the blocks returned, a few windows at a time."""
        windows = self._inputs.windows
        dims = self._batch_dims()
        step = windows if dims is None else HEAD_WINDOWS
        half = self._dtype != torch.float32
        for begin in range(0, windows, step):
            part = slice(begin, min(windows, begin + step))
            pieces: list[Piece] = []

            def returned(call: Call, part: slice = part, pieces: list[Piece] = pieces) -> Any:
                output = self._records[call.index].output
                of_call = None if dims is None else iter(dims[call.index])

                def cut(tensor: Tensor) -> Tensor:
                    dim = None if of_call is None else next(of_call)
                    count = 1 if dim is None else tensor.shape[dim] // windows  # rows of a window
                    rows = slice(part.start * count, part.stop * count)
                    pieces.append(Piece(tensor, dim, rows))
                    return pieces[-1].value

                return map_tensors(output, cut)

            with torch.autocast("cpu", self._dtype) if half else nullcontext():
                inputs = self._inputs.select(part)
                output = walk(self._model, self._trace.blocks, inputs, returned, self._dtype)
            targets = output_gradients(output, self._inputs.has_ids, generator)
            if targets:
                torch.autograd.backward([t for t, _ in targets], [g for _, g in targets])
            for piece in pieces:
                piece.give_back()

    def _batch_dims(self) -> list[list[int | None]] | None:
        """For each tensor of each call the dimension that counts windows; None where windows cannot be told apart."""
        windows = self._inputs.windows
        dims: list[list[int | None]] = []
        for record, shapes in zip(self._records, self._trace.shapes, strict=True):
            tensors = tensors_in(record.output)
            if [t.dim() for t in tensors] != [len(shape) for shape in shapes]:
                return None
            dims.append([])
            for tensor, shape in zip(tensors, shapes, strict=True):
                dim = batch_dim(shape, tensor.shape, windows)
                if dim is None and tensor.dim() and tensor.shape[0] != shape[0]:
                    return None
                dims[-1].append(dim)
        return dims

    def backward(self) -> None:
        """Runs the blocks again, last call first, on what they were called with, and differentiates them."""
        left: dict[str, int] = {}
        for record in self._records:
            for name in self._trace.layers(record.call.block):
                left[name] = left.get(name, 0) + 1
        while self._records:
            record = self._records.pop()
            names = list(self._trace.layers(record.call.block))
            self._backward(record)
            for name in names:
                left[name] -= 1
                if left[name] == 0 and name in self._moments:
                    moment = self._moments.pop(name).moment(self._inputs.tokens)
                    if bool(torch.isfinite(moment).all()):
                        self.result.output[name] = moment
            self._progress(1)

    def _backward(self, record: _Record) -> None:
        """Adds to the moments of a block's layers; leaves the gradients at its inputs pending."""
        if self._pending:  # through what lies between the blocks
            tensors, gradients = zip(*self._pending, strict=True)
            torch.autograd.backward(tensors, gradients, retain_graph=True)
            self._pending = []
        if all(leaf.grad is None for leaf in record.leaves):
            return  # the loss does not depend on it
        starts = Starts(record.call)
        with self._source.working_copy(record.call.block, self._dtype) as module:
            layers = self._trace.layers(replace(record.call.block, module=module))
            with self._gradient_hooks(layers), torch.enable_grad():
                args, kwargs = map_tensors((record.call.args, record.call.kwargs), starts.start)
                kwargs = {**kwargs, **{k: copy.copy(v) for k, v in mappings_in(kwargs).items()}}
                output = module(*args, **kwargs)
            left = {(name, key): kwargs[name][key] for name, key in record.left}
            found = _Record(record.call, output, left).leaves
            pairs = [
                (tensor, leaf.grad.to(tensor.dtype))
                for tensor, leaf in zip(found, record.leaves, strict=True)
                if tensor.requires_grad and leaf.grad is not None
            ]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        self._pending = starts.gradients()

    @contextmanager
    def _gradient_hooks(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Takes the gradients at the outputs of layers, which all require them."""

        def hook(name: str, layer: nn.Module) -> Callable[[nn.Module, object, Any], None]:
            def accumulate(gradient: Tensor) -> None:
                rows = output_rows(layer, gradient)
                self._moments.setdefault(name, OutputMoment(rows.shape[-1])).update(rows)

            def after(module: nn.Module, args: object, result: Any) -> None:
                if isinstance(result, Tensor) and result.requires_grad:
                    result.register_hook(accumulate)

            return after

        def require(name: str, layer: nn.Module, x: Tensor) -> Tensor | None:
            is_constant = x.is_floating_point() and not x.requires_grad
            return x.detach().requires_grad_() if is_constant else None

        handles = [
            layer.register_forward_hook(hook(name, layer))
            for name, layer in layers.items()
            if has_rows(layer)
        ]
        try:
            with input_hooks(layers, require):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Notes:
    """Of one call: the groups of layers that read the same tensor, and samples of their weights."""

    def __init__(
        self, result: Sensitivity, noted: set[str], later: Mapping[str, InputStatistics]
    ) -> None:
        self._result = result
        self._noted = noted
        self._later = later
        self._seen = 0
        self._last: tuple[nn.Module, Tensor] | None = None
        self._pivots: Tensor | None = None

    def visit(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Takes a layer that is about to run on ``x``; only its first call counts."""
        if name in self._noted:
            return
        self._noted.add(name)
        self._seen += 1
        if self._last is not None and x is self._last[1] and same_rows(self._last[0], layer):
            self._result.groups[-1].append(name)
        else:
            self._result.groups.append([name])
            self._last = (layer, x)
            rows = layer_rows(layer, x)
            self._pivots = None if rows is None else _pivots(rows, self._later.get(name))
        if self._pivots is not None:
            weight = matrix_of(layer)
            self._result.samples[name] = sample_weights(weight, self._pivots, seed=self._seen)


def _pivots(x: Tensor, later: InputStatistics | None) -> Tensor | None:
    """``L_kk`` of each input, in the inputs' own order; None where the second moment is unusable.

    Args:
        x: what a layer is run on first.
        later: of what it is run on after that.
    """
    statistics = InputStatistics(x.shape[-1], with_values=False, most_power=MOST_POWER)
    statistics.update(x)
    if later is not None:
        statistics.add(later)
    try:
        moment = statistics.second_moment
        order = rounding_order(moment)
        factor = cholesky_factor(moment[order][:, order])
    except ValueError:
        return None
    return factor.diagonal().float()[order.argsort()]
