"""What calibration learns about the inputs of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_TOKENS = 8192
PANEL_COLS = 384


class InputStatistics:
    """Running statistics of the inputs of a linear layer, over any number of calls of ``update``.

    Attributes:
        tokens: how many inputs were seen.
        absmax: ``(K,)`` float32, ``max |x_i|``.
    """

    def __init__(
        self,
        in_features: int,
        *,
        with_moment: bool = True,
        with_values: bool = True,
        most_power: float | None = None,
    ) -> None:
        """Starts with no input seen.

        Args:
            in_features: K.
            with_moment: whether ``second_moment`` is wanted.
            with_values: whether ``absmax`` and ``near_zero`` are.
            most_power: a token with more than so many times the median power of its chunk counts in the moment as one
                with just that: the few massive activations of a model carry most of its power and little of its loss.
        """
        self._most_power = most_power
        self.tokens = 0
        self.absmax = torch.zeros(in_features)
        self._finite = True
        self._near_zero = 0
        self._with_values = with_values
        self._sum = (
            torch.zeros(in_features, in_features, dtype=torch.float64) if with_moment else None
        )

    def update(self, x: Tensor) -> None:
        """Adds inputs.

        Args:
            x: ``(..., K)`` floating point. Not modified.
        """
        x = x.detach().reshape(-1, self.absmax.shape[0])
        if x.shape[0] == 0:  # an expert that no token was sent to
            return
        self.tokens += x.shape[0]
        for chunk in x.split(CHUNK_TOKENS):
            chunk = chunk.float()
            if self._with_values:
                magnitude = chunk.abs()
                token_absmax = magnitude.amax(1, keepdim=True)
                self._finite = self._finite and bool(torch.isfinite(token_absmax).all())
                self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
                self._near_zero += int((magnitude * 254 <= token_absmax).sum())
            if self._sum is not None:
                self._sum += _gram(_limited(chunk, self._most_power))

    def add(self, other: InputStatistics, weight: float = 1.0) -> None:
        """Adds what others are, each of its inputs counted ``weight`` times."""
        self.tokens += round(other.tokens * weight)
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self._finite = self._finite and other._finite
        self._near_zero += round(other._near_zero * weight)
        if self._sum is not None and other._sum is not None:
            self._sum += other._sum * weight

    @property
    def finite(self) -> bool:
        """Whether all inputs were finite; the rest is meaningless where not."""
        return self._finite and (self._sum is None or bool(torch.isfinite(self._sum).all()))

    @property
    def zero(self) -> bool:
        """Whether all inputs were zero."""
        if self._sum is not None:
            return not bool((self._sum.diagonal() != 0).any())
        return not bool((self.absmax > 0).any())

    @property
    def near_zero(self) -> float:
        """Share of values that INT8 with one absmax scale per token rounds to zero."""
        return self._near_zero / max(1, self.tokens * self.absmax.shape[0])

    @property
    def second_moment(self) -> Tensor:
        """``(K, K)`` float64, ``E[x x^T]``: products in float32 over chunks of tokens, their sum in float64.

        Raises:
            ValueError: the statistics were made without it, or saw no token.
        """
        if self._sum is None or self.tokens == 0:
            raise ValueError(f"second_moment: expected inputs, got {self.tokens} tokens")
        return self._sum / self.tokens


def _limited(x: Tensor, most_power: float | None) -> Tensor:
    """Tokens ``(n, K)``, those of more than ``most_power`` times the median power scaled down to it."""
    if most_power is None:
        return x
    power = x.square().sum(1)
    most = most_power * power.median()
    if most == 0 or not bool((power > most).any()):
        return x
    return x * (most / power).clamp(max=1).sqrt()[:, None]


def _gram(x: Tensor) -> Tensor:
    """``x^T x`` of ``(tokens, K)`` float32, panel by panel, so that little more than the upper triangle is computed."""
    size = x.shape[1]
    gram = torch.empty(size, size)
    for begin in range(0, size, PANEL_COLS):
        end = min(size, begin + PANEL_COLS)
        gram[begin:end, begin:] = x[:, begin:end].t() @ x[:, begin:]
        gram[end:, begin:end] = gram[begin:end, end:].t()
    return gram
