"""Models of images, alone and beside a tower of text."""

from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, image, noise, of_transformers, text, tokens

STAGES = {"depths": [2, 2], "num_heads": [4, 4]}
TOWERS = {"text_config": {}, "vision_config": {}}


def image_and_text(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(), **image(model)}


def ordered_image(model: nn.Module) -> dict[str, Tensor]:
    """An image, and by what its 16 patches are ordered before the last of them are masked."""
    return {**image(model), "noise": noise(2, 16, seed=1)}


def prompted_image(model: nn.Module) -> dict[str, Tensor]:
    """An image, two points in it and a mask."""
    points = torch.tensor([[[[4.0, 9.0], [20.0, 14.0]]]] * 2)
    labels = torch.tensor([[[1, 0]]] * 2)
    return {
        **image(model),
        "input_points": points,
        "input_labels": labels,
        "input_masks": noise(2, 1, 16, 16, seed=1),
    }


def vision(name: str, auto: str, output: Any = "logits", **fields: Any) -> Family:
    return of_transformers(name, "vision", auto, image, output, **{"num_labels": 16, **fields})


CLASSIFIER = "AutoModelForImageClassification"

FAMILIES: list[Family] = [
    vision("vit", CLASSIFIER),
    vision("deit", CLASSIFIER, architectures=["DeiTForImageClassificationWithTeacher"]),
    vision("dinov2", CLASSIFIER, mlp_ratio=2),
    vision("dinov2_swiglu", CLASSIFIER, model_type="dinov2", mlp_ratio=2, use_swiglu_ffn=True),
    vision("dinov3_vit", "AutoModel", "last_hidden_state", num_register_tokens=2),
    vision("ijepa", CLASSIFIER),
    of_transformers(
        "vit_mae", "vision", "AutoModel", ordered_image, "last_hidden_state", mask_ratio=0.25
    ),
    vision("swin", CLASSIFIER, patch_size=2, embed_dim=64, window_size=4, **STAGES),
    vision("swinv2", CLASSIFIER, patch_size=2, embed_dim=64, window_size=4, **STAGES),
    vision("beit", CLASSIFIER, use_relative_position_bias=True),
    vision(
        "convnext",
        CLASSIFIER,
        num_stages=2,
        hidden_sizes=[64, 96],
        depths=[2, 2],
        patch_size=4,
        layer_scale_init_value=0.5,
    ),
    vision(
        "convnextv2", CLASSIFIER, num_stages=2, hidden_sizes=[64, 96], depths=[2, 2], patch_size=4
    ),
    vision("mobilenet_v2", CLASSIFIER, depth_multiplier=0.25),
    vision("resnet", CLASSIFIER, embedding_size=16, hidden_sizes=[64, 96], depths=[2, 2]),
    vision(
        "segformer",
        "AutoModelForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[64, 96],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=64,
    ),
    vision(
        "detr",
        "AutoModelForObjectDetection",
        lambda output: torch.cat([output.logits, output.pred_boxes], dim=-1),
        num_queries=8,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [64, 96],
            "depths": [2, 2],
            "out_features": ["stage2"],
        },
    ),
    of_transformers(
        "sam",
        "vision",
        "AutoModel",
        prompted_image,
        lambda output: torch.cat([output.pred_masks.flatten(3), output.iou_scores[..., None]], -1),
        vision_config={
            "output_channels": 64,
            "num_pos_feats": 32,
            "mlp_dim": 128,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={"mask_input_channels": 8},
        mask_decoder_config={"mlp_dim": 128, "iou_head_hidden_dim": 64},
    ),
    of_transformers("clip", "vision", "AutoModel", image_and_text, "logits_per_image", **TOWERS),
    of_transformers("siglip", "vision", "AutoModel", image_and_text, "logits_per_image", **TOWERS),
    of_transformers("clip_text_model", "vision", "AutoModel", text, "last_hidden_state"),
    vision("clip_vision_model", "AutoModel", "last_hidden_state"),
    vision("siglip_vision_model", "AutoModel", "pooler_output"),
]
