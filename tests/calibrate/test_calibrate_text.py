"""Windows of calibration text, for texts and tokenizers of all kinds."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from dcext.calibrate.text import text_windows


class Letters:
    """A token for every four characters, which tells where they are from."""

    def __init__(self, front: tuple[int, ...] = (), behind: tuple[int, ...] = ()) -> None:
        self.front, self.behind = list(front), list(behind)

    def __call__(
        self, text: str, verbose: bool, add_special_tokens: bool = True
    ) -> SimpleNamespace:
        ids = [hash(text[i : i + 4]) % 2**40 + 10 for i in range(0, len(text), 4)]
        return SimpleNamespace(
            input_ids=self.front + ids + self.behind if add_special_tokens else ids
        )


def words(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh", k=generator.randint(2, 9))) for _ in range(count)]


TEXTS = {
    "lines": "\n".join(" ".join(words(9, i)) for i in range(800)),
    "one line": " ".join(words(8000)),
    "carriage returns": "\r".join(" ".join(words(9, i)) for i in range(800)),
    "both": "\r\n".join(" ".join(words(9, i)) for i in range(800)),
    "one line, then lines": " ".join(words(4000)) + "\n" + "\n".join(words(4000, 1)),
    "no white space": "".join(words(8000)),
    "one line end, at the end": " ".join(words(8000)) + "\n",
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_windows_are_spread_over_the_text(name):
    text = TEXTS[name]
    windows = text_windows(Letters(), text, tokens=16 * 128, context=128)
    assert windows.shape == (16, 128)
    assert windows.dtype == torch.int64
    assert len({tuple(window) for window in windows.tolist()}) == 16
    starts = []
    for window in windows.tolist():
        places = [i for i in range(len(text)) if hash(text[i : i + 4]) % 2**40 + 10 == window[0]]
        following = [
            i for i in places if hash(text[i + 4 : i + 8]) % 2**40 + 10 == window[1]
        ]  # eight characters: rarely twice
        starts.append(following)
    distance = len(text) / 16
    for i, places in enumerate(starts[:-1]):
        assert any(distance * i - 1 <= place <= distance * (i + 0.51) for place in places)


@pytest.mark.parametrize("name", ["lines", "carriage returns", "both", "one line"])
def test_windows_start_with_a_line_or_a_word(name):
    text = TEXTS[name]
    begins = ["\n", "\r"] if name != "one line" else [" "]
    windows = text_windows(Letters(), text, tokens=8 * 128, context=128)
    heads = {
        hash(text[i : i + 4]) % 2**40 + 10
        for i in range(len(text))
        if i == 0 or text[i - 1] in begins
    }
    assert all(window[0] in heads for window in windows.tolist())


def test_special_tokens_are_in_front_of_each_window_and_never_in_its_middle():
    windows = text_windows(Letters((1,), (2, 3)), TEXTS["lines"], tokens=16 * 128, context=128)
    assert (windows[:, 0] == 1).all()
    assert not ((windows == 2) | (windows == 3)).any()
    assert (windows[:, 1:] >= 10).all()


@pytest.mark.parametrize("text", ["", "short", "x" * 4 * 127, " ".join(words(150))])
def test_too_short_a_text(text):
    with pytest.raises(
        ValueError, match=r"expected enough for 2 windows of 128 tokens, got \d+ char"
    ):
        text_windows(Letters(), text, tokens=256, context=128)


def test_a_text_just_long_enough():
    text = "".join(words(1000))[: 4 * 128 * 4]
    windows = text_windows(Letters(), text, tokens=256, context=128)
    assert not torch.equal(windows[0], windows[1])
