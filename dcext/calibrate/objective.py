"""What the sensitivity pass takes the derivatives of: the likelihood of drawn labels, or a random sum of the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcext.calibrate.tree import tensors_in

FEATURES = (
    "image_embeds",
    "text_embeds",
    "last_hidden_state",
    "sample",
)  # of models without logits


def output_gradients(
    output: Any, is_tokens: bool, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Random derivatives of the loss by a model's outputs.

    Args:
        output: the model's. Of its ``..logits`` labels are drawn; where it has none, its features count, or else
            all its floating-point tensors; a bare tensor holds logits if the model was given tokens.
        is_tokens: whether it was.
        generator: of labels or noise.

    Returns:
        Tensors that require gradients, each with the derivative by it.
    """
    if isinstance(output, Tensor):
        chosen, is_logits = [output], is_tokens
    else:
        chosen, is_logits = _chosen(output)
    return [
        (
            tensor,
            (_nll_gradient if is_logits and _classes(tensor) > 1 else _noise)(
                tensor.detach(), generator
            ),
        )
        for tensor in chosen
        if tensor.requires_grad and tensor.numel()
    ]


def _chosen(output: Any) -> tuple[list[Tensor], bool]:
    """The tensors of an output that matter, and whether they are logits."""
    if isinstance(output, dict):
        logits = [value for key, value in output.items() if key.endswith("logits")]
        logits = [value for value in logits if isinstance(value, Tensor)]
        if logits:
            return logits, True
        features = [output[key] for key in FEATURES if isinstance(output.get(key), Tensor)]
        if features:
            return features, False
    return [t for t in tensors_in(output) if t.is_floating_point() and t.dim() > 1], False


def _classes(logits: Tensor) -> int:
    return logits.shape[_class_dim(logits)] if logits.dim() else 1


def _class_dim(logits: Tensor) -> int:
    """Logits over the pixels of images have their classes in front of height and width."""
    return 1 if logits.dim() == 4 else -1


def _nll_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``softmax(logits) - onehot(label)`` with a label drawn from the softmax for each token."""
    last = logits.movedim(_class_dim(logits), -1)
    p = last.float().softmax(-1).reshape(-1, last.shape[-1])
    cumulative = p.cumsum(-1)
    drawn = torch.rand((p.shape[0], 1), generator=generator) * cumulative[:, -1:]
    label = torch.searchsorted(cumulative, drawn).clamp_(max=p.shape[1] - 1)
    p.scatter_add_(1, label, torch.full_like(drawn, -1.0))
    return p.reshape(last.shape).to(logits.dtype).movedim(-1, _class_dim(logits))


def _noise(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator).to(output.dtype)
