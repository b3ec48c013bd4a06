"""What compression does to a family: how much of it, how far outputs move, and whether files give the same back."""

from __future__ import annotations

import filecmp
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dcext
from dcext.find import make_filter, prepare_
from dcext.nn.compressed import compressed_modules
from dcext.nn.linear import CompressedLinear
from dcext.nn.matrix import matrix_of, set_matrix_

from .family import Family, generate

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"recipe": "int8"},
    "data-free": {"recipe": "data-free", "target_bits": 5.0},
    "rate": {"recipe": "rate", "target_bits": 5.0},
    "packed": {"recipe": "rate", "target_bits": 5.5, "codec": "packed"},
}
WINDOWS = 16  # times as many as the family's own inputs, to calibrate on


@dataclass
class Row:
    """One family under one recipe.

    Attributes:
        family: its name.
        group: decoders, vision ..
        recipe: of ``RECIPES``.
        coverage: compressed weights over those of all matrices.
        of_all: compressed weights over all.
        left: weights of matrices that stay float, by reason.
        bits: stored bits per weight of the compressed layers.
        error: of the outputs over the float model's (2-norm), W8A16.
        error_int8: the same with activations in int8, W8A8.
        computed: of the outputs over those of a float model with the same, dequantized weights, W8A16.
        fallbacks: layers that calibration said nothing usable about.
        loaded: whether the folder gives the same outputs back: by ``dcext``, by the automatic class, and the same bytes
            when it is saved again; None where the family is no transformers model.
        generates: whether ``generate`` ran; None where the family does not generate.
    """

    family: str
    group: str
    recipe: str
    coverage: float
    of_all: float
    left: dict[str, int]
    bits: float
    error: float
    error_int8: float
    computed: float
    fallbacks: int
    loaded: bool | None
    generates: bool | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def check_family(family: Family, recipe: str, folder: Path) -> Row:
    """Compresses, runs, saves and loads a family.

    Args:
        family: which.
        recipe: of ``RECIPES``.
        folder: an empty one.
    """
    model = family.model()
    inputs = family.inputs(model)
    expected = output(family, model, inputs)
    # Not a deep copy: modules of weight norm share their class with it, which loses a property when one is made plain.
    dequantized = family.model()
    compressed = _compress(model, recipe, calibration_of(inputs))
    dequantize_(dequantized, compressed)
    report = compressed.dcext_report
    found = output(family, compressed, inputs)
    return Row(
        family=family.name,
        group=family.group,
        recipe=recipe,
        coverage=report.matrix_coverage,
        of_all=report.coverage,
        left={k: v for k, v in report.left_by_reason().items() if not k.startswith("vectors")},
        bits=report.bits_per_weight(),
        error=distance(found, expected),
        computed=distance(found, output(family, dequantized, inputs)),
        fallbacks=sum(layer.fallback is not None for layer in report.layers),
        loaded=_round_trip(family, compressed, inputs, folder) if family.auto else None,
        generates=generate(compressed, inputs, 2) is not None if family.generates else None,
        # Last: it changes the model.
        error_int8=distance(output(family, quantize_activations_(compressed), inputs), expected),
    )


@torch.no_grad()
def output(family: Family, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A family's main output; its tensor is the caller's."""
    return family.output(model(**inputs)).clone()


def distance(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``, 2-norms."""
    return float((a - b).norm() / b.norm())


def _compress(model: nn.Module, recipe: str, calibration: dict[str, Tensor]) -> nn.Module:
    """The same model, its layers W8A16."""
    config = dcext.CompressionConfig(activations="none", **RECIPES[recipe])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compress_: ")  # low coverage: it is in the row
        return dcext.compress_(model, config, calibration if config.recipe == "rate" else None)


def quantize_activations_(compressed: nn.Module) -> nn.Module:
    """Makes layers W8A8: what ``activations="int8"`` in the configuration gives, which no payload depends on."""
    for layer in compressed_modules(compressed).values():
        if isinstance(layer, CompressedLinear):
            layer.activations = "int8"
    return compressed


def calibration_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """More windows like a family's inputs: other ids where those are drawn, other values where those are floats."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    alone = all(name in ("input_ids", "decoder_input_ids") for name in tensors)
    result = {}
    for name, tensor in tensors.items():
        repeated = tensor.repeat(WINDOWS, *[1] * (tensor.dim() - 1))
        if tensor.is_floating_point() and tensor.dim() > 1:
            noise = torch.randn(repeated.shape, generator=generator) * tensor.std()
            repeated = (repeated + noise) / 2**0.5
        elif alone:
            low, high = int(tensor.min()), int(tensor.max())
            repeated = torch.randint(low, high + 1, repeated.shape, generator=generator)
        repeated[: tensor.shape[0]] = tensor
        result[name] = repeated
    return result


def dequantize_(model: nn.Module, compressed: nn.Module) -> None:
    """Gives a float model the matrices that a compressed one of the same family stands for."""
    prepare_(model, make_filter(None, None, None))
    for name, layer in compressed_modules(compressed).items():
        module = model.get_submodule(name)
        set_matrix_(module, layer.dequantize().to(matrix_of(module).dtype))


def _round_trip(family: Family, model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> bool:
    import transformers

    dcext.save_pretrained(model, folder / "first")
    expected = output(family, model, inputs)
    ours = dcext.from_pretrained(folder / "first")
    theirs = getattr(transformers, family.auto).from_pretrained(folder / "first")
    theirs.save_pretrained(folder / "second")
    names = ("dcext.safetensors", "config.json")
    return (
        torch.equal(output(family, ours, inputs), expected)
        and torch.equal(output(family, theirs, inputs), expected)
        and all(
            filecmp.cmp(folder / "first" / name, folder / "second" / name, shallow=False)
            for name in names
        )
    )
