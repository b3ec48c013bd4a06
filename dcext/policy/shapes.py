"""Shapes of published models, to plan for without their weights: ``dcext plan --shapes llama-2-70b --machine pcie4``."""

from __future__ import annotations

from dataclasses import dataclass

from dcext.codecs import Extent, codec_named, codec_names
from dcext.policy.footprint import index_nbytes
from dcext.policy.predict import Unit

PANEL_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class Shape:
    """Of a decoder, from its published configuration.

    Attributes:
        hidden, intermediate, layers, vocabulary: as everyone calls them.
        kv: outputs of the key and of the value projection.
        gated: whether there are three matrices in a feed-forward layer, or two.
        tied: whether embedding and head are one matrix.
        billions: of parameters, as published.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    kv: int
    gated: bool
    tied: bool
    billions: float


SHAPES = {
    "opt-1.3b": Shape(2048, 8192, 24, 50272, 2048, False, True, 1.316),
    "opt-6.7b": Shape(4096, 16384, 32, 50272, 4096, False, True, 6.658),
    "opt-13b": Shape(5120, 20480, 40, 50272, 5120, False, True, 12.85),
    "llama-2-7b": Shape(4096, 11008, 32, 32000, 4096, True, False, 6.738),
    "llama-3-8b": Shape(4096, 14336, 32, 128256, 1024, True, False, 8.030),
    "llama-2-13b": Shape(5120, 13824, 40, 32000, 5120, True, False, 13.016),
    "llama-2-70b": Shape(8192, 28672, 80, 32000, 1024, True, False, 68.977),
}


def units_of(name: str) -> tuple[list[Unit], int]:
    """What is placed of a model, and bytes of what is not compressed (norms; bfloat16).

    Args:
        name: one of ``SHAPES``.

    Raises:
        ValueError: there is no such shape: which there are.
    """
    if name not in SHAPES:
        raise ValueError(f"shapes: expected one of {', '.join(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    hidden, wide = shape.hidden, shape.intermediate
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (shape.kv, hidden),
        "self_attn.v_proj": (shape.kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    if shape.gated:
        matrices["mlp.gate_proj"] = (wide, hidden)
    codecs = [codec_named(name) for name in codec_names()]
    layer_bits = {codec.name: codec.layer_bits for codec in codecs}
    embedding_bits = {codec.name: codec.embedding_bits for codec in codecs}
    table = (shape.vocabulary, hidden)
    units = [_unit("model.embed_tokens", table, embedding_bits, int(shape.tied), 1, None)]
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        units += [
            _unit(f"{block}.{matrix}", size, layer_bits, 1, 0, block)
            for matrix, size in matrices.items()
        ]
    if not shape.tied:
        units.append(_unit("lm_head", table, embedding_bits, 1, 0, None))
    return units, 2 * hidden * (2 * shape.layers + 1)


def _unit(
    name: str,
    shape: tuple[int, int],
    bits: dict[str, float],
    multiplied: int,
    looked_up: int,
    block: str | None,
) -> Unit:
    weights = shape[0] * shape[1]
    panels = max(1, weights // PANEL_WEIGHTS)
    return Unit(
        name=name,
        shape=shape,
        multiplied=multiplied,
        looked_up=looked_up,
        nbytes={codec: int(weights * width / 8) for codec, width in bits.items()},
        index_nbytes={
            codec: index_nbytes(
                codec, Extent(shape[0], panels, panels + 1, _exceptions(codec, weights))
            )
            for codec in bits
        },
        block=block,
        file_codec=min(bits, key=bits.__getitem__),
        panels=panels,
    )


def _exceptions(codec: str, weights: int) -> int:
    every = codec_named(codec).exception_every
    return weights // every if every else 0
