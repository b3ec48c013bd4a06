"""Calibration windows from a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_CHARS_PER_TOKEN = 8  # of a slice; doubled until it gives a whole window


def text_windows(tokenizer: Any, text: str, *, tokens: int = 49152, context: int = 512) -> Tensor:
    """Windows of tokens spread evenly over a text, each starting at the beginning of a line.

    Spread windows see more of the text's variety than its first tokens do, which is worth as much as twice the tokens.

    Args:
        tokenizer: a transformers tokenizer.
        text: from which to take them.
        tokens: about how many in all: ``ceil(tokens / context)`` windows.
        context: tokens of a window.

    Returns:
        ``(windows, context)`` int64.

    Raises:
        ValueError: the text is too short for one window each at different places.
    """
    count = -(-tokens // context)
    windows = [_window(tokenizer, text, len(text) * i // count, context) for i in range(count)]
    missing = sum(window is None for window in windows)
    if missing or len(text) < count * context:
        raise ValueError(
            f"calibration text: expected enough for {count} windows of {context} tokens, got {len(text)} characters; "
            "give more text or ask for fewer tokens"
        )
    return torch.tensor(windows)


def _window(tokenizer: Any, text: str, begin: int, context: int) -> list[int] | None:
    begin = text.find("\n", begin) + 1 if begin else 0
    length = FIRST_CHARS_PER_TOKEN * context
    while True:
        ids = tokenizer(text[begin : begin + length], verbose=False).input_ids
        if len(ids) >= context:
            return ids[:context]
        if begin + length >= len(text):
            if begin == 0:
                return None
            begin = max(0, begin - length)  # the text's end: start earlier
        length *= 2
