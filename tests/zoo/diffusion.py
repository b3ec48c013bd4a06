"""Denoisers and autoencoders of diffusers, an optional dependency of the tests."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Inputs, built, noise

HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
JOINT = {**HEADS, "joint_attention_dim": 64, "pooled_projection_dim": 64}
NORMS = {"norm_num_groups": 16, "block_out_channels": (64, 80), "layers_per_block": 1}
TIMES = torch.tensor([10, 500])


def latents(
    name: str = "hidden_states", shape: tuple[int, ...] = (4, 8, 8), **more: Callable[[], Any]
) -> Inputs:
    """Noise of ``shape`` under that name at two times; ``more`` inputs by function."""

    def inputs(model: nn.Module) -> dict[str, Tensor]:
        made = {key: make() for key, make in more.items()}
        return {name: noise(2, *shape), "timestep": TIMES, **made}

    return inputs


def caption() -> Tensor:
    """What a text encoder gives: ``(2, 6, 64)``."""
    return noise(2, 6, 64, seed=1)


def pooled() -> Tensor:
    return noise(2, 64, seed=2)


def picture(model: nn.Module) -> dict[str, Tensor]:
    return {"sample": noise(2, 3, 32, 32)}


ROWS: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "DiTTransformer2DModel": (
        latents(class_labels=lambda: torch.tensor([1, 5])),
        {**HEADS, "sample_size": 8, "num_embeds_ada_norm": 16, "norm_num_groups": 4},
    ),
    "PixArtTransformer2DModel": (
        latents(
            encoder_hidden_states=caption,
            added_cond_kwargs=lambda: {"resolution": None, "aspect_ratio": None},
        ),
        {**HEADS, "sample_size": 8, "cross_attention_dim": 64, "caption_channels": 64},
    ),
    "SD3Transformer2DModel": (
        latents(encoder_hidden_states=caption, pooled_projections=pooled),
        {
            **JOINT,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "FluxTransformer2DModel": (
        latents(
            shape=(16, 16),
            encoder_hidden_states=caption,
            pooled_projections=pooled,
            img_ids=lambda: torch.cartesian_prod(
                torch.zeros(1), torch.arange(4.0), torch.arange(4.0)
            ),
            txt_ids=lambda: torch.zeros(6, 3),
            guidance=lambda: torch.tensor([3.5, 4.0]),
        ),
        {
            **JOINT,
            "in_channels": 16,
            "num_single_layers": 2,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "SanaTransformer2DModel": (
        latents(encoder_hidden_states=caption),
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 64,
            "sample_size": 8,
        },
    ),
    "WanTransformer3DModel": (
        latents(shape=(4, 2, 8, 8), encoder_hidden_states=caption),
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 64,
            "freq_dim": 64,
            "ffn_dim": 128,
            "rope_max_seq_len": 32,
        },
    ),
    "UNet2DConditionModel": (
        latents("sample", encoder_hidden_states=caption),
        {
            **NORMS,
            "sample_size": 8,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "UNet2DModel": (
        latents("sample", (3, 16, 16)),
        {
            **NORMS,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "AutoencoderKL": (
        picture,
        {
            **NORMS,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
}


def of_row(name: str, inputs: Inputs, config: dict[str, Any]) -> Family:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    def model() -> nn.Module:
        return built(build)

    return Family(name, "diffusion", model, inputs, attrgetter("sample"), requires="diffusers")


FAMILIES: list[Family] = [of_row(name, inputs, config) for name, (inputs, config) in ROWS.items()]
