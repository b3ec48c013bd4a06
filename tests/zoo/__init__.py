"""Tiny random models of many families, made from configs: `FAMILIES`, by name."""

from . import (
    audio,
    decoders,
    diffusion,
    encoder_decoders,
    encoders,
    hybrids,
    mixtures,
    multimodal,
    plain,
    vision,
)
from .family import Family, built, generate, is_matrix

GROUPS = (
    decoders,
    mixtures,
    hybrids,
    encoders,
    encoder_decoders,
    vision,
    audio,
    multimodal,
    plain,
    diffusion,
)

FAMILIES: dict[str, Family] = {family.name: family for group in GROUPS for family in group.FAMILIES}

__all__ = ["FAMILIES", "Family", "built", "generate", "is_matrix"]
