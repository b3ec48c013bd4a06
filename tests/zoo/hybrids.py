"""State spaces, recurrences and their hybrids with attention: two layers of each kind."""

from typing import Any

from .family import LATENT, Family, of_transformers, text

MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
LINEAR = ["linear_attention", "full_attention"] * 2
# Gated delta rule, as of Qwen3-Next.
DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

FIELDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_mem_blocks": 2,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 16,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {**MAMBA2, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {
        **MAMBA2,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 64,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 64,
    },
    "recurrent_gemma": {"num_hidden_layers": 6, "attention_window_size": 8, "lru_width": 64},
    "rwkv": {"attention_hidden_size": 64},
    "qwen3_next": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR},
    "qwen3_5_text": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR},
    "kimi_linear": {
        **LATENT,
        "num_hidden_layers": 4,
        "layer_types": LINEAR,
        "q_lora_rank": None,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 1,
    },
    "minimax": {"num_hidden_layers": 4, "layer_types": LINEAR, "block_size": 8},
}

FAMILIES: list[Family] = [
    of_transformers(name, "hybrids", "AutoModelForCausalLM", text, generates=True, **fields)
    for name, fields in FIELDS.items()
]
