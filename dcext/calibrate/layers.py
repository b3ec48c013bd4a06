"""What the layers of a block are run on and give, as rows that their matrices are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcext.nn.matrix import CONVOLUTIONS, input_rows, is_patchwise, kind_of, set_matrix_


@contextmanager
def input_hooks(
    layers: dict[str, nn.Module], on_input: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``on_input`` before a layer runs; a tensor that it returns replaces the input.

    Args:
        layers: by name.
        on_input: given the name, the layer, and its input, whether that is an argument or a keyword.
    """

    def hook(name: str) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            key = next((k for k, value in given.items() if isinstance(value, Tensor)), None)
            if key is None:
                return None
            replaced = on_input(name, module, given[key])
            if replaced is None:
                return None
            given[key] = replaced
            return tuple(given[i] for i in range(len(args))), {k: given[k] for k in kwargs}

        return before

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def same_rows(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers multiply the same vectors when they are called with the same tensor."""
    shapes = [
        (layer.kernel_size, layer.stride) if isinstance(layer, CONVOLUTIONS) else None
        for layer in (a, b)
    ]
    return shapes[0] == shapes[1] and has_rows(a) and has_rows(b)


def has_rows(layer: nn.Module) -> bool:
    """Whether the inputs of a layer are one list of vectors that it multiplies."""
    return is_patchwise(layer) if isinstance(layer, CONVOLUTIONS) else True


def layer_rows(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The vectors that a layer multiplies, ``(.., in_features)``; None where it has no such list."""
    return input_rows(layer, x) if isinstance(layer, CONVOLUTIONS) else x


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's outputs, or derivatives by them, as ``(.., out_features)``."""
    if isinstance(layer, CONVOLUTIONS):
        return y.movedim(y.dim() - len(layer.kernel_size) - 1, -1)
    return y


@torch.no_grad()
def write_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Overwrites the weight of a layer, also of one under weight norm or another parametrization with an inverse."""
    kind = kind_of(layer)
    if kind is None or not parametrize.is_parametrized(layer, "weight"):
        set_matrix_(layer, matrix)
        return
    weight: Any = layer.weight
    layer.weight = kind.to_weight(matrix, weight.shape).to(weight.dtype)
