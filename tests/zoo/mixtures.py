"""Mixtures of experts: four experts, two per token, in two layers or more."""

from typing import Any

from torch import Tensor, nn

from .family import LATENT, Family, of_transformers, text, tokens

# A dense layer and two sparse ones, chosen by groups of experts.
LATENT_SPARSE = {**LATENT, "first_k_dense_replace": 1, "num_hidden_layers": 3, "topk_group": 1}

FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "deepseek_v2": {**LATENT_SPARSE, "n_group": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT_SPARSE, "n_routed_experts": 8, "n_group": 2},
    "deepseek_v32": {
        **LATENT_SPARSE,
        "n_group": 2,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 4,
    },
    "longcat_flash": {
        **LATENT,
        "head_dim": 8,
        "num_layers": 2,
        "num_hidden_layers": 4,  # attention twice per layer
        "expert_ffn_hidden_size": 64,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "glm4_moe": {"first_k_dense_replace": 1, "num_hidden_layers": 3, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"sliding_window": 8},
    "llama4_text": {
        "intermediate_size_mlp": 128,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 64},
    "phimoe": {},
    "olmoe": {},
    "flex_olmo": {},
    "jetmoe": {"kv_channels": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "minimax_m2": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "num_hidden_layers": 3,
    },
    "hunyuan_v1_moe": {},
    "dots1": {
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_group": 1,
        "topk_group": 1,
    },
}

TEXT_TO_TEXT: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
    },
    "nllb_moe": {
        "model_type": "nllb-moe",
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}


def long_text_to_text(model: nn.Module) -> dict[str, Tensor]:
    """Enough tokens that each expert is chosen."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=64, seed=1)}


FAMILIES: list[Family] = [
    *(
        of_transformers(name, "mixtures", "AutoModelForCausalLM", text, generates=True, **fields)
        for name, fields in FIELDS.items()
    ),
    *(
        of_transformers(
            name, "mixtures", "AutoModelForSeq2SeqLM", long_text_to_text, generates=True, **fields
        )
        for name, fields in TEXT_TO_TEXT.items()
    ),
]
