"""Encoders of text, most with their masked language model head."""

from typing import Any

from torch import Tensor, nn

from .family import Family, of_transformers, text, tokens

FIELDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm_roberta": {"model_type": "xlm-roberta"},
    "distilbert": {},
    "albert": {"embedding_size": 64},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 2},
    "deberta_v2": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "electra": {},
    "modernbert": {
        "layer_types": ["full_attention", "sliding_attention"],
        "local_attention": 8,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "mpnet": {},
    "camembert": {},
    "roformer": {},
    "fnet": {},
    "big_bird": {"attention_type": "original_full"},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 64,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "qk_channels": 64,
        "v_channels": 64,
    },
    "squeezebert": {},
    "esm": {"mask_token_id": 3},
    "nomic_bert": {},
}


def segments(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "token_type_ids": tokens(seed=1) % 2}


FAMILIES: list[Family] = [
    *(
        of_transformers(name, "encoders", "AutoModelForMaskedLM", text, **fields)
        for name, fields in FIELDS.items()
    ),
    # It generates only without types of tokens, and then a part of its attention is not used.
    of_transformers("xlnet", "encoders", "AutoModelForCausalLM", segments),
]
