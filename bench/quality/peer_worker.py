"""Quantizes the linear layers of a model with a peer's own code, in the peers' environment (see peers.py).

    python peer_worker.py FOLDER --peer gptq --bits 4 --group-size 64

``FOLDER`` holds ``config.json`` and ``model.safetensors`` (a transformers causal language model, float32),
``layers.json`` (the names of the layers to quantize) and ``calibration.safetensors`` (``ids``, (windows, context)
int64). Writes ``weights.safetensors`` there: the dequantized weight of each layer in float32, by the layer's name, with
the bytes that the peer stores for all of them as metadata ``stored_nbytes``. Scales are float16 where the peer leaves
the choice. Imports nothing of this repository, and each peer only where it is used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# The weight that a layer computes with, and everything that is stored for it.
Quantized = tuple[Tensor, list[Tensor]]


def linear_of(weight: Tensor) -> nn.Linear:
    """A layer without bias, with this ``(out_features, in_features)`` weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def stored_tensors(weight: Any) -> list[Tensor]:
    """The tensors inside one of torchao's tensor subclasses."""
    names = [*weight.tensor_data_names, *weight.optional_tensor_data_names]
    return [tensor for name in names if (tensor := getattr(weight, name)) is not None]


def torchao_int8(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """One scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = linear_of(weight.half())
    quantize_(linear, Int8WeightOnlyConfig())
    return linear.weight.dequantize(), stored_tensors(linear.weight)


def torchao_int4(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """The CPU's int4 layout; its kernel, run on the identity, tells the weight that it computes with."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    linear = linear_of(weight.half())
    quantize_(linear, PrototypeInt4WeightOnlyConfig(group_size=group_size))
    identity = torch.eye(weight.shape[1], dtype=torch.float16)
    return linear(identity).T, stored_tensors(linear.weight)


def hqq(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """HQQ's defaults: groups along the rows, optimized scales and zeros."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    layer = HQQLinear(linear_of(weight), config, compute_dtype=torch.float16, device="cpu")
    metadata = [value for value in layer.meta.values() if isinstance(value, Tensor)]
    return layer.dequantize(), [layer.W_q, *metadata]


def nf4(weight: Tensor, bits: int, group_size: int, *, double: bool = False) -> Quantized:
    """NF4 of bitsandbytes; counted is what its checkpoints hold, the tables of codes included.

    Blocks run through the matrix row after row. Given as a matrix, bitsandbytes 0.50.2 stores the same codes, but its
    CPU kernel decodes them wrongly where the width is no multiple of the block; given flat it does not.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.half().flatten(), blocksize=group_size, quant_type="nf4", compress_statistics=double
    )
    stored = [packed, *state.as_dict(packed=True).values()]
    return dequantize_4bit(packed, state).view(weight.shape), stored


def nf4_double(weight: Tensor, bits: int, group_size: int) -> Quantized:
    """NF4 whose absolute maxima are quantized too."""
    return nf4(weight, bits, group_size, double=True)


BY_LAYER: dict[str, Callable[[Tensor, int, int], Quantized]] = {
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
    "hqq": hqq,
    "nf4": nf4,
    "nf4-double": nf4_double,
}


def load_model(folder: Path) -> nn.Module:
    """The float32 model in ``folder``, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or not set(missing) <= tied:
        raise ValueError(f"{folder}: expected the model's state, missing {missing}, {unexpected=}")
    return model.eval()


def run_gptq_(model: nn.Module, ids: Tensor, layers: list[str], bits: int, group_size: int) -> None:
    """GPTQ of llmcompressor with its defaults: each block is calibrated on the quantized ones before it."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    windows: Any = [
        {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
        for window in ids
    ]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    arguments = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=group_size, symmetric=False
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    ignore = [name for name in linears if name not in layers]
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())),  # wanted, not used
        dataset=DataLoader(windows, batch_size=None),
        recipe=GPTQModifier(config_groups={"linear": scheme}, ignore=ignore),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
    )


def packed_by_gptq(module: Any) -> Quantized:
    """A layer as compressed-tensors stores it: weights and zero points without gaps, scales as float16."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    names = ("weight", "weight_scale", "weight_zero_point")
    state = {name: getattr(module, name).detach() for name in names}
    state["weight_scale"] = state["weight_scale"].half().float()
    state = PackedQuantizationCompressor.compress(state, module.quantization_scheme)
    weight = PackedQuantizationCompressor.decompress(state, module.quantization_scheme)["weight"]
    return weight, [*{**state, "weight_scale": state["weight_scale"].half()}.values()]


def gptq(folder: Path, layers: list[str], bits: int, group_size: int) -> dict[str, Quantized]:
    """All layers, by name."""
    model = load_model(folder)
    ids = load_file(folder / "calibration.safetensors")["ids"]
    run_gptq_(model, ids, layers, bits, group_size)
    return {name: packed_by_gptq(model.get_submodule(name)) for name in layers}


def main() -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", choices=("gptq", *BY_LAYER), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    options = parser.parse_args()
    layers = json.loads((options.folder / "layers.json").read_text())
    arguments = (options.bits, options.group_size)
    with torch.no_grad():
        if options.peer == "gptq":
            quantized = gptq(options.folder, layers, *arguments)
        else:
            state = load_file(options.folder / "model.safetensors")
            quantize = BY_LAYER[options.peer]
            quantized = {name: quantize(state[f"{name}.weight"], *arguments) for name in layers}
    weights = {name: weight.float().contiguous() for name, (weight, _) in quantized.items()}
    nbytes = sum(tensor.nbytes for _, stored in quantized.values() for tensor in stored)
    save_file(weights, options.folder / "weights.safetensors", {"stored_nbytes": str(nbytes)})


if __name__ == "__main__":
    main()
