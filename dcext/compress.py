"""Compression of a whole model, in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dcext.codec import encode
from dcext.config import CompressionConfig
from dcext.nn import DCEmbedding, DCLinear
from dcext.nn.compressed import CompressedModule, to_weight_memory
from dcext.quantize import quantize_absmax

FilterFn = Callable[[str, nn.Module], bool]
ProgressFn = Callable[[str, int], None]


def compressible_modules(
    model: nn.Module, filter_fn: FilterFn | None = None
) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules that ``compress_`` would replace, by name, in the model's order.

    Exactly ``nn.Linear`` and ``nn.Embedding``: a subclass may compute something else and is left alone.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
        and (filter_fn is None or filter_fn(name, module))
    }


def compress_(
    model: nn.Module,
    config: CompressionConfig | None = None,
    calibration: None = None,
    filter_fn: FilterFn | None = None,
    *,
    progress: ProgressFn | None = None,
) -> nn.Module:
    """Replaces linear layers and embeddings by compressed ones, one after the other.

    Modules that share a weight (a tied ``lm_head`` and embedding) share its payload: it is compressed and stored once.
    ``lm_head`` and embeddings are compressed like everything else unless ``filter_fn`` leaves them out; leave both of
    a tied pair out or neither. Each float weight is dropped as soon as its last owner is replaced, so that memory
    peaks at one layer above the model.

    Args:
        model: any module on the CPU. Modified in place, also when an exception ends the call halfway.
        config: what to do; the default is ``CompressionConfig()``.
        calibration: for recipes that need activations; recipe ``"int8"`` takes none.
        filter_fn: called with name and module; False leaves a module as it is.
        progress: called after each module with its name and its number of weights.

    Returns:
        ``model`` (a module that is itself an ``nn.Linear`` cannot be replaced in place: ValueError).

    Raises:
        ValueError: nothing to compress, a tied weight only half of which passes the filter, weights with NaN.
    """
    config = config or CompressionConfig()
    if calibration is not None:
        raise ValueError(f"compress_: calibration: recipe {config.recipe!r} takes none")
    modules = compressible_modules(model, filter_fn)
    if not modules or "" in modules:
        raise ValueError(
            "compress_: model: expected a module that contains nn.Linear or nn.Embedding, got "
            + (type(model).__name__ if "" in modules else "none that pass the filter")
        )
    owners = _weight_owners(model, modules)
    encoded: dict[int, tuple[Tensor, Tensor]] = {}
    for name in list(modules):
        module = modules.pop(name)
        weight_id = id(module.weight)
        if weight_id not in encoded:
            encoded[weight_id] = _encode_weight(name, module.weight, config)
        _replace(model, name, _compressed(module, *encoded[weight_id], config))
        owners[weight_id] -= 1
        if owners[weight_id] == 0:
            del encoded[weight_id]
        if progress is not None:
            progress(name, module.weight.numel())
        del module
    return model


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """All compressed modules of a model, by name; modules that share a payload all appear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedModule)}


def _weight_owners(
    model: nn.Module, modules: dict[str, nn.Linear | nn.Embedding]
) -> dict[int, int]:
    """How many of ``modules`` own each weight. The ids stay valid: the modules keep the weights alive."""
    owners: dict[int, int] = {}
    for module in modules.values():
        owners[id(module.weight)] = owners.get(id(module.weight), 0) + 1
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".weight")
        if id(parameter) in owners and owner not in modules:
            tied = [n for n, m in modules.items() if m.weight is parameter]
            raise ValueError(
                f"compress_: filter_fn: {tied[0]!r} is tied to {owner!r}, which is not compressed: "
                "expected both or neither"
            )
    return owners


def _encode_weight(name: str, weight: Tensor, config: CompressionConfig) -> tuple[Tensor, Tensor]:
    try:
        qweight, row_scale = quantize_absmax(weight, config.granularity)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return to_weight_memory(encode(qweight, config.codec, config.level)), row_scale


def _compressed(
    module: nn.Linear | nn.Embedding, payload: Tensor, row_scale: Tensor, config: CompressionConfig
) -> CompressedModule:
    dtype: torch.dtype = module.weight.dtype
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(f"compress_: max_norm: expected None, got {module.max_norm}")
        replacement: CompressedModule = DCEmbedding(
            payload, row_scale, None, dtype, module.padding_idx
        )
    else:
        replacement = DCLinear(payload, row_scale, None, module.bias, config.activations, dtype)
    return replacement.train(module.training)


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, replacement)
