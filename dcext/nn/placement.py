"""Models on a device: moved there, their blocks decoded together, and asked whether they were damaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dcext.checks import check_model, torch_device
from dcext.errors import FormatError
from dcext.nn.blocks import block_modules
from dcext.nn.compressed import CompressedModule
from dcext.weights.indexed import IndexedWeight, decode_together

_BATCHED = "_dcext_decodes_together"


def batch_decodes(block: nn.Module) -> None:
    """Has the weights of a decoder block decoded in one launch whenever it is called, and dropped behind it.

    One matrix of a small model does not fill a GPU; seven do. Costs memory for all of them at a time. Modules that are
    on the CPU, or need no decoding, are left alone. A second call for the same block changes nothing.
    """
    if getattr(block, _BATCHED, False):
        return
    setattr(block, _BATCHED, True)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        layers = [
            (layer, layer.backing)
            for layer in module.modules()
            if isinstance(layer, CompressedModule) and isinstance(layer.backing, IndexedWeight)
        ]
        matrices = decode_together([weight for _, weight in layers])
        for (layer, _), matrix in zip(layers, matrices, strict=True):
            layer.decoded = matrix

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for layer in module.modules():
            if isinstance(layer, CompressedModule):
                layer.decoded = None

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after, always_call=True)


def compressed_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model (``dcext.nn.blocks``) that hold compressed layers, by name, in the model's order."""
    return {
        name: block
        for name, block in block_modules(model).items()
        if any(isinstance(module, CompressedModule) for module in block.modules())
    }


def blocks_of(model: nn.Module) -> dict[int, str]:
    """Names of ``compressed_blocks``, by the ``id`` of each module inside."""
    blocks = compressed_blocks(model).items()
    return {id(module): name for name, block in blocks for module in block.modules()}


def check_device(function: str, wanted_for: str, device: object) -> torch.device:
    """A device that torch finds.

    Args:
        function: that needs it, for the message.
        wanted_for: what needs it.
        device: as callers write it.

    Raises:
        TypeError, ValueError: no device.
        RuntimeError: it is a GPU and there is none.
    """
    found = torch_device(f"{function}: device", device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"{function}: device: expected a GPU for {wanted_for}, as torch finds none, got {str(device)!r}"
        )
    return found


def place(model: nn.Module, device: torch.device | str) -> None:
    """Moves a model to a device, and has each of its blocks decode in one launch if that is a GPU.

    Blocks are those of ``dcext.nn.blocks``.

    Raises:
        RuntimeError: torch finds no such device, or dcext was built without CUDA and weights are zstd.
    """
    check_model("place", model)
    device = torch_device("place: device", device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"place: device: expected 'cpu', as torch finds no GPU, got {str(device)!r}"
        )
    model.to(device)
    if device.type == "cpu":
        return
    for block in compressed_blocks(model).values():
        batch_decodes(block)


def raise_if_damaged(model: nn.Module) -> None:
    """Waits for the device, then reports what decoding has found since the model was moved there.

    Raises:
        FormatError: a layer's weights were damaged in memory.
    """
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule) and isinstance(module.backing, IndexedWeight):
            try:
                module.backing.raise_if_damaged()
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from None
