"""``col_scale`` folded into the norm before it, where nothing else reads that norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcext.nn.linear import CompressedLinear

# In decoder blocks of the Llama family: a norm, and all layers that read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def fold_col_scales(block: nn.Module) -> list[str]:
    """Moves the ``col_scale`` of a block's layers into the weight of the norm that feeds them.

    ``norm(x) * col_scale`` is the norm with its weight multiplied, so nothing changes but the rounding of one float32
    product. It is done only where that holds: a decoder block whose class is known to feed the norm to exactly these
    layers, all of them compressed with the same ``col_scale``, and a norm whose weight is float32 (multiplied in
    bfloat16 or float16 it would lose digits).

    Args:
        block: a decoder block whose linear layers went through ``compress_``. Modified in place.

    Returns:
        Names, in the block, of the layers whose ``col_scale`` is gone.
    """
    if type(block).__name__ not in FAMILIES:
        return []
    folded: list[str] = []
    for norm_name, readers in READERS.items():
        weight = getattr(block.get_submodule(norm_name), "weight", None)
        layers = [block.get_submodule(name) for name in readers]
        scale = _shared_scale(layers)
        if scale is None or weight is None or weight.dtype != torch.float32:
            continue
        with torch.no_grad():
            weight.mul_(scale)
        for layer in layers:
            setattr(layer, "col_scale", None)  # noqa: B010  (a buffer)
        folded += readers
    return folded


def _shared_scale(layers: list[nn.Module]) -> Tensor | None:
    """The ``col_scale`` that all of them have; None where one has another, none, or columns outside its payload."""
    compressed = [layer for layer in layers if isinstance(layer, CompressedLinear)]
    scales = [layer.col_scale for layer in compressed if layer.outlier_index is None]
    if len(scales) != len(layers) or scales[0] is None:
        return None
    same = all(scale is not None and torch.equal(scale, scales[0]) for scale in scales)
    return scales[0] if same else None
