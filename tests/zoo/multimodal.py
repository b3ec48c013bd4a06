"""Images or sound and text in, text out: a tower, what joins it, and a decoder."""

from typing import Any

import torch
from torch import Tensor, nn

from .family import IMAGE_TOKEN, Family, Inputs, noise, of_transformers, tokens
from .hybrids import DELTA, LINEAR

AUTO = "AutoModelForImageTextToText"
IMAGE = {"image_token_index": IMAGE_TOKEN}


def prompt(images: int) -> Tensor:
    """``images`` placeholders, then text: ``(2, images + 12)``."""
    return torch.cat([torch.full((2, images), IMAGE_TOKEN), tokens(length=12)], dim=1)


def with_image(images: int, shape: tuple[int, ...] = (3, 32, 32), **more: Any) -> Inputs:
    """Inputs of a family that puts ``images`` vectors for one image of ``shape``; ``more`` by function."""

    def inputs(model: nn.Module) -> dict[str, Tensor]:
        made = {name: make() for name, make in more.items()}
        return {"input_ids": prompt(images), "pixel_values": noise(2, *shape), **made}

    return inputs


def patches(model: nn.Module) -> dict[str, Tensor]:
    """Two images of 4 x 4 patches, already cut: 4 tokens each after merging 2 x 2."""
    vision = model.config.vision_config
    length = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids = prompt(4)
    return {
        "input_ids": ids,
        "pixel_values": noise(2 * 16, length),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


LLAMA = {"model_type": "llama"}
QWEN = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 6}
CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
DEEPSTACK = {
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
}

ROWS: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "llava": (
        with_image(16),
        {**IMAGE, "vision_config": {**CLIP, "num_hidden_layers": 3}, "text_config": LLAMA},
    ),
    "paligemma": (
        with_image(16, token_type_ids=lambda: torch.zeros(2, 28, dtype=torch.int64)),
        {**IMAGE, "vision_config": SIGLIP, "text_config": {"model_type": "gemma"}},
    ),
    "gemma3": (
        with_image(4, token_type_ids=lambda: (prompt(4) == IMAGE_TOKEN).long()),
        {**IMAGE, "mm_tokens_per_image": 4, "vision_config": SIGLIP, "text_config": WINDOWS},
    ),
    "qwen2_vl": (
        patches,
        {
            **QWEN,
            "vision_config": {"embed_dim": 64, "mlp_ratio": 2},
            "text_config": {"rope_parameters": MROPE},
        },
    ),
    "qwen2_5_vl": (
        patches,
        {
            **QWEN,
            "vision_config": {
                "out_hidden_size": 64,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "text_config": {"rope_parameters": MROPE},
        },
    ),
    "qwen3_vl": (
        patches,
        {
            **QWEN,
            "vision_config": DEEPSTACK,
            "text_config": {"rope_parameters": MROPE},
        },
    ),
    "qwen3_5": (
        patches,
        {
            **QWEN,
            "vision_config": {"out_hidden_size": 64, "num_position_embeddings": 16},
            "text_config": {
                **DELTA,
                "num_hidden_layers": 4,
                "layer_types": LINEAR,
                "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            },
        },
    ),
    "qwen3_vl_moe": (
        patches,
        {
            **QWEN,
            "vision_config": DEEPSTACK,
            "text_config": {"rope_parameters": MROPE},
        },
    ),
    "mistral3": (
        with_image(4, image_sizes=lambda: torch.tensor([[32, 32]] * 2)),
        {
            **IMAGE,
            "vision_config": {"model_type": "pixtral"},
            "text_config": {"model_type": "mistral"},
        },
    ),
    "blip": (with_image(0), {"vision_config": {}, "text_config": {"encoder_hidden_size": 64}}),
    "idefics2": (
        with_image(4, (1, 3, 32, 32)),
        {
            "image_token_id": IMAGE_TOKEN,
            "vision_config": {},
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
            },
            "text_config": {"model_type": "mistral"},
        },
    ),
    "idefics3": (
        with_image(4, (1, 3, 32, 32)),
        {"image_token_id": IMAGE_TOKEN, "vision_config": {}, "text_config": LLAMA},
    ),
    "blip_2": (
        with_image(4),
        {
            **IMAGE,
            "model_type": "blip-2",
            "num_query_tokens": 4,
            "vision_config": {},
            "qformer_config": {"encoder_hidden_size": 64},
            "text_config": {"model_type": "opt"},
        },
    ),
    "mllama": (
        with_image(
            1,
            (1, 2, 3, 32, 32),
            aspect_ratio_ids=lambda: torch.ones(2, 1, dtype=torch.int64),
            aspect_ratio_mask=lambda: torch.ones(2, 1, 2, dtype=torch.int64),
            cross_attention_mask=lambda: torch.ones(2, 13, 1, 2, dtype=torch.int64),
        ),
        {
            **IMAGE,
            "vision_config": {
                "num_global_layers": 2,
                "vision_output_dim": 64 * 3,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0, 1],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        },
    ),
    "internvl": (
        with_image(4),
        {
            "image_token_id": IMAGE_TOKEN,
            "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
            "text_config": {"model_type": "qwen2"},
        },
    ),
    "git": (with_image(0), {"auto": "AutoModelForCausalLM", "vision_config": {}}),
}


def of_row(name: str, inputs: Inputs, fields: dict[str, Any]) -> Family:
    auto = fields.pop("auto", AUTO)
    return of_transformers(name, "multimodal", auto, inputs, generates=True, **fields)


FAMILIES: list[Family] = [
    of_row(name, inputs, dict(fields)) for name, (inputs, fields) in ROWS.items()
]
