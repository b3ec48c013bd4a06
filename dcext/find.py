"""What of a model can be compressed, what cannot, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize, prune, remove_weight_norm
from torch.nn.utils.weight_norm import WeightNorm

from dcext.checks import check_type
from dcext.nn.compressed import CompressedModule
from dcext.nn.matrix import kind_of
from dcext.nn.split import ITEMS_SUFFIX, Split, split_, split_of, splits_of
from dcext.quantize.report import EXCLUDED, VECTOR, LeftFloat

FilterFn = Callable[[str, nn.Module], bool]
SMALLEST_NBYTES = 512  # of a float matrix: with header and scales it would hardly get smaller
MOST_ROUTED = 1024  # experts; a larger matrix is no router, whatever its name

# Children of PEFT's modules that hold what an adapter is added to.
_WRAPPED_BY_PEFT = ("base_layer", "original_module", "base_model", "model")

ROUTER = "a router: its errors would send tokens to other experts"
SMALL = f"a matrix below {SMALLEST_NBYTES} bytes"
NARROW = "a convolution with few weights per channel"
FEWEST_COLUMNS = 8  # of a convolution: a scale per row takes as much as two weights
RENORMALIZED = "an embedding that renormalizes its rows (max_norm)"
ADAPTER = "an adapter that is being trained"
TIED = "tied to a parameter that is not compressed"
BARE = "a parameter that is too small or no matrix"


@dataclass
class Found:
    """The outcome of a search.

    Attributes:
        modules: what can be compressed, by name, in the model's order.
        reasons: why a module's ``weight`` cannot, or a parameter, by name.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def prepare_(model: nn.Module, passes: FilterFn) -> None:
    """Gives a model the form in which all its matrices are layers: in place, outputs stay the same.

    - Masks of ``torch.nn.utils.prune``, weight norms and other parametrizations of layers become part of the weight.
    - Stacks of expert weights, and large matrices that a module uses itself, become layers (``dcext.nn.split``).

    Args:
        model: any.
        passes: called with the name of a layer, or of a parameter, and its module; False leaves it as it is.
    """
    shared = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    for name, module in list(model.named_modules()):
        is_layer = kind_of(module) is not None and passes(name, module)
        if is_layer and _obstacle(name, module, model) is None:
            bake_(module)
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None or ".parametrizations." in name:
            continue
        if _keeps_parameters(module) or _is_router(name, module, model):
            continue
        splits = {
            attribute: split
            for attribute, split in splits_of(module).items()
            if shared[id(module._parameters[attribute])] == 1
            and passes(f"{name}.{attribute}".lstrip("."), module)
        }
        if splits:
            split_(module, splits)


def bake_(module: nn.Module) -> None:
    """Makes what computes a layer's weight from other parameters, masks or norms part of the weight itself."""
    if parametrize.is_parametrized(module, "weight"):
        # torch takes the attribute from the module's class, which copies of the module share: it gets one of its own.
        kind = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for key, left in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(left, "hook", left)
            if "_weight_norm_compat_hook" in getattr(hook, "__qualname__", ""):  # stays behind
                del module._load_state_dict_pre_hooks[key]
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            prune.remove(module, "weight")
        elif isinstance(hook, WeightNorm) and hook.name == "weight":
            remove_weight_norm(module, "weight")


def _keeps_parameters(module: nn.Module) -> bool:
    """Whether a module reads its parameters in ways that no view can serve, or has none worth it."""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict, CompressedModule)):
        return True
    return _is_norm(module) or type(module).__module__.startswith("peft.")


def _is_norm(module: nn.Module) -> bool:
    return re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def find_matrices(
    model: nn.Module, passes: FilterFn, smallest_nbytes: int = SMALLEST_NBYTES
) -> Found:
    """All layers of a prepared model that can be compressed: linear layers, convolutions, embeddings and subclasses.

    Args:
        model: after ``prepare_``.
        passes: as for ``prepare_``.
        smallest_nbytes: smaller float matrices are left out.
    """
    found = Found()
    for name, module in model.named_modules():
        if kind_of(module) is None or isinstance(module, CompressedModule):
            continue
        reason = (
            EXCLUDED
            if not passes(_name_for_filter(name), module)
            else _obstacle(name, module, model, smallest_nbytes)
        )
        if reason is None:
            found.modules[name] = module
        else:
            found.reasons[f"{name}.weight"] = reason
    return found


