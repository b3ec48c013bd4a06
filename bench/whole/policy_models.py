"""The models of bench/policy.py, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

from hardware import ROOT

import dcext
import fetch
import wiki_text
from whole.drawn import drawn_model

FOLDER = ROOT / "build/policy"
SMOKE_SHAPE = "small"
INTEGERS = {"zstd": "normal", "packed": "levels"}


def policy_model(codec: str, smoke: bool) -> Path:
    """The folder of a compressed model for a codec: real, or small and drawn."""
    path = FOLDER / f"{'small' if smoke else 'smollm2'}-{codec}"
    if path.is_dir():
        return path
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if smoke:
        model = drawn_model(SMOKE_SHAPE, INTEGERS[codec], codec, pool_size=1 << 20)
        dcext.save_pretrained(model, part)
    else:
        from demo import dcext as command

        text = wiki_text.enwik8_text("calibration")
        options = ["--codec", "packed"] if codec == "packed" else ["--ratio", "2.2"]
        command(
            "compress",
            str(fetch.smollm2_gguf()),
            "-o",
            str(part),
            *options,
            "--calibration",
            str(text),
        )
    part.rename(path)
    return path
