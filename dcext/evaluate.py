"""Quality and speed of a language model on text."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EvalResult:
    """What ``perplexity`` measured.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: predicted tokens.
        seconds: wall time of all forward passes.
        tokens_per_s: tokens run through the model, per second.
        peak_rss_bytes: largest resident memory of this process since it started.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationSpeed:
    """Tokens per second of reading a prompt and of writing after it, one sequence."""

    prefill_tokens_per_s: float
    generation_tokens_per_s: float


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started (``ru_maxrss`` is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Perplexity over windows of ``context`` tokens that do not overlap.

    Every token of a window but its first is predicted from those before it in the window; a last, shorter window
    counts if it has at least two tokens. Log-probabilities are taken in float32.

    Args:
        model: maps ``input_ids`` (1, n) to an output with ``logits`` (1, n, vocabulary).
        ids: 1-D int64, at least two tokens, on the device of the model.
        context: tokens per window, at least 2.
        max_tokens: use only so many tokens of ``ids``; None for all.
        progress: called with the number of tokens run since the last call.

    Raises:
        ValueError: too few tokens, or a context below 2.
    """
    ids = ids[:max_tokens]
    if ids.dim() != 1 or ids.numel() < 2:
        raise ValueError(
            f"perplexity: ids: expected 1-D with at least 2 tokens, got shape {tuple(ids.shape)}"
        )
    if context < 2:
        raise ValueError(f"perplexity: context: expected at least 2, got {context}")
    total, count, run, seconds = 0.0, 0, 0, 0.0
    for window in ids.split(context):
        if window.numel() < 2:
            continue
        begin = time.perf_counter()
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        _wait_for(ids.device)
        seconds += time.perf_counter() - begin
        losses = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum")
        total += losses.item()
        count += window.numel() - 1
        run += window.numel()
        if progress is not None:
            progress(window.numel())
    nll = torch.tensor(total / count, dtype=torch.float64)
    return EvalResult(float(nll.exp()), float(nll), count, seconds, run / seconds, peak_rss_bytes())


@torch.inference_mode()
def generation_speed(
    model: nn.Module, ids: Tensor, *, new_tokens: int = 32, repeats: int = 3
) -> GenerationSpeed:
    """Times a prompt and greedy generation after it, separately; medians of ``repeats`` runs after a warm-up.

    Args:
        model: a transformers causal language model.
        ids: the prompt, 1-D int64, on the device of the model.
        new_tokens: tokens to generate, at least 1.
        repeats: timed runs.
    """
    prefill, generation = [], []
    for run in range(repeats + 1):
        begin = time.perf_counter()
        output = model(input_ids=ids[None], use_cache=True, logits_to_keep=1)
        _wait_for(ids.device)
        middle = time.perf_counter()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        _wait_for(ids.device)
        end = time.perf_counter()
        if run > 0:
            prefill.append(ids.numel() / (middle - begin))
            generation.append(new_tokens / (end - middle))
    return GenerationSpeed(sorted(prefill)[repeats // 2], sorted(generation)[repeats // 2])
