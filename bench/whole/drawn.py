"""Models of real shapes whose weights are drawn: speed depends on shapes and on the bits of a weight, not on sense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_STD = 0.02  # transformers' initializer_range: activations stay finite
# Of rounded normal integers: 3.64 bits of entropy, as layers have at a ratio of 2.2.
LAYER_SIGMA = 3.017
EMBEDDING_SIGMA = 25.2  # 6.7 bits, as INT8 per row leaves of an embedding
# What recipe rate makes for codec packed: 16 levels, denser in the middle, and a few integers between them; in some
# panels, which matter more, 32 levels.
LEVELS = (-23, -17, -13, -10, -7, -5, -3, -1, 1, 3, 5, 7, 10, 13, 17, 23)
FINE_LEVELS = tuple(range(-31, 32, 2))
FINE_SHARE = 0.15
LEVELS_SIGMA = 8.5
OTHERS_SHARE = 0.002
POOL_SIZE, PIECE = 1 << 24, 1 << 20

SHAPES: dict[str, dict[str, Any]] = {
    # Those of Llama-3.2-3B, 3.2e9 weights.
    "Llama 3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    # Those of Llama-3.2-1B, 1.2e9 weights.
    "Llama 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    # 50 million weights: more than streaming takes for its reads.
    "small": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    # For Triton's interpreter.
    "tiniest": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
    },
    # With more blocks than there are slots to stream them to.
    "tiniest, 4 blocks": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
    },
}


def normal(size: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Integers of a rounded normal distribution, int8; their entropy is ``log2(sigma) + 2.047`` bits if sigma > 1."""
    noise = torch.randn(size, generator=generator) * sigma
    return noise.round_().clamp_(-127, 127).to(torch.int8)


def levels(size: int, generator: torch.Generator) -> Tensor:
    """Integers for codes of fixed width, int8: the nearest level to a normal variable, but for a few.

    The last ``FINE_SHARE`` of them have ``FINE_LEVELS``, the others ``LEVELS``. A share of ``OTHERS_SHARE``, at random
    places, is uniform over int8 instead: what such a code keeps as exceptions.
    """
    noise = torch.randn(size, generator=generator) * LEVELS_SIGMA
    parts = []
    fine = int(FINE_SHARE * size)
    for part, of_part in zip(noise.split([size - fine, fine]), (LEVELS, FINE_LEVELS), strict=True):
        alphabet = torch.tensor(of_part)
        borders = (alphabet[1:] + alphabet[:-1]) / 2
        parts.append(alphabet.to(torch.int8)[torch.bucketize(part, borders)])
    q = torch.cat(parts)
    places = torch.randint(size, (int(OTHERS_SHARE * size),), generator=generator)
    others = torch.randint(-127, 128, places.shape, generator=generator)
    q[places] = others.to(torch.int8)
    return q


class Pool:
    """Integers drawn once; matrices are put together from pieces of it at random offsets, which no code notices."""

    def __init__(self, q: Tensor, seed: int) -> None:
        """Args: q: the integers, 1-D int8. seed: of the offsets."""
        self.q = q
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = WEIGHT_STD / float(q.float().std())

    def take(self, rows: int, cols: int) -> Tensor:
        """The next matrix, (rows, cols) int8."""
        out = torch.empty(rows * cols, dtype=torch.int8)
        for piece in out.split(min(PIECE, self.q.numel())):
            room = self.q.numel() - piece.numel() + 1
            offset = int(torch.randint(room, (1,), generator=self.generator))
            piece.copy_(self.q[offset : offset + piece.numel()])
        return out.view(rows, cols)


def pools(integers: str, size: int = POOL_SIZE) -> tuple[Pool, Pool]:
    """The pools that layers and embeddings are drawn from; the same ones in every process.

    Args:
        integers: of the layers, ``"normal"`` or ``"levels"``.
        size: integers in each.
    """
    generator = torch.Generator().manual_seed(0)
    draws = {"normal": lambda: normal(size, LAYER_SIGMA, generator)}
    draws["levels"] = lambda: levels(size, generator)
    layers = Pool(draws[integers](), seed=1)
    return layers, Pool(normal(size, EMBEDDING_SIGMA, generator), seed=2)


def drawn_model(shape: str, integers: str, codec: str | None, pool_size: int = POOL_SIZE) -> Any:
    """A Llama whose embedding and ``lm_head`` are one matrix, computing in bfloat16.

    Made on the meta device and filled layer by layer, so that memory peaks at little more than the model.

    Args:
        shape: one of ``SHAPES``.
        integers: as for ``pools``.
        codec: of the weights, as for ``dcext.encode``; None for plain bfloat16.
        pool_size: integers that are drawn.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    from dcext.loading import forget_ties

    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, dtype="bfloat16")
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    of_layers, of_embeddings = pools(integers, pool_size)
    names = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in names.items():
        model.model.set_submodule(name, filled(linear, of_layers, codec))
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 1:  # norms
            ones = nn.Parameter(torch.ones_like(parameter, device="cpu", dtype=torch.bfloat16))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ones)
    model.model.embed_tokens = filled(model.model.embed_tokens, of_embeddings, codec)
    model.lm_head = tied_head(model.model.embed_tokens)
    forget_ties(model)
    return model.eval().requires_grad_(False)


def filled(module: Any, pool: Pool, codec: str | None) -> nn.Module:
    """What takes the place of a linear layer or embedding on the meta device: itself with weights, or compressed."""
    import dcext
    from dcext.nn.compressed import to_weight_memory

    qweight = pool.take(*module.weight.shape)
    if codec is None:
        weight = qweight.to(torch.bfloat16).mul_(pool.scale)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module
    payload = to_weight_memory(dcext.encode(qweight, codec))
    row_scale = torch.full((len(qweight),), pool.scale)
    kind = dcext.DCEmbedding if isinstance(module, nn.Embedding) else dcext.DCLinear
    return kind(payload, row_scale, dtype=torch.bfloat16)


def tied_head(embedding: Any) -> nn.Module:
    """The ``lm_head`` that shares an embedding's weights."""
    import dcext

    if isinstance(embedding, dcext.DCEmbedding):
        return dcext.DCLinear(embedding.payload, embedding.row_scale, dtype=embedding.dtype)
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.out_features, head.in_features = embedding.weight.shape
    head.weight = embedding.weight
    return head
