"""PEFT on compressed models: what it cannot know about frozen weights that are encoded.

Adapters need none of this: a compressed layer is a ``nn.Linear``, ``Conv1D`` or ``nn.Embedding``, and PEFT takes it for one,
in LoRA, DoRA, IA3 and its other methods. What is added, once PEFT is imported (``dcext.integrations.registration``):

- ``merge_and_unload`` merges each adapter into a float copy of its layer and encodes that anew, and warns how much that
  changes weights and size. ``merge_adapter``, which promises that it can be undone, is refused.
- Modules of ``modules_to_save`` are float copies, which can be trained.
- Experts are linear layers of their own: ``target_modules="all-linear"`` takes them for such, ``target_parameters`` is
  refused for them. So is ``bias="all"`` and the like, for the biases of compressed layers are frozen.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dcext.find import splits_in
from dcext.nn.compressed import CompressedModule, compressed_modules
from dcext.nn.convert import encode_anew_, float_copy
from dcext.nn.matrix import matrix_of
from dcext.nn.split import ITEMS_SUFFIX

_IS_OURS = "_dcext_replacement"
_WAY_OUT = (
    "call merge_and_unload(), which encodes the merged weights anew, or unload(), which removes the adapters; "
    "dcext.nn.convert.float_copy makes a float model, into which they merge exactly"
)


@dataclass
class _Cost:
    """What encoding merged weights costs.

    Attributes:
        errors: per layer, the norm of what encoding changes over the norm of the merged weights.
        weights: number of weights.
        nbytes_before: stored bytes before.
        nbytes: stored bytes.
    """

    errors: list[float] = field(default_factory=list)
    weights: int = 0
    nbytes_before: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        before, after = (8 * n / self.weights for n in (self.nbytes_before, self.nbytes))
        mean = sum(self.errors) / len(self.errors)
        return (
            f"{len(self.errors)} layers with merged adapters were encoded anew, as INT8 per row: relative error of a "
            f"layer's weights {mean:.2%} on average, {max(self.errors):.2%} at most; {before:.2f} bits/weight before, "
            f"{after:.2f} now"
        )


def extend_tuners(module: ModuleType) -> None:
    """Extends ``peft.tuners.tuners_utils``, whose ``BaseTuner`` all methods with adapters in layers derive from."""
    tuner, layer = module.BaseTuner, module.BaseTunerLayer
    _replace(tuner, "_unload_and_optionally_merge", lambda own: _unload(own, layer))
    _replace(tuner, "merge_adapter", lambda own: _merge_adapter(own, layer))
    _replace(tuner, "inject_adapter", _inject_adapter)


def extend_modules_to_save(module: ModuleType) -> None:
    """Extends ``peft.utils.other``."""
    _replace(module.ModulesToSaveWrapper, "update", _update_saved)


def extend_conversion(module: ModuleType) -> None:
    """Extends ``peft.utils.transformers_weight_conversion``."""
    _replace(module, "convert_peft_config_for_transformers", _convert_config)


def _replace(
    kind: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    own = getattr(kind, name, None)
    if own is None:
        warnings.warn(
            f"dcext: expected PEFT 0.18 or newer, got one without {kind.__name__}.{name}: adapters on compressed layers can "
            "be trained, but not merged",
            stacklevel=2,
        )
    elif not hasattr(own, _IS_OURS):
        replacement = functools.wraps(own)(make(own))
        setattr(replacement, _IS_OURS, True)
        setattr(kind, name, replacement)


def _adapted(model: nn.Module, layer_class: type) -> dict[str, Any]:
    """The layers of PEFT around compressed ones, by name."""
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, layer_class)}
    return {n: m for n, m in layers.items() if isinstance(m.get_base_layer(), CompressedModule)}


def _unload(own: Callable[..., Any], layer_class: type) -> Callable[..., Any]:
    def unload_and_optionally_merge(
        self: Any, merge: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        layers = _adapted(self.model, layer_class) if merge else {}
        if not layers:
            return own(self, merge, *args, **kwargs)
        cost = _Cost()
        with _merging_encodes(list(layers.values()), cost):
            unloaded = own(self, merge, *args, **kwargs)
        if cost.errors:
            warnings.warn(str(cost), stacklevel=3)
        return unloaded

    return unload_and_optionally_merge


@contextmanager
def _merging_encodes(layers: list[Any], cost: _Cost) -> Iterator[None]:
    """While entered, ``layer.merge`` of each layer ends with a compressed layer that holds the merged weights."""
    for layer in layers:
        layer.__dict__["merge"] = _encoding_merge(layer, layer.merge, cost)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["merge"]


def _encoding_merge(layer: Any, merge: Callable[..., None], cost: _Cost) -> Callable[..., None]:
    def merge_and_encode(*args: Any, **kwargs: Any) -> None:
        holder = _holder(layer)
        compressed, merged_before = holder.base_layer, list(layer.merged_adapters)
        holder.base_layer = float_copy(compressed)
        try:
            merge(*args, **kwargs)
            if layer.merged_adapters != merged_before:
                _encode(compressed, holder.base_layer, cost)
        finally:
            holder.base_layer = compressed

    return merge_and_encode


def _holder(layer: Any) -> Any:
    """The layer whose ``base_layer`` is the compressed one: that itself, or the innermost of several."""
    while not isinstance(layer.base_layer, CompressedModule):
        layer = layer.base_layer
    return layer


def _encode(compressed: CompressedModule, merged: nn.Module, cost: _Cost) -> None:
    wanted = matrix_of(merged).float()
    cost.nbytes_before += compressed.stored_nbytes
    encode_anew_(compressed, merged)
    cost.weights += compressed.num_weights
    cost.nbytes += compressed.stored_nbytes
    error: Tensor = compressed.dequantize().float() - wanted
    norm = torch.linalg.vector_norm(wanted).item()
    cost.errors.append(torch.linalg.vector_norm(error).item() / norm if norm else 0.0)


def _merge_adapter(own: Callable[..., None], layer_class: type) -> Callable[..., None]:
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in _adapted(self.model, layer_class):
            raise ValueError(
                f"merge_adapter: {name}: expected float weights, got compressed ones, which merging would change for good: "
                + _WAY_OUT
            )
        own(self, *args, **kwargs)

    return merge_adapter


def _inject_adapter(own: Callable[..., Any]) -> Callable[..., Any]:
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.peft_config[adapter_name]
        _check_bias(getattr(config, "bias", "none"), model)
        _check_parameters(config, model)
        return own(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _convert_config(own: Callable[..., None]) -> Callable[..., None]:
    def convert_peft_config_for_transformers(
        peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        # It makes a pattern a list of last names, and those of experts the stacks that they are in transformers 5.
        if not (splits_in(model) and isinstance(peft_config.target_modules, str)):
            own(peft_config, model, *args, **kwargs)
            _check_parameters(peft_config, model)

    return convert_peft_config_for_transformers


def _check_bias(bias: str, model: nn.Module) -> None:
    for name, module in compressed_modules(model).items():
        if bias != "none" and module._buffers.get("bias") is not None:
            raise ValueError(
                f"bias: expected 'none', got {bias!r}: {name} is compressed, and its bias frozen (lora_bias=True trains "
                "one beside it)"
            )


def _check_parameters(config: Any, model: nn.Module) -> None:
    targets = tuple(getattr(config, "target_parameters", None) or ())
    for name, splits in splits_in(model).items() if targets else ():
        for attribute in splits:
            if f"{name}.{attribute}".endswith(targets):
                raise ValueError(
                    f"target_parameters: expected float parameters, got {attribute!r} of {name}, whose matrices are "
                    "compressed layers: expected target_modules that match these, such as 'all-linear' or "
                    rf"r'.*\.{attribute}{ITEMS_SUFFIX}\.\d+'"
                )


def _update_saved(own: Callable[..., None]) -> Callable[..., None]:
    def update(self: Any, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        is_new = adapter_name not in self.modules_to_save and tied_module is None
        if is_new and compressed_modules(self.original_module):
            self.modules_to_save[adapter_name] = float_copy(self.original_module)
        own(self, adapter_name, tied_module=tied_module, **kwargs)

    return update
