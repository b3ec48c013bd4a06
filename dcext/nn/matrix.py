"""Which modules hold a matrix, and how their weight and their input are seen as ``(out_features, in_features)`` and rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (*_PLAIN_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)


@dataclass(frozen=True)
class MatrixKind:
    """A class of modules whose ``weight`` is a matrix, perhaps under another shape.

    Attributes:
        base: the class whose ``forward`` uses the weight; subclasses of it count too.
        name: ``"linear"``, ``"conv1d"`` (transformers' transposed linear layer), ``"conv"`` or ``"embedding"``.
        to_matrix: a view of a weight as ``(out_features, in_features)``.
        to_weight: the inverse, given the matrix and the shape of the weight.
    """

    base: type[nn.Module]
    name: str
    to_matrix: Callable[[Tensor], Tensor]
    to_weight: Callable[[Tensor, torch.Size], Tensor]


def _same(matrix: Tensor, shape: torch.Size | None = None) -> Tensor:
    return matrix


def _transposed(matrix: Tensor, shape: torch.Size | None = None) -> Tensor:
    return matrix.t()


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _unflat(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.view(shape)


@cache
def _kinds(has_conv1d: bool) -> tuple[MatrixKind, ...]:
    kinds = [
        MatrixKind(nn.Linear, "linear", _same, _same),
        MatrixKind(nn.Embedding, "embedding", _same, _same),
        *(MatrixKind(base, "conv", _flat, _unflat) for base in CONVOLUTIONS),
    ]
    if has_conv1d:
        base = sys.modules["transformers.pytorch_utils"].Conv1D
        kinds.append(MatrixKind(base, "conv1d", _transposed, _transposed))
    return tuple(kinds)


def kind_of(module: nn.Module) -> MatrixKind | None:
    """The kind of a module by its class; None where it is none that holds a matrix of a known meaning.

    Nothing is imported for it: a model that has a ``Conv1D`` of transformers has imported its module.
    """
    for kind in _kinds("transformers.pytorch_utils" in sys.modules):
        if isinstance(module, kind.base):
            return kind
    return None


def is_multiplied(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its matrix, rather than looking rows up."""
    kind = kind_of(module)
    return kind is not None and kind.name != "embedding"


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a float module as ``(out_features, in_features)``: detached, and a view where that is possible.

    Raises:
        TypeError: the module is of no ``MatrixKind``.
    """
    return _known(module).to_matrix(module.weight.detach())  # type: ignore[operator]


@torch.no_grad()
def set_matrix_(module: nn.Module, matrix: Tensor) -> None:
    """Overwrites the weight of a float module.

    Args:
        module: of a ``MatrixKind``.
        matrix: ``(out_features, in_features)``; cast to the dtype of the weight.
    """
    weight: Any = module.weight
    weight.copy_(_known(module).to_weight(matrix, weight.shape))


def input_rows(module: nn.Module, x: Tensor) -> Tensor | None:
    """The vectors that a module multiplies its matrix with, for an input.

    Args:
        module: a linear layer, ``Conv1D``, or convolution.
        x: what it is called with.

    Returns:
        ``(tokens, in_features)``, a view where that is possible; None where the input is not one list of such vectors:
        convolutions in groups, transposed ones, and those that are neither of size 1 nor over patches side by side.
    """
    kind = _known(module)
    if kind.name in ("linear", "conv1d"):
        return x.reshape(-1, x.shape[-1])
    patches = as_patches(module, x)
    return None if patches is None else patches.reshape(-1, patches.shape[-1])


def is_patchwise(module: nn.Module) -> bool:
    """Whether a convolution is a linear layer over patches that lie side by side, or over single positions."""
    if not isinstance(module, _PLAIN_CONVOLUTIONS) or module.groups != 1:
        return False
    sides = zip(module.kernel_size, module.stride, strict=True)
    side_by_side = module.kernel_size == module.stride or all(kernel == 1 for kernel, _ in sides)
    return (
        side_by_side
        and all(dilation == 1 for dilation in module.dilation)
        and not isinstance(module.padding, str)
        and all(padding == 0 for padding in module.padding)
    )


def as_patches(module: nn.Module, x: Tensor) -> Tensor | None:
    """The input of a patchwise convolution, cut up.

    Args:
        module: a convolution over ``d`` dimensions.
        x: ``(batch, channels, *sizes)`` or ``(channels, *sizes)``.

    Returns:
        ``(batch, *patches, channels * prod(kernel_size))`` or the same without batch; None for other convolutions.
    """
    if not is_patchwise(module):
        return None
    assert isinstance(module, _PLAIN_CONVOLUTIONS)
    dims = len(module.kernel_size)
    begin = x.dim() - dims  # of the sizes; the channels are before them
    for i, (kernel, stride) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
        if kernel == 1 and stride > 1:
            steps = torch.arange(0, x.shape[begin + i], stride, device=x.device)
            x = x.index_select(begin + i, steps)
        elif x.shape[begin + i] % kernel:
            x = x.narrow(begin + i, 0, x.shape[begin + i] // kernel * kernel)
    sizes = [
        part for i, k in enumerate(module.kernel_size) for part in (x.shape[begin + i] // k, k)
    ]
    x = x.reshape(*x.shape[:begin], *sizes)
    counts = [begin + 2 * i for i in range(dims)]
    kernels = [begin + 2 * i + 1 for i in range(dims)]
    return x.permute(*range(begin - 1), *counts, begin - 1, *kernels).flatten(begin - 1 + dims)


def _known(module: nn.Module) -> MatrixKind:
    kind = kind_of(module)
    if kind is None:
        raise TypeError(
            f"matrix: expected a linear layer, a convolution or an embedding, got {type(module).__name__}"
        )
    return kind
