"""What stands between callers and Triton's products: casts under autocast, and exceptions instead of missing gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Activations in the dtype of the autocast that is active on their device, if one is, as ``nn.Linear`` takes them."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class _NoGradient(torch.autograd.Function):
    """The identity for an output, with a backward pass that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, y: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: expected arguments that do not require grad, got some that do: its kernels have no gradient"
        )


def without_gradient(name: str, y: Tensor, *inputs: Tensor | None) -> Tensor:
    """``y``, computed from ``inputs`` outside of autograd, such that backward raises where one of them requires grad."""
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _NoGradient.apply(name, y, *inputs) if tracked else y
