"""The blocks of a model: what is calibrated, replaced and run as one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dcext.nn.blocks import STACKS, block_modules, num_multiplied
from dcext.nn.matrix import is_multiplied, kind_of


@dataclass
class Block:
    """Part of a model that is run as one.

    Attributes:
        name: in the model; empty for the model itself.
        module: the block, or a copy of it.
        tied: names in the model of layers that share their weight with an embedding: no layers of the block.
    """

    name: str
    module: nn.Module
    tied: frozenset[str] = frozenset()


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model (``dcext.nn.blocks``), which may be on the meta device.

    Returns:
        In the model's order, none within another; the model itself as the only one (with an empty name) where it
        has no stack.
    """
    tied = tied_to_embeddings(model)
    found = [Block(name, module, tied) for name, module in block_modules(model).items()]
    return found or [Block("", model, tied)]


def whole_model(model: nn.Module) -> list[Block]:
    """The model as its only block."""
    return [Block("", model, tied_to_embeddings(model))]


def linear_layers(block: Block) -> dict[str, nn.Module]:
    """The modules in a block that multiply by a matrix, by their name in the model; tied ones are left out."""
    prefix = f"{block.name}." if block.name else ""
    named = {
        (prefix + name).rstrip("."): module
        for name, module in block.module.named_modules()
        if is_multiplied(module)
    }
    return {name: module for name, module in named.items() if name not in block.tied}


def tied_to_embeddings(model: nn.Module) -> frozenset[str]:
    """Names of the modules that multiply by the weight of an embedding."""
    matrices = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if kind_of(module) is not None
    ]
    looked_up = {_identity(module) for _, module in matrices if not is_multiplied(module)}
    return frozenset(
        name
        for name, module in matrices
        if is_multiplied(module) and _identity(module) in looked_up
    )


def owners(model: nn.Module) -> dict[str, str]:
    """For the name of each module with a matrix, the first name under which the model has its weight.

    Modules under several names and modules that share a weight have one owner.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(_identity(module), name)
        for name, module in model.named_modules(remove_duplicate=False)
        if is_multiplied(module)
    }


def _identity(module: nn.Module) -> int:
    """Tells weights apart; one that is computed anew each time (weight norm) belongs to its module alone."""
    weight = module._parameters.get("weight")
    return id(module if weight is None else weight)


def split_block(block: Block) -> list[Block]:
    """The parts of a block, for models that call these and never the block itself."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in block.module.named_children():
        path = f"{block.name}.{name}" if block.name else name
        if isinstance(child, STACKS) and not isinstance(child, nn.Sequential):
            parts += [(f"{path}.{i}", element) for i, element in child.named_children()]
        else:
            parts.append((path, child))
    return [Block(name, module, block.tied) for name, module in parts if num_multiplied(module)]
