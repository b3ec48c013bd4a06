"""Encoder-decoders of text."""

from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, of_transformers, text_to_text

FIELDS: dict[str, dict[str, Any]] = {
    "t5": {"decoder_start_token_id": 0},
    "t5_gated": {
        "model_type": "t5",
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "mt5": {},
    "umt5": {},
    "bart": {},
    "marian": {},
    "pegasus": {},
    "mbart": {},
    "m2m_100": {},
    "longt5": {
        "encoder_attention_type": "transient-global",
        "local_radius": 7,
        "global_block_size": 4,
    },
    "blenderbot": {},
    "prophetnet": {"num_encoder_layers": 2},
}


def first_token_global(model: nn.Module) -> dict[str, Tensor]:
    inputs = text_to_text(model)
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    return {**inputs, "global_attention_mask": mask}


FAMILIES: list[Family] = [
    of_transformers(
        "led",
        "encoder_decoders",
        "AutoModelForSeq2SeqLM",
        first_token_global,
        generates=True,
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    *(
        of_transformers(
            name,
            "encoder_decoders",
            "AutoModelForSeq2SeqLM",
            text_to_text,
            generates=True,
            **fields,
        )
        for name, fields in FIELDS.items()
    ),
]
