"""A family of models, made tiny: sizes by the fields of its config, weights that all count, seeded inputs."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[nn.Module], dict[str, Tensor]]

SEED = 0
VOCABULARY = 384
# Token ids below are special in some family: padding, begin, end, image.
FIRST_PLAIN_TOKEN = 8
IMAGE_TOKEN = 7

# What a config of transformers gets for each of these fields that it declares and its row does not set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "projection_size"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"), 192),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "ffn_hidden_size"), 192),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


# Multi-head latent attention: queries and keys through narrow matrices.
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: unique in the zoo; the model type of transformers, or the class of diffusers.
        group: file of the zoo that holds it.
        model: builds it, float32, in eval mode; the same weights at each call.
        inputs: keyword arguments of its forward, the same values at each call, batch of at least 2.
        output: picks the main output of what forward returned.
        generates: ``generate(model, inputs)`` works.
        auto: class of transformers that loads it; None if it is not of transformers.
        requires: package without which it cannot be built.
    """

    name: str
    group: str
    model: Callable[[], nn.Module]
    inputs: Inputs
    output: Callable[[Any], Tensor]
    generates: bool = False
    auto: str | None = None
    requires: str = "transformers"

    def missing(self) -> str | None:
        """Why it cannot be built here, or None."""
        return None if importlib.util.find_spec(self.requires) else f"requires {self.requires}"


def of_transformers(
    name: str,
    group: str,
    auto: str,
    inputs: Inputs,
    output: str | Callable[[Any], Tensor] = "logits",
    *,
    generates: bool = False,
    model_type: str | None = None,
    **fields: Any,
) -> Family:
    """A family by its config.

    Args:
        name, group, auto, inputs, generates: as in ``Family``.
        output: function, or name of a field of what forward returns.
        model_type: of transformers, where it is not the name.
        fields: of the config; they go before those of ``SIZES``.
    """
    pick = attrgetter(output) if isinstance(output, str) else output

    def build() -> nn.Module:
        import transformers

        config = tiny_config(model_type or name, fields)
        return getattr(transformers, auto).from_config(config)

    def model() -> nn.Module:
        return built(build)

    return Family(name, group, model, inputs, pick, generates, auto)


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, from a fixed seed, with matrices that count, without touching torch's state."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # So that memory that nobody initialises is NaN, not what happened to be there.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            model = build().float().eval()
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settle_(model)
    return model


# What a branch's gate is where a family starts with it shut, at zero.
OPEN_GATE = 0.5
# A matrix that multiplies by less than this (root mean square) says too little for a test of outputs.
LEAST_GAIN = 0.5
# Standard deviation of tables that are added: positions, relative biases, tokens.
TABLE_STD = 0.02


@torch.no_grad()
def settle_(model: nn.Module) -> None:
    """Draws anew what is constant or was never initialised, and scales up matrices made for larger widths.

    Families start with ``std = 0.02`` whatever the width, which at width 64 multiplies by 1/6, and
    some start a branch at zero. Biases at zero are drawn too: one that is lost should be seen.
    """
    convolutions = weights_of(model, nn.modules.conv._ConvNd)
    tables = weights_of(model, nn.Embedding)
    codebooks = [b for b in model.buffers() if b.is_floating_point() and is_matrix(b)]
    for parameter in [*model.parameters(), *filter(is_constant, codebooks)]:
        if not bool(parameter.isfinite().all()) or is_constant(parameter):
            if parameter.numel() == 1:
                parameter.fill_(OPEN_GATE)
            else:
                parameter.normal_(0, TABLE_STD)
        if is_matrix(parameter):
            least = TABLE_STD
            if id(parameter) not in tables:
                inner = parameter[0].numel() if id(parameter) in convolutions else fan(parameter)
                least = LEAST_GAIN / math.sqrt(inner)
            parameter.mul_(max(1.0, least / float(parameter.std())))


def is_constant(parameter: Tensor) -> bool:
    """All zero, or a matrix of one value; scales of norms, all one, are not meant."""
    first = parameter.flatten()[0]
    return bool((parameter == first).all()) and (is_matrix(parameter) or bool(first == 0))


def weights_of(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """``id`` of the weights of modules of that kind, but for those that are computed (weight norm)."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return {id(m._parameters["weight"]) for m in modules if "weight" in m._parameters}


def is_matrix(parameter: Tensor) -> bool:
    """At least two dimensions are longer than 1."""
    return sum(length > 1 for length in parameter.shape) >= 2


def fan(parameter: Tensor) -> float:
    """Of a matrix, or a stack of them, that may lie either way: geometric mean of both sides."""
    return math.sqrt(parameter.shape[-1] * parameter.shape[-2])


def tiny_config(model_type: str, own: dict[str, Any]) -> Any:
    """A config of transformers: ``own`` fields, then those of ``SIZES``, in each of its sub-configs too."""
    from transformers import CONFIG_MAPPING

    return tiny_config_of(CONFIG_MAPPING[model_type], own)


def tiny_config_of(config_class: Any, own: dict[str, Any]) -> Any:
    declared = {field.name for field in dataclasses.fields(config_class)}
    values = {name: size for name, size in SIZES.items() if name in declared} | own
    for name, sub_class in config_class.sub_configs.items():
        given = values.get(name, {})
        if isinstance(given, dict):
            values[name] = sub_config(sub_class, dict(given))
    return config_class(**values)


def sub_config(sub_class: Any, own: dict[str, Any]) -> Any:
    """``own`` names its model type where the parent takes any."""
    model_type = own.pop("model_type", None)
    if model_type is not None:
        return tiny_config(model_type, own)
    return tiny_config_of(sub_class, own) if dataclasses.is_dataclass(sub_class) else None


def tokens(batch: int = 2, length: int = 16, seed: int = SEED) -> Tensor:
    """``(batch, length)`` int64 ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (batch, length), generator=generator)


def noise(*shape: int, seed: int = SEED) -> Tensor:
    """Normal float32 of that shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def text_to_text(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1)}


def image(model: nn.Module) -> dict[str, Tensor]:
    """One image of the size that the config, or that of its tower, says; 32 x 32 where it says none."""
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 32)
    return {"pixel_values": noise(2, 3, size, size)}


def generate(model: nn.Module, inputs: dict[str, Tensor], new_tokens: int = 4) -> Tensor:
    """Ids of ``new_tokens`` more tokens, chosen greedily; what the inputs say of the decoder is left out."""
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    return model.generate(
        **prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
