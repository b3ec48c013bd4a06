"""How compressible a float model is: ranges, near-zero shares, entropies and ratios of its weights and layer inputs.

The tables of "When Compression Meets Model Compression" (arXiv:2502.15443) for any causal language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Block, Call, find_blocks, linear_layers, run_in_place, walk
from dcext.calibrate.inputs import calibrating, model_inputs
from dcext.calibrate.layers import input_hooks, layer_rows, same_rows
from dcext.calibrate.source import BlockSource
from dcext.calibrate.trace import trace_calls
from dcext.codec import encode, entropy
from dcext.find import find_matrices, input_embedding
from dcext.nn.matrix import matrix_of
from dcext.quantize.rounding import quantize_absmax
from dcext.quantize.statistics import InputStatistics

ProgressFn = Callable[[str, float], None]
# Running so many tokens takes about as long as coding the weights (one core, bfloat16).
TOKENS_PER_PASS = 512


@dataclass(frozen=True)
class Int8Size:
    """Values as INT8, and what zstd makes of them.

    Attributes:
        nbytes: as INT8, which is how many values there are.
        stored_nbytes: of the payload that ``dcext.encode`` gives, checksums included; scales are not counted.
        entropy_bits: order-0 entropy, bits per value; of several matrices, the mean over their values.
    """

    nbytes: int
    stored_nbytes: int
    entropy_bits: float

    @property
    def ratio(self) -> float:
        """``nbytes / stored_nbytes``."""
        return self.nbytes / self.stored_nbytes

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``ratio``, JSON-ready."""
        return {
            "nbytes": self.nbytes,
            "stored_nbytes": self.stored_nbytes,
            "entropy_bits": self.entropy_bits,
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class ValueAnalysis:
    """Floating-point values and their INT8.

    Attributes:
        minimum, maximum: of the values.
        near_zero: share of values that INT8 rounds to zero: of weights with one absmax scale per tensor, of inputs
            with one per token.
        int8: sizes by what has a scale of its own: ``"tensor"`` and ``"row"`` of weights, ``"token"`` of inputs.
    """

    minimum: float
    maximum: float
    near_zero: float
    int8: dict[str, Int8Size]

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return max(-self.minimum, self.maximum)

    @property
    def values(self) -> int:
        """How many values there are."""
        return next(iter(self.int8.values())).nbytes

    def to_dict(self) -> dict[str, Any]:
        """``min``, ``max``, ``absmax``, ``near_zero`` and ``int8``, JSON-ready."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "absmax": self.absmax,
            "near_zero": self.near_zero,
            "int8": {scales: size.to_dict() for scales, size in self.int8.items()},
        }


@dataclass(frozen=True)
class LayerAnalysis:
    """A linear layer or an embedding.

    Attributes:
        name: in the model.
        shape: ``(out_features, in_features)``; of an embedding ``(num_embeddings, embedding_dim)``.
        block: index of the decoder block that it is in; None for layers outside of the blocks.
        weight: of its weights.
        input: of what it was run on, over all tokens; None without a text, for layers outside of the blocks, and for
            those that no token reached.
        tied: names of the other layers that share the weight; they have no entry of their own.
    """

    name: str
    shape: tuple[int, int]
    block: int | None
    weight: ValueAnalysis
    input: ValueAnalysis | None = None
    tied: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The last component of the name, such as ``q_proj``."""
        return self.name.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ``kind`` and ``weights`` (their number), JSON-ready."""
        return {
            "name": self.name,
            "kind": self.kind,
            "block": self.block,
            "shape": list(self.shape),
            "weights": self.shape[0] * self.shape[1],
            "tied": list(self.tied),
            "weight": self.weight.to_dict(),
            "input": None if self.input is None else self.input.to_dict(),
        }


@dataclass(frozen=True)
class Total:
    """Several layers together: extremes, sums, and means over weights and over input values."""

    weight: ValueAnalysis
    input: ValueAnalysis | None

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``weights`` (their number), JSON-ready."""
        return {
            "weights": self.weight.values,
            "weight": self.weight.to_dict(),
            "input": None if self.input is None else self.input.to_dict(),
        }


@dataclass
class ModelAnalysis:
    """What ``analyze_model`` found.

    Attributes:
        layers: in the model's order.
        tokens: that were run through the model; 0 without a text.
    """

    layers: list[LayerAnalysis] = field(default_factory=list)
    tokens: int = 0

    @property
    def total(self) -> Total:
        """Over all layers; inputs over those that have them."""
        return _total(self.layers)

    @property
    def blocks(self) -> Total | None:
        """The same over the linear layers of the decoder blocks; None where there are none."""
        layers = [layer for layer in self.layers if layer.block is not None]
        return _total(layers) if layers else None

    def to_dict(self) -> dict[str, Any]:
        """``tokens``, ``layers``, ``blocks`` and ``total``, JSON-ready."""
        return {
            "tokens": self.tokens,
            "layers": [layer.to_dict() for layer in self.layers],
            "blocks": None if self.blocks is None else self.blocks.to_dict(),
            "total": self.total.to_dict(),
        }


@torch.no_grad()
def analyze_model(
    model: nn.Module, ids: Tensor | None = None, progress: ProgressFn | None = None
) -> ModelAnalysis:
    """Measures the weights of every linear layer and embedding and, on a text, the inputs of the blocks' linear layers.

    The text is run block by block, so that beside the model memory holds the activations of one block.

    Args:
        model: a float model on the CPU, in evaluation mode. Not modified.
        ids: ``(windows, tokens)`` int64 or int32 token ids; windows do not see each other. None for weights alone.
        progress: called with the name of what was just done and its share of all work; the shares add up to 1.

    Returns:
        The layers in the model's order; layers that share a weight appear once.

    Raises:
        ValueError: no linear layer or embedding; weights that are not on the CPU or not finite; ``ids`` of
            another shape, none, or outside of the vocabulary; inputs that are not finite; a model that does not call
            its blocks one after the other.
        TypeError: ``ids`` are not integers.
    """
    report = progress or (lambda name, share: None)
    owners = _owners(model)
    blocks = find_blocks(model)
    block_of = {name: i for i, block in enumerate(blocks) for name in linear_layers(block)}
    if ids is not None:
        _check_ids(model, ids)
    passes = 0.0 if ids is None else ids.numel() / TOKENS_PER_PASS
    total = sum(weight.numel() for weight, _ in owners.values())
    weights = {}
    for name, (weight, _) in owners.items():
        weights[name] = _analyze_weight(name, weight)
        report(name, weight.numel() / total / (1 + passes))
    inputs = {}
    if ids is not None:
        share = passes / (1 + passes)
        inputs = _analyze_inputs(model, blocks, ids, lambda name, part: report(name, part * share))
    layers = [
        LayerAnalysis(
            name,
            (weight.shape[0], weight.shape[1]),
            block_of.get(name),
            weights[name],
            inputs.get(name),
            tied,
        )
        for name, (weight, tied) in owners.items()
    ]
    return ModelAnalysis(layers, 0 if ids is None else ids.numel())


def _owners(model: nn.Module) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Each weight by the name of its first layer, with the names of the others that share it."""
    modules = find_matrices(model, lambda name, module: True, smallest_nbytes=0).modules
    if not modules:
        raise ValueError(
            f"analyze_model: model: expected linear layers or embeddings, found none in {type(model).__name__}"
        )
    sharing: dict[int, list[str]] = {}
    for name, module in modules.items():
        if module.weight.device.type != "cpu":
            raise ValueError(
                f"analyze_model: {name}: expected weights on the CPU, got {module.weight.device}"
            )
        sharing.setdefault(id(module.weight), []).append(name)
    return {
        first: (matrix_of(modules[first]), tuple(others)) for first, *others in sharing.values()
    }


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"analyze_model: ids: expected int64 or int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"analyze_model: ids: expected (windows, tokens), at least one, got {tuple(ids.shape)}"
        )
    size: int | None = getattr(input_embedding(model), "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        bound = "up" if size is None else str(size - 1)
        raise ValueError(f"analyze_model: ids: expected 0 to {bound}, got {low} to {high}")


def _analyze_weight(name: str, weight: Tensor) -> ValueAnalysis:
    sizes = {}
    near_zero = 0.0
    try:
        for granularity in ("tensor", "row"):
            qweight, _ = quantize_absmax(weight, granularity)
            sizes[granularity] = _size(qweight)
            if granularity == "tensor":
                near_zero = 1 - int(qweight.count_nonzero()) / qweight.numel()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    low, high = weight.aminmax()
    return ValueAnalysis(float(low), float(high), near_zero, sizes)


def _analyze_inputs(
    model: nn.Module, blocks: list[Block], ids: Tensor, progress: ProgressFn
) -> dict[str, ValueAnalysis]:
    """The inputs of the blocks' linear layers by name; layers that no token reached are missing."""
    inputs = model_inputs(model, ids)
    with calibrating(model):
        trace = trace_calls(model, blocks, BlockSource(), inputs, None)
        visitor = _InputVisitor()

        def on_call(call: Call) -> Any:
            with input_hooks(trace.layers(call.block), visitor.visit):
                output = run_in_place(call)
            progress(call.block.name, 1 / len(trace.sequence))
            return output

        walk(model, trace.blocks, inputs, on_call, None, len(trace.sequence))
    return {name: _merge(parts) for name, parts in visitor.parts.items()}


class _InputVisitor:
    """Analyzes what each layer is run on, once for neighbours that read the same tensor.

    Attributes:
        parts: by layer, one analysis for each time that it ran.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[ValueAnalysis]] = {}
        self._last: tuple[nn.Module, Tensor, ValueAnalysis] | None = None

    def visit(self, name: str, layer: nn.Module, x: Tensor) -> None:
        rows = layer_rows(layer, x)
        if rows is None or x.numel() == 0:
            return
        last = self._last
        if last is None or last[1] is not x or not same_rows(last[0], layer):
            self._last = last = (layer, x, _analyze_input(name, rows))
        self.parts.setdefault(name, []).append(last[2])


def _analyze_input(name: str, x: Tensor) -> ValueAnalysis:
    """Analyzes ``(..., K)`` inputs of a layer."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    statistics = InputStatistics(tokens.shape[1], with_moment=False)
    statistics.update(tokens)
    if not statistics.finite:
        raise ValueError(
            f"{name}: input: expected finite values, got NaN or infinity (computed in {x.dtype})"
        )
    low, high = tokens.aminmax()
    quantized, _ = torch.ops.dcext.quantize_activations(tokens, None)
    sizes = {"token": _size(quantized)}
    return ValueAnalysis(float(low), float(high), statistics.near_zero, sizes)


def _size(quantized: Tensor) -> Int8Size:
    payload = encode(quantized, codec="zstd")
    return Int8Size(quantized.numel(), payload.numel(), entropy(quantized))


def _total(layers: list[LayerAnalysis]) -> Total:
    inputs = [layer.input for layer in layers if layer.input is not None]
    return Total(_merge([layer.weight for layer in layers]), _merge(inputs) if inputs else None)


def _merge(parts: list[ValueAnalysis]) -> ValueAnalysis:
    """Extremes and sums over at least one part; near-zero share and entropy are means over values."""
    if len(parts) == 1:
        return parts[0]
    sizes = {}
    for scales in parts[0].int8:
        of_parts = [part.int8[scales] for part in parts]
        sizes[scales] = Int8Size(
            sum(size.nbytes for size in of_parts),
            sum(size.stored_nbytes for size in of_parts),
            _mean((size.entropy_bits, size.nbytes) for size in of_parts),
        )
    return ValueAnalysis(
        min(part.minimum for part in parts),
        max(part.maximum for part in parts),
        _mean((part.near_zero, part.values) for part in parts),
        sizes,
    )


def _mean(pairs: Iterable[tuple[float, int]]) -> float:
    pairs = list(pairs)
    return sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
