"""The blocks of a model: what is calibrated, replaced and run as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dcext.nn.matrix import is_multiplied, kind_of

STACKS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# A module beside a stack is a block too where it weighs at least this share of the stack's mean block.
LEAST_SHARE = 0.5


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
    """The blocks of a model, by its structure alone: nothing is run, and weights may be on the meta device.

    Blocks are the elements of the outermost stacks (``nn.ModuleList`` and the like) whose elements are made of several
    modules: those of decoder and encoder, of text, vision and audio. A module beside a stack that weighs as much as
    its blocks is one too (the middle of a UNet). How blocks are connected does not matter here: see ``walk``. Lists
    of bare linear layers are heads, and no stacks.

    Returns:
        In the model's order, none within another; the model itself as the only one (with an empty name) where it
        has no stack.
    """
    tied = tied_to_embeddings(model)
    seen: set[int] = set()
    found = [Block(name, module, tied) for name, module in _stacked(model, "", seen)]
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
    return [Block(name, module, block.tied) for name, module in parts if _weights(module)]


def _stacked(parent: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Blocks below a module: the elements of its stacks, what weighs as much beside them, and those further down."""
    children = [
        (f"{path}.{name}" if path else name, child) for name, child in parent.named_children()
    ]
    stacks = [(name, child) for name, child in children if _is_stack(child)]
    sizes = [
        _weights(element)
        for _, stack in stacks
        for element in stack.children()
        if _weights(element)
    ]
    for name, child in children:
        if id(child) in seen:
            continue  # the same module under another name
        seen.add(id(child))
        if (name, child) in stacks:
            for key, element in child.named_children():
                if id(element) not in seen and _weights(element):
                    seen.add(id(element))
                    yield f"{name}.{key}", element
            continue
        below = list(_stacked(child, name, seen))
        if below:
            yield from below
        elif sizes and _is_composite(child) and _weights(child) >= LEAST_SHARE * _mean(sizes):
            yield name, child


def _is_stack(module: nn.Module) -> bool:
    """Whether a container holds blocks: each made of several modules; of ``nn.Sequential``, more than one of these."""
    if not isinstance(module, STACKS):
        return False
    blocks = [child for child in module.children() if _weights(child) and _has_children(child)]
    return len(blocks) > (1 if isinstance(module, nn.Sequential) else 0)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has several matrices and looks nothing up."""
    if isinstance(module, STACKS):
        return False
    kinds = [kind.name for kind in map(kind_of, module.modules()) if kind is not None]
    return len(kinds) > 1 and "embedding" not in kinds


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _weights(module: nn.Module) -> int:
    """How many weights are multiplied in a module."""
    matrices = [part.weight for part in module.modules() if is_multiplied(part)]
    return sum(matrix.numel() for matrix in matrices if isinstance(matrix, Tensor))


def _mean(sizes: list[int]) -> float:
    return sum(sizes) / len(sizes)
