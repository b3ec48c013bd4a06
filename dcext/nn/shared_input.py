"""Layers of a decoder block that read the same input, run in one call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcext.nn.linear import DCLinear

# In decoder blocks of the Llama family: a norm, and all layers that read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


@dataclass
class _Run:
    """An input, and the outputs for it that layers have not asked for yet."""

    x: Tensor
    outputs: dict[DCLinear, Tensor]


class SharedInput:
    """Runs layers together when the first of them is called, and hands the others their outputs when they are.

    The input is quantized once, and one operator call does the work of several. Outputs are the same bits. They are
    found again by the identity of the input tensor, so it must not be changed in place between the calls of one group,
    which no model of ``FAMILIES`` does. Threads may run the model at the same time.
    """

    def __init__(self, layers: Sequence[DCLinear]) -> None:
        self.layers = tuple(layers)
        self._local = threading.local()

    def output(self, layer: DCLinear, x: Tensor) -> Tensor:
        """The output of ``layer``, one of the group, for ``x`` (..., in_features)."""
        run: _Run | None = getattr(self._local, "run", None)
        if run is None or run.x is not x or layer not in run.outputs:
            together = [other for other in self.layers if _goes_with(layer, other)]
            run = _Run(x, dict(zip(together, run_together(x, together), strict=True)))
        y = run.outputs.pop(layer)
        self._local.run = run if run.outputs else None
        return y


def run_together(x: Tensor, layers: Sequence[DCLinear]) -> list[Tensor]:
    """Outputs of layers with one ``col_scale`` and one kind of activations, outlier columns aside."""
    return torch.ops.dcext.linear_group(
        x,
        [layer.payload for layer in layers],
        [layer.row_scale for layer in layers],
        layers[0].col_scale,
        [layer.bias for layer in layers],
        layers[0].activations,
    )


def _goes_with(layer: DCLinear, other: DCLinear) -> bool:
    return other.activations == layer.activations and other.col_scale is layer.col_scale


def share_inputs_(model: nn.Module) -> nn.Module:
    """Makes compressed layers that read the same input run together, in decoder blocks of ``FAMILIES``.

    ``compress_`` and ``from_pretrained`` do this. A copy or a pickle of a model has to be given to it again.

    Args:
        model: any module. Modified in place.

    Returns:
        ``model``.
    """
    for block in model.modules():
        if type(block).__name__ not in FAMILIES:
            continue
        for names in READERS.values():
            layers = [block.get_submodule(name) for name in names]
            compressed = [layer for layer in layers if isinstance(layer, DCLinear)]
            if len(compressed) < 2:
                continue
            shared = SharedInput(compressed)
            for layer in compressed:
                layer.shared_input = shared
    return model
