"""Calibration windows from a text."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

FIRST_CHARS_PER_TOKEN = 8  # of a slice; doubled until it gives a whole window
LINE_END = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
SPACE = re.compile(r"\s+")
MOST_CHARS_TO_A_WORD = 200  # within which white space is looked for where no line ends


def text_windows(tokenizer: Any, text: str, *, tokens: int = 49152, context: int = 512) -> Tensor:
    """Windows of tokens spread evenly over a text, each starting behind the end of a line where one is near.

    Spread windows see more of the text's variety than its first tokens do, which is worth as much as twice the tokens.
    Where no line ends in half the distance to the next window, a window starts behind white space, and where there is
    none either (Chinese, a sequence of bases), anywhere.

    Args:
        tokenizer: a transformers tokenizer. What it puts in front of a text (BOS) each window begins with; what it puts
            behind one (EOS) stands in none.
        text: from which to take them.
        tokens: about how many in all: ``ceil(tokens / context)`` windows.
        context: tokens of a window.

    Returns:
        ``(windows, context)`` int64, no two from the same place.

    Raises:
        ValueError: the text is too short for one window each at different places.
    """
    count = -(-tokens // context)
    distance = len(text) // count
    starts = [_start(text, len(text) * i // count, distance) for i in range(count)]
    suffix = _suffix(tokenizer)
    windows = [_window(tokenizer, text, start, context, suffix) for start in starts]
    places = {window[0] for window in windows if window is not None}
    if len(places) < count or len(text) < count * context:
        raise ValueError(
            f"calibration text: expected enough for {count} windows of {context} tokens, got {len(text)} characters; "
            "give more text or ask for fewer tokens"
        )
    return torch.tensor([window[1] for window in windows if window is not None])


def _start(text: str, begin: int, distance: int) -> int:
    """Where the window starts that is to start about ``begin``."""
    if begin == 0:
        return 0
    for pattern, within in ((LINE_END, distance // 2), (SPACE, MOST_CHARS_TO_A_WORD)):
        found = pattern.search(text, begin, begin + max(1, min(within, distance // 2)))
        if found is not None and found.end() < len(text):
            return found.end()
    return begin


def _window(
    tokenizer: Any, text: str, begin: int, context: int, suffix: int
) -> tuple[int, list[int]] | None:
    """The tokens of a window and where it starts, earlier than asked for at the text's end; None if it is too short."""
    length = FIRST_CHARS_PER_TOKEN * context
    while True:
        ids = tokenizer(text[begin : begin + length], verbose=False).input_ids
        ids = ids[: len(ids) - suffix]
        if len(ids) >= context:
            return begin, ids[:context]
        if begin + length >= len(text):
            if begin == 0:
                return None
            begin = max(0, begin - length)  # the text's end: start earlier
        length *= 2


def _suffix(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts behind each text."""
    added = list(tokenizer("a", verbose=False).input_ids)
    plain = list(tokenizer("a", verbose=False, add_special_tokens=False).input_ids)
    for begin in range(len(added) - len(plain) + 1):
        if added[begin : begin + len(plain)] == plain:
            return len(added) - begin - len(plain)
    return 0
