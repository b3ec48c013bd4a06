"""Checkpoints of drawn models, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import dcext
from whole.disk import evict, files_in
from whole.drawn import drawn_model

BFLOAT16 = "bfloat16"  # a transformers folder
INTEGERS = {"zstd": "normal", "raw": "normal", "packed": "levels"}  # of a codec's checkpoint
MAX_SHARD = "2GB"


def make_checkpoint(shape: str, codec: str, folder: Path) -> Path:
    """The folder of a drawn model, made unless it is there.

    Args:
        shape: of ``drawn.SHAPES``.
        codec: of the weights, or ``BFLOAT16``.
        folder: that holds it.
    """
    path = folder / f"{shape.replace(' ', '-')}-{codec}"
    if not path.is_dir():
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        if codec == BFLOAT16:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
            model = drawn_model(shape, "normal", None)
            for keys in ("_tied_weights_keys", "all_tied_weights_keys"):  # drawn_model forgot them
                setattr(model, keys, dict(type(model)._tied_weights_keys))
            model.save_pretrained(part, max_shard_size=MAX_SHARD)
        else:
            dcext.save_pretrained(drawn_model(shape, INTEGERS[codec], codec), part)
        evict(files_in(part))
        part.rename(path)
    return path


def weights_nbytes(folder: Path) -> int:
    """Bytes of the files that hold a checkpoint's weights."""
    return sum(path.stat().st_size for path in files_in(folder))
