"""A drawn model on disk, and the time of its passes: for scripts that move its weights about."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, Report, Settings, synchronize
from torch import Tensor
from whole.drawn import POOL_SIZE, SHAPES, drawn_model

import dcext

SMOKE = "tiniest, 4 blocks"


def begin(settings: Settings) -> tuple[Report, str]:
    """What a script adds its rows to, and the name of the model's shape."""
    report = Report(settings)
    shape = SMOKE if settings.smoke else "Llama 3B"
    report.figures.update(model=shape, shape=SHAPES[shape])
    return report, shape


def save(codec: str, shape: str, folder: Path) -> Path:
    """The checkpoint of a drawn model."""
    path = folder / codec
    if not path.exists():
        pool = 1 << 16 if shape == SMOKE else POOL_SIZE
        model = drawn_model(shape, "normal", codec, pool)
        # Triton's interpreter truncates to bfloat16.
        model = model.float() if DEVICE.type == "cpu" else model
        dcext.save_pretrained(model, path)
    return path


def timed(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median, and 20th and 80th percentile, in milliseconds, of what a user waits for."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    times = sorted(times[2:])
    cut = [times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)]
    return {"p20_ms": cut[0], "median_ms": cut[1], "p80_ms": cut[2]}


def ids_of(length: int, vocabulary: int) -> Tensor:
    """The tokens of a pass."""
    return (7 * torch.arange(length, device=DEVICE) % vocabulary)[None]


def one_pass(model: Any, ids: Tensor, repeats: int) -> dict[str, Any]:
    """A forward pass, and the token that it predicts."""
    run = lambda: model(ids, use_cache=False, logits_to_keep=1).logits  # noqa: E731
    times = timed(run, repeats)
    rate = 1e3 * ids.shape[1] / times["median_ms"]
    return {**times, "tokens_per_s": rate, "token": int(run()[0, -1].argmax())}


def disagreements(
    report: Report, lengths: Mapping[str, str] | None = None, peer: str | None = None
) -> list[str]:
    """Rows that predict another token than the first of the same length.

    Args:
        report: with rows of ``one_pass``.
        lengths: of columns that are not named by theirs.
        peer: the row of another program, which may.
    """
    found: list[str] = []
    first: dict[str, tuple[str, int]] = {}
    for row in report.rows.rows.values():
        for key, value in row.items():
            if row["name"] == peer or not isinstance(value, dict) or "token" not in value:
                continue
            length = (lengths or {}).get(key, key)
            name, token = first.setdefault(length, (row["name"], value["token"]))
            if token != value["token"]:
                found.append(f"{row['name']}, {key}: predicts another token than {name}")
    return found
