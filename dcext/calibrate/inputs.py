"""Calibration sets as what models are called with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Calibration = Tensor | Mapping[str, Tensor]
IDS = ("decoder_input_ids", "input_ids")


@dataclass(frozen=True)
class ModelInputs:
    """What a model is called with, over all windows.

    Attributes:
        tensors: by argument; the name ``""`` stands for the first positional one. Their first dimension counts windows,
            or a fixed number of rows for each (the patches of an image, all images cut into as many).
        windows: how many.
    """

    tensors: dict[str, Tensor]
    windows: int

    @property
    def tokens(self) -> int:
        """That the loss is summed over: ids (of the decoder, where there is one); windows for models without ids."""
        ids = [self.tensors[name] for name in IDS if name in self.tensors]
        return ids[0].numel() if ids else self.windows

    @property
    def has_ids(self) -> bool:
        """Whether these are tokens."""
        return not next(iter(self.tensors.values())).is_floating_point()

    def select(self, windows: slice) -> ModelInputs:
        """Some windows."""
        begin, end, _ = windows.indices(self.windows)
        rows = {name: tensor.shape[0] // self.windows for name, tensor in self.tensors.items()}
        parts = {name: t[begin * rows[name] : end * rows[name]] for name, t in self.tensors.items()}
        return ModelInputs(parts, end - begin)

    def spread(self, tokens: int) -> ModelInputs:
        """As many windows as hold at least so many tokens, spread evenly."""
        count = min(self.windows, -(-tokens * self.windows // self.tokens))
        index = torch.arange(count) * self.windows // count
        parts = {
            name: tensor.unflatten(0, (self.windows, -1))[index].flatten(0, 1)
            for name, tensor in self.tensors.items()
        }
        return ModelInputs(parts, count)

    def first_tokens(self, count: int) -> ModelInputs:
        """One window; where it holds nothing but token ids, its first few."""
        window = self.select(slice(0, 1))
        if any(name not in IDS for name in self.tensors):
            return window
        return ModelInputs({name: t[:, :count] for name, t in window.tensors.items()}, 1)

    def call(self, model: nn.Module) -> Any:
        """The model's output."""
        positional = [tensor for name, tensor in self.tensors.items() if name == ""]
        named: dict[str, Any] = {name: tensor for name, tensor in self.tensors.items() if name}
        if "use_cache" in _parameters(model):
            named["use_cache"] = False
        return model(*positional, **named)


def model_inputs(model: nn.Module, calibration: Calibration) -> ModelInputs:
    """A calibration set as what a model is called with.

    Args:
        model: whose it is.
        calibration: ``(windows, tokens)`` int64 token ids; float inputs ``(windows, ..)``, given as the first argument;
            or tensors by argument, such as ``{"input_features": .., "decoder_input_ids": ..}``, the first dimension of
            each the number of windows or a multiple of it. An encoder-decoder model that is given no
            ``decoder_input_ids`` reads ``input_ids`` shifted by its own rule there: it is calibrated on repeating text.

    Raises:
        ValueError: no tensor, tensors of unequal numbers of windows, or a decoder without ids.
    """
    if isinstance(calibration, Tensor):
        takes_ids = not calibration.is_floating_point() and "input_ids" in _parameters(model)
        tensors = {"input_ids" if takes_ids else "": calibration}
    else:
        tensors = dict(calibration)
    if not tensors or any(t.dim() == 0 or t.numel() == 0 for t in tensors.values()):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"calibration: expected tensors of one window or more, got {shapes}")
    counted = next((tensors[name] for name in reversed(IDS) if name in tensors), None)
    windows = next(iter(tensors.values())).shape[0] if counted is None else counted.shape[0]
    for name, tensor in tensors.items():
        if tensor.shape[0] % windows:
            raise ValueError(
                f"calibration: {name}: expected a multiple of {windows} windows, got {tensor.shape[0]}"
            )
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    takes_both = "decoder_input_ids" in _parameters(model)
    if is_encoder_decoder and takes_both and "decoder_input_ids" not in tensors:
        if "input_ids" not in tensors:
            raise ValueError(
                f"calibration: decoder_input_ids: {type(model).__name__} needs them beside {', '.join(tensors)}"
            )
        tensors["decoder_input_ids"] = shifted_ids(model, tensors["input_ids"])
    return ModelInputs(tensors, windows)


def shifted_ids(model: Any, ids: Tensor) -> Tensor:
    """Token ids moved right by one, behind the decoder's start token, as the model itself does with labels."""
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):
            return getattr(model, name)(ids)
    config = model.config
    own: Any = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    arguments = [config.pad_token_id, config.decoder_start_token_id]
    if own is not None and None not in arguments:
        return own(ids, *arguments[: len(inspect.signature(own).parameters) - 1])
    start = next((t for t in (arguments[1], config.bos_token_id, arguments[0]) if t is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """While entered, the model is in evaluation mode and keeps no cache; flags are given back by name."""
    training = {name: module.training for name, module in model.named_modules()}
    settings = [
        c for c in _configs(getattr(model, "config", None)) if getattr(c, "use_cache", False)
    ]
    model.eval()
    for config in settings:
        config.use_cache = False
    try:
        yield
    finally:
        for config in settings:
            config.use_cache = True
        for name, module in model.named_modules():
            module.training = training.get(name, model.training)
        if "" in training:
            model.training = training[""]


def _configs(config: Any) -> Iterator[Any]:
    """A transformers configuration and those that it is made of."""
    if config is None or not hasattr(config, "__dict__"):
        return
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from _configs(value)
