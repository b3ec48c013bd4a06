"""Small models that many tests share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")


def tiny_llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "attention_bias": True,
    }
    config = transformers.LlamaConfig(**{**settings, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def grouped_llama(
    hidden: int, intermediate: int, *, vocabulary: int, tie: bool = True
) -> nn.Module:
    """With two heads for each key and value."""
    return tiny_llama(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=tie,
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) % 256).logits


def byte_tokenizer() -> object:
    """A tokenizer of transformers whose tokens are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
