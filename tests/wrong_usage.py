"""What tests of wrong usages share: files of all kinds to hand in, and what each error has to be."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import dcext
from dcext.policy.plan import Plan, PlannedLayer
from dcext.policy.tier import Tier
from models import byte_tokenizer, tiny_llama

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 30


def make_files(root: Path) -> SimpleNamespace:
    """A float model, the same compressed, texts and files of other kinds; what is made is only read."""
    tokenizer = byte_tokenizer()
    for part in (tokenizer, tiny_llama()):
        part.save_pretrained(root / "float")
    model = dcext.compress_(tiny_llama(), dcext.CompressionConfig(recipe="int8"))
    dcext.save_pretrained(model, root / "out", tokenizer)
    layer = PlannedLayer("other", Tier("memory", "raw"), 1, {}, {})
    plan = Plan([layer], [], None, None, 0, 0, 0, 0, "none", "here", "measured", [])
    plan.save(root / "other.json")
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text("")
    (root / "binary.bin").write_bytes(bytes(range(256)) * 64)
    for name in ("empty", "work", "full"):
        (root / name).mkdir()
    (root / "full" / "letter.txt").write_text("dear")
    return SimpleNamespace(root=root, model=model, plan=plan)


def check_call(made: SimpleNamespace, call, kind: type[Exception], pattern: str) -> None:
    """A call raises one line of this kind that a pattern is found in, and leaves nothing behind in ``work``."""
    with pytest.raises(kind) as raised:
        call(made)
    message = str(raised.value)
    assert type(raised.value) is kind or kind is OSError
    assert "\n" not in message
    assert re.search(pattern, message), message
    assert not any((made.root / "work").iterdir())
