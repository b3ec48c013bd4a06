"""The blocks of a model, such as its decoder layers: found by its structure alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from dcext.nn.matrix import is_multiplied, kind_of

STACKS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# A module beside a stack is a block too where it weighs at least this share of the stack's mean block.
LEAST_SHARE = 0.5


def block_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model. Nothing is run, and weights may be compressed or on the meta device.

    Blocks are the elements of the outermost stacks (``nn.ModuleList`` and the like) whose elements are made of several
    modules: those of decoder and encoder, of text, vision and audio. A module beside a stack that weighs as much as
    its blocks is one too (the middle of a UNet). Lists of bare linear layers are heads, and no stacks.

    Returns:
        By name, in the model's order, none within another; empty where the model has no stack.
    """
    return dict(_stacked(model, "", set()))


def num_multiplied(module: nn.Module) -> int:
    """How many weights a module multiplies its inputs by, those of its parts included."""
    matrices = [part.weight for part in module.modules() if is_multiplied(part)]
    return sum(matrix.numel() for matrix in matrices if isinstance(matrix, Tensor))


def _stacked(parent: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Blocks below a module: the elements of its stacks, what weighs as much beside them, and those further down."""
    children = [
        (f"{path}.{name}" if path else name, child) for name, child in parent.named_children()
    ]
    stacks = [(name, child) for name, child in children if _is_stack(child)]
    sizes = [
        num_multiplied(element)
        for _, stack in stacks
        for element in stack.children()
        if num_multiplied(element)
    ]
    for name, child in children:
        if id(child) in seen:
            continue  # the same module under another name
        seen.add(id(child))
        if (name, child) in stacks:
            for key, element in child.named_children():
                if id(element) not in seen and num_multiplied(element):
                    seen.add(id(element))
                    yield f"{name}.{key}", element
            continue
        below = list(_stacked(child, name, seen))
        if below:
            yield from below
        elif sizes and _is_composite(child) and num_multiplied(child) >= LEAST_SHARE * _mean(sizes):
            yield name, child


def _is_stack(module: nn.Module) -> bool:
    """Whether a container holds blocks: each made of several modules; of ``nn.Sequential``, more than one of these."""
    if not isinstance(module, STACKS):
        return False
    blocks = [
        child for child in module.children() if num_multiplied(child) and _has_children(child)
    ]
    return len(blocks) > (1 if isinstance(module, nn.Sequential) else 0)


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has several matrices and looks nothing up."""
    if isinstance(module, STACKS):
        return False
    kinds = [kind.name for kind in map(kind_of, module.modules()) if kind is not None]
    return len(kinds) > 1 and "embedding" not in kinds


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _mean(sizes: list[int]) -> float:
    return sum(sizes) / len(sizes)
