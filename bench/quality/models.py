"""The models that are compressed, each with text to calibrate on and other text to evaluate on."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "third_party"))

import fetch
import stories
import wiki_text
from dcext.calibrate.text import text_windows

SMOLLM2 = "SmolLM2-135M-Instruct"
STORIES = "stories15M"
RANDOM = "random weights"
NAMES = (SMOLLM2, STORIES)
BYTES_PER_TOKEN = 16  # of text to tokenize: more than any tokenizer packs into a token on average
EVALUATION_SEED, CALIBRATION_SEED = 1, 2
BATCH = 32  # stories that are written at once


@dataclass(frozen=True)
class Sizes:
    """Tokens to evaluate, tokens to calibrate on, and tokens per window of both."""

    evaluation: int = 16_384
    calibration: int = 49_152
    context: int = 512


@dataclass(frozen=True)
class Subject:
    """A float model and its texts.

    Attributes:
        name: as tables print it.
        model: a transformers causal language model, float32, in evaluation mode. Methods work on copies.
        sizes: those asked for; ``context`` at most what the model was trained for.
        evaluation: 1-D int64.
        calibration: (windows, context) int64.
        note: what a reader of its figures must know.
    """

    name: str
    model: Any
    sizes: Sizes
    evaluation: Tensor
    calibration: Tensor
    note: str = ""

    def linears(self) -> dict[str, nn.Linear]:
        """The layers to compress: every ``nn.Linear`` but the output embedding, by name."""
        output = self.model.get_output_embeddings()
        modules = self.model.named_modules()
        return {n: m for n, m in modules if type(m) is nn.Linear and m is not output}

    def num_weights(self) -> int:
        """Weights of ``linears``, biases not counted."""
        return sum(module.weight.numel() for module in self.linears().values())


def load_subject(name: str, sizes: Sizes) -> Subject:
    """Obtains a model and its texts; downloads on the first call.

    Args:
        name: one of ``NAMES``, ``RANDOM``, or what ``dcext.hub.load_float_model`` takes: a folder, a GGUF file or
            a name on the hub.
        sizes: how much text; a context longer than the model's is shortened to it.

    Raises:
        fetch.FetchError: a download that failed.
        FileNotFoundError, ValueError, OSError: as ``load_float_model``.
    """
    if name == RANDOM:
        return _random(sizes)
    if name == STORIES:
        return _stories(sizes)
    if name == SMOLLM2:
        note = "its weights come from 4-bit blocks of 32, which 5 bits per weight store exactly"
        return _of_wikipedia(name, str(fetch.smollm2_gguf()), sizes, note)
    return _of_wikipedia(Path(name).stem if Path(name).exists() else name, name, sizes, "")


def write_float_model(subject: Subject, folder: Path) -> None:
    """Writes what another process needs to quantize the model: see peer_worker.py."""
    from safetensors.torch import save_file

    config = subject.model.config.to_dict()
    config.pop("quantization_config", None)  # of a GGUF file, whose weights are float by now
    state = subject.model.state_dict()
    if config["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "layers.json").write_text(json.dumps(list(subject.linears())))
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    save_file({"ids": subject.calibration}, folder / "calibration.safetensors")


def _limited(sizes: Sizes, model: Any) -> Sizes:
    context = min(sizes.context, model.config.max_position_embeddings)
    return Sizes(sizes.evaluation, sizes.calibration // context * context, context)


def _of_wikipedia(name: str, source: str, sizes: Sizes, note: str) -> Subject:
    """A model that reads English, on two parts of enwik8."""
    from dcext.hub import load_float_model

    model, tokenizer = load_float_model(source, "float32")
    sizes = _limited(sizes, model)

    text = wiki_text.enwik8_text("evaluation").read_text(encoding="utf-8")
    ids = tokenizer(text[: BYTES_PER_TOKEN * sizes.evaluation], verbose=False).input_ids
    if len(ids) < sizes.evaluation:
        raise ValueError(f"evaluation: expected {sizes.evaluation} tokens, found {len(ids)}")
    evaluation = torch.tensor(ids[: sizes.evaluation])
    text = wiki_text.enwik8_text("calibration").read_text(encoding="utf-8")
    calibration = text_windows(tokenizer, text, tokens=sizes.calibration, context=sizes.context)
    return Subject(name, model, sizes, evaluation, calibration, note)


def _stories(sizes: Sizes) -> Subject:
    """stories15M, on stories that it wrote itself: it has no other language."""
    from transformers import AutoModelForCausalLM

    folder = stories.stories15m()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sizes = _limited(sizes, model)
    evaluation = _written(model, folder.name, EVALUATION_SEED, sizes.evaluation, sizes.context)
    calibration = _written(model, folder.name, CALIBRATION_SEED, sizes.calibration, sizes.context)
    note = "evaluated on stories that it wrote itself, sampled at temperature 1"
    return Subject(STORIES, model, sizes, evaluation.flatten(), calibration, note)


def _random(sizes: Sizes) -> Subject:
    """A tiny model of random weights on random tokens: for smoke runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * parameter.shape[1] ** -0.5)
    sizes = _limited(sizes, model)
    ids = torch.randint(512, (sizes.evaluation + sizes.calibration,), generator=generator)
    evaluation, calibration = ids.split([sizes.evaluation, sizes.calibration])
    return Subject(RANDOM, model, sizes, evaluation, calibration.view(-1, sizes.context))


def _written(model: Any, name: str, seed: int, tokens: int, context: int) -> Tensor:
    """Windows (tokens / context, context) of text by the model itself, kept in the cache."""
    from safetensors.torch import load_file, save_file

    path = fetch.cache_dir() / f"{name}-written-{seed}-{tokens}x{context}.safetensors"
    with fetch.locked(path.with_suffix(".lock")):
        if not path.is_file():
            print(f"{STORIES} writes {tokens} tokens (kept)", file=sys.stderr)
            windows = _sample(model, seed, -(-tokens // context), context)
            temporary = path.with_suffix(".part")
            save_file({"ids": windows}, temporary)
            temporary.rename(path)
        return load_file(path)["ids"]


@torch.inference_mode()
def _sample(model: Any, seed: int, windows: int, context: int) -> Tensor:
    """Samples at temperature 1 from the token that begins a text: (windows, context) int64."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for begin in range(0, windows, BATCH):
        rows = min(BATCH, windows - begin)
        ids = torch.full((rows, 1), model.config.bos_token_id)
        cache, last = None, ids
        while ids.shape[1] < context:
            output = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            distribution = output.logits[:, -1].softmax(-1)
            last = torch.multinomial(distribution, 1, generator=generator)
            ids = torch.cat([ids, last], dim=1)
        batches.append(ids)
    return torch.cat(batches)
