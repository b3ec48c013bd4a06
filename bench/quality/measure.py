"""Perplexity of a compressed model and its divergence from the float one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 128  # handled at once: two arrays of 128 x 49152 float64 are 100 MB


@dataclass(frozen=True)
class Divergence:
    """What ``divergence`` measured; means over all predicted tokens.

    Attributes:
        perplexity: of the model, ``exp`` of its mean negative log-likelihood.
        reference_perplexity: the same of the reference.
        kl_nats: KL(reference || model) of the next token's distribution, in nats per token.
        kl_standard_error: of ``kl_nats``, from the spread of the windows' means; None for a single window.
        top1_agreement: share of positions whose most likely token is the same.
        tokens: predicted tokens.
    """

    perplexity: float
    reference_perplexity: float
    kl_nats: float
    kl_standard_error: float | None
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


class CachedReference(nn.Module):
    """A causal language model that runs its blocks once per window: it keeps the last hidden states.

    Logits would take the vocabulary's size per token, hidden states take the model's width. Logits are the very same
    bits as the model's; a model that does more than a linear layer after its blocks is refused on the first window.
    """

    def __init__(self, model: Any) -> None:
        """Args: model: a transformers causal language model. Not copied: it must not change."""
        super().__init__()
        self.model = model
        self.hidden: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits of ``input_ids`` (1, n) as ``.logits`` (1, n, vocabulary).

        Raises:
            ValueError: the logits are not the output embedding's of the last hidden states.
        """
        key = input_ids.numpy().tobytes()
        first = not self.hidden
        if key not in self.hidden:
            output = self.model.base_model(input_ids=input_ids, use_cache=False)
            self.hidden[key] = output.last_hidden_state
        logits = self.model.get_output_embeddings()(self.hidden[key])
        if first and not torch.equal(logits, self.model(input_ids=input_ids).logits):
            raise ValueError(
                f"CachedReference: model: expected logits that are a linear layer of the last "
                f"hidden states, got others from {type(self.model).__name__}"
            )
        return SimpleNamespace(logits=logits)


@torch.inference_mode()
def divergence(
    model: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    *,
    context: int = 512,
    progress: Callable[[int], None] | None = None,
) -> Divergence:
    """Compares a model with a reference on text, window by window; no more logits are held than one window's.

    Every token of a window but its first is predicted from those before it in the window, by both models. A last,
    shorter window counts if it has at least two tokens. Log-probabilities are taken in float64.

    Args:
        model: maps ``input_ids`` (1, n) to an output with ``logits`` (1, n, vocabulary).
        reference: the same, with the same vocabulary.
        ids: 1-D int64, at least two tokens.
        context: tokens per window, at least 2.
        progress: called with the number of tokens run since the last call.

    Raises:
        ValueError: too few tokens, or a context below 2.
    """
    if ids.dim() != 1 or ids.numel() < 2 or context < 2:
        raise ValueError(
            "divergence: expected 1-D ids with at least 2 tokens and a context of at least 2, "
            f"got shape {tuple(ids.shape)} and context {context}"
        )
    windows = []
    for window in ids.split(context):
        if window.numel() < 2:
            continue
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        expected = reference(input_ids=window[None], use_cache=False).logits[0, :-1]
        windows.append(_compare(logits, expected, window[1:]))
        if progress is not None:
            progress(window.numel())
    return _summary(torch.stack(windows))


def _compare(logits: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
    """Sums over the positions of a window: both models' losses, divergence, agreements, positions."""
    total = torch.zeros(5, dtype=torch.float64)
    parts = zip(
        logits.split(POSITIONS), expected.split(POSITIONS), targets.split(POSITIONS), strict=True
    )
    for q, p, target in parts:
        agreements = (q.argmax(-1) == p.argmax(-1)).sum()
        log_q, log_p = q.double().log_softmax(-1), p.double().log_softmax(-1)
        losses = [-log.gather(-1, target[:, None]).sum() for log in (log_q, log_p)]
        kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum()
        total += torch.stack([*losses, kl, agreements.double(), kl.new_tensor(len(target))])
    return total


def _summary(windows: Tensor) -> Divergence:
    """Means over all positions, from the sums of each window (windows, 5)."""
    loss, reference_loss, kl, agreement, tokens = windows.sum(0).tolist()
    error = None
    if len(windows) > 1:
        error = float((windows[:, 2] / windows[:, 4]).std() / len(windows) ** 0.5)
    return Divergence(
        perplexity=float(torch.tensor(loss / tokens, dtype=torch.float64).exp()),
        reference_perplexity=float(
            torch.tensor(reference_loss / tokens, dtype=torch.float64).exp()
        ),
        kl_nats=kl / tokens,
        kl_standard_error=error,
        top1_agreement=agreement / tokens,
        tokens=int(tokens),
    )