def _name_for_filter(name: str) -> str:
    """The name of the parameter that a layer was made from, where it was."""
    return re.sub(rf"{ITEMS_SUFFIX}\.\d+$", "", name)


def _obstacle(
    name: str, module: nn.Module, model: nn.Module, smallest_nbytes: int = SMALLEST_NBYTES
) -> str | None:
    weight = getattr(module, "weight", None)  # or what a parametrization computes
    if weight is None or weight.dim() < 2 or not weight.is_floating_point():
        return BARE
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return RENORMALIZED
    if _is_adapter(name, model):
        return ADAPTER
    if _is_router(name, module, model):
        return ROUTER
    if getattr(module, "groups", 1) > 1 and weight[0].numel() < FEWEST_COLUMNS:
        return NARROW
    return SMALL if weight.numel() * weight.element_size() < smallest_nbytes else None


def _ancestors(name: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module lies in, from the inside out, without the model."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _is_router(name: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether a module, or one that it lies in, chooses experts; by its name, as the models of transformers have them."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.shape[0] > MOST_ROUTED:
        return False
    above = list(_ancestors(name, model))
    if any(re.search("Router|TopKGat|NoisyGate", type(m).__name__) for m in [module, *above[:1]]):
        return True
    is_gate = name.rpartition(".")[2] in ("gate", "router", "wg")
    parent = above[0] if above else model
    return is_gate and any("expert" in child for child in parent._modules)


def _is_adapter(name: str, model: nn.Module) -> bool:
    """Whether a module belongs to an adapter of PEFT: it lies in a module of PEFT, and not in what that one wraps."""
    *path, child = f"model.{name}".split(".")
    for ancestor in [*_ancestors(name, model), model]:
        if type(ancestor).__module__.startswith("peft."):
            return child not in _WRAPPED_BY_PEFT
        *path, child = path
    return False


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that looks up the token ids of a transformers model; None where it has none, or does not say."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:  # transformers does not know of one, as in DETR and CLIP
        return None


def left_float(model: nn.Module, reasons: dict[str, str]) -> list[LeftFloat]:
    """Every parameter that a model still has after compression, and why; parameters that share memory count once.

    Args:
        model: after compression.
        reasons: from ``find_matrices``.
    """
    left = []
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        reason = reasons.get(name)
        if reason is None:
            reason = _reason_of_parameter(name, parameter, model)
        left.append(LeftFloat(name, parameter.numel(), parameter.nbytes, reason))
    return left


def _reason_of_parameter(name: str, parameter: nn.Parameter, model: nn.Module) -> str:
    sides = [size for size in parameter.shape if size > 1]
    if len(sides) < 2 or name.endswith("bias"):
        return VECTOR
    module = model.get_submodule(name.rpartition(".")[0])
    if _is_norm(module):
        return VECTOR
    return ROUTER if _is_router(name.rpartition(".")[0], module, model) else BARE


def splits_in(model: nn.Module) -> dict[str, dict[str, Split]]:
    """Which parameters of a model became layers: by module, by attribute."""
    return {name: split for name, m in model.named_modules() for split in [split_of(m)] if split}


def make_filter(filter_fn: FilterFn | None, include: str | None, exclude: str | None) -> FilterFn:
    """One filter of three.

    Args:
        filter_fn: as for ``compress_``, or None.
        include: a regular expression; only names in which it is found pass. None for all.
        exclude: a regular expression; names in which it is found do not pass.

    Raises:
        TypeError: a pattern that is no text.
        ValueError: not a regular expression.
    """
    patterns = {}
    for option, pattern in (("include", include), ("exclude", exclude)):
        check_type(f"compress_: {option}", pattern, (str, type(None)), "a regular expression")
        try:
            patterns[option] = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"compress_: {option}: expected a regular expression, got {pattern!r}: {error}"
            ) from None
    wanted, unwanted = patterns["include"], patterns["exclude"]

    def passes(name: str, module: nn.Module) -> bool:
        if wanted is not None and wanted.search(name) is None:
            return False
        if unwanted is not None and unwanted.search(name) is not None:
            return False
        return filter_fn is None or filter_fn(name, module)

    return passes
