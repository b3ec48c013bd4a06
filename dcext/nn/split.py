"""Parameters of modules turned into layers: 3-D stacks of expert weights, and matrices that a module uses itself.

A module that reads ``self.gate_up_proj[expert]`` goes on doing so: the attribute becomes a view (``dcext.nn.views``) of
the linear layers that hold its values now, so that they are calibrated, compressed and streamed as any others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from dcext.nn.derived import make_class
from dcext.nn.views import IS_ITEM, MatrixView, StackView, WeightView

ITEMS_SUFFIX = "_items"
# A smaller parameter does not become a layer: header and table of a payload take some 200 bytes.
FEWEST_WEIGHTS = 4096
FEWEST_SIDE = 16
SHAPES = "_dcext_split"
# Classes of transformers whose forward multiplies by stacks as they lie, x @ weight[expert], and do not say so.
_TRANSPOSED_STACKS = {
    ("Llama4TextExperts", "gate_up_proj"),
    ("Llama4TextExperts", "down_proj"),
    ("AriaGroupedExpertsGemm", "weight"),
    ("DbrxExpertGLU", "w2"),
}
# Classes that keep a stack as one matrix, and the attribute that counts the experts in it.
_FLAT_STACKS = {"DbrxExpertGLU": "moe_num_experts"}


@dataclass(frozen=True)
class Split:
    """How a parameter becomes layers.

    Attributes:
        count: of layers; None for one, which holds the parameter as a matrix of its last dimension's width.
        transposed: whether a layer's matrix is the transpose of what the module reads.
    """

    count: int | None
    transposed: bool

    def to_list(self) -> list[Any]:
        """JSON-ready."""
        return [self.count, self.transposed]


def splits_of(module: nn.Module) -> dict[str, Split]:
    """The parameters of a module that would become layers, by attribute; empty for layers and for small parameters."""
    found = {}
    name = type(module).__name__
    for attribute, parameter in module._parameters.items():
        if parameter is None or not parameter.is_floating_point() or attribute.endswith("bias"):
            continue
        sides = [size for size in parameter.shape if size > 1]
        if len(sides) < 2 or parameter.numel() < FEWEST_WEIGHTS:
            continue
        count = _stack_size(module, parameter)
        if count is None:
            if (
                parameter.shape[-1] >= FEWEST_SIDE
                and parameter.numel() // parameter.shape[-1] >= FEWEST_SIDE
            ):
                found[attribute] = Split(None, False)
            continue
        declared = bool(getattr(module, "is_transposed", False))
        found[attribute] = Split(count, declared or (name, attribute) in _TRANSPOSED_STACKS)
    return found


def _stack_size(module: nn.Module, parameter: Tensor) -> int | None:
    """How many matrices of experts a parameter holds; None where it holds none."""
    flat = _FLAT_STACKS.get(type(module).__name__)
    if flat is not None:
        return int(getattr(module, flat))
    if parameter.dim() != 3 or re.search("expert", type(module).__name__, re.IGNORECASE) is None:
        return None
    return parameter.shape[0] if min(parameter.shape[1:]) > 1 else None


def split_(module: nn.Module, splits: Mapping[str, Split]) -> None:
    """Turns parameters of a module into layers, in place; the values are not copied.

    The module becomes an instance of a subclass of its class; the layers of a parameter ``N`` are the ``nn.ModuleList``
    ``N_items``.

    Raises:
        ValueError: no such parameter, or one whose size the count does not divide.
    """
    attributes = {}
    for attribute, split in sorted(splits.items()):  # an order that a file can tell
        parameter = module._parameters.get(attribute)
        if parameter is None:
            raise ValueError(
                f"split: {attribute}: expected a parameter of {type(module).__name__}, found none"
            )
        attributes[attribute] = (parameter.shape, split.transposed, split.count is not None)
        items = nn.ModuleList(_layer(matrix) for matrix in _matrices(attribute, parameter, split))
        items.train(module.training)
        del module._parameters[attribute]
        module._modules[attribute + ITEMS_SUFFIX] = items
    module.__dict__.pop("_flat_weights", None)  # of a recurrent network, which would keep them
    module.__class__ = _split_class(type(module), tuple(sorted(attributes)))  # type: ignore[arg-type]
    module.__dict__[SHAPES] = attributes


def split_of(module: nn.Module) -> dict[str, Split]:
    """How the parameters of a module became layers; empty where none did."""
    attributes = module.__dict__.get(SHAPES, {})
    return {
        name: Split(len(_items(module, name)) if is_stack else None, transposed)
        for name, (_, transposed, is_stack) in attributes.items()
    }


def item_of(module: nn.Module, attribute: str, index: int, parameter: Tensor) -> Tensor:
    """The matrix of one layer that a parameter became.

    Args:
        module: after ``split_``.
        attribute: the name that the parameter had.
        index: of the layer.
        parameter: the values of the whole parameter.

    Returns:
        ``(out_features, in_features)``, a view.
    """
    return _matrices(attribute, parameter, split_of(module)[attribute])[index]


def _items(module: nn.Module, attribute: str) -> nn.ModuleList:
    return cast(nn.ModuleList, module._modules[attribute + ITEMS_SUFFIX])


def _matrices(attribute: str, parameter: Tensor, split: Split) -> list[Tensor]:
    values = parameter.detach()
    if split.count is None:
        return [values.reshape(-1, values.shape[-1])]
    if values.numel() % split.count or values.dim() not in (2, 3):
        raise ValueError(
            f"split: {attribute}: expected a stack of {split.count} matrices, found shape {tuple(values.shape)}"
        )
    stack = values.reshape(split.count, -1, values.shape[-1])
    return [matrix.t() if split.transposed else matrix for matrix in stack]


def _layer(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    setattr(layer, IS_ITEM, True)
    return layer


def _view(module: nn.Module, attribute: str) -> Tensor:
    shape, transposed, is_stack = module.__dict__[SHAPES][attribute]
    items = _items(module, attribute)
    if is_stack:
        return StackView.of(list(items), shape, transposed=transposed)
    return MatrixView.of(items[0], shape, transposed=False)


def _flat_weights(self: nn.Module) -> list[Tensor]:
    """What a recurrent network of torch multiplies with: plain tensors, decoded for each call."""
    tensors = [getattr(self, name) for name in cast(list[str], self._flat_weights_names)]
    return [tensor.decoded() if isinstance(tensor, WeightView) else tensor for tensor in tensors]


@cache
def _split_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    # use_experts_implementation of transformers chooses among implementations, of which some use whole stacks at once;
    # behind its wrapper is the module's own, which asks for one expert after the other.
    own_forward = getattr(base.forward, "__wrapped__", base.forward)

    @torch.compiler.disable
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own_forward(self, *args, **kwargs)

    members: dict[str, Any] = {"forward": forward}
    if issubclass(base, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, lambda self, value: None)
    for attribute in attributes:
        members[attribute] = property(lambda self, attribute=attribute: _view(self, attribute))  # type: ignore[misc]
    return make_class(base.__name__, (base,), members, _split_class, base, attributes)
