"""Decoders without experts: each builds on one table of fields that differ from the zoo's sizes."""

from typing import Any

from .family import LATENT, VOCABULARY, Family, of_transformers, text

WINDOWS = ["sliding_attention", "full_attention"]

FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": WINDOWS},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"layer_types": WINDOWS, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": WINDOWS, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "layer_types": WINDOWS,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {
        "layer_types": WINDOWS,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
    },
    "minicpm3": LATENT,
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "opt": {},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "starcoder2": {},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": {"layer_types": WINDOWS, "sliding_window": 8},
    "glm4": {},
    "smollm3": {},
    "granite": {},
    "nemotron": {},
    "persimmon": {},
    "xglm": {},
    "biogpt": {},
    "ctrl": {"dff": 128},
    "exaone4": {"layer_types": WINDOWS, "sliding_window": 8},
}

FAMILIES: list[Family] = [
    of_transformers(name, "decoders", "AutoModelForCausalLM", text, generates=True, **fields)
    for name, fields in FIELDS.items()
]
