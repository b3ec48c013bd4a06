"""The rows of bench/offload.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whole.checkpoints import BFLOAT16, INTEGERS

LLAMA_3B = "Llama 3B"
SMALL = "small"  # yet larger than the least memory that reads need
CODECS = ("zstd", "packed", "raw")
# What Python, torch and transformers take, activations and the cache of past tokens.
PROCESS_NBYTES = 640 << 20
# accelerate has a weight in memory twice while it is multiplied: as read, and as oneDNN wants it. The embedding has
# 0.8 GB. In 1 GiB a pass of 16 tokens did not end in minutes.
ACCELERATE_NBYTES = 2 << 30
# Without overlap a layer is read as a whole; the head has 0.4 GB.
SYNCHRONOUS_NBYTES = 512 << 20
LITTLE_NBYTES = 128 << 20
PLACES = {"little": "from disk", "half": "half in memory", "all": "in memory"}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: drawn shapes.
        codec: of the checkpoint, or ``BFLOAT16``.
        engine: of the worker's job.
        resident: weights in memory, one of ``PLACES``.
        name: of the row.
    """

    model: str
    codec: str
    engine: str
    resident: str
    name: str

    @property
    def integers(self) -> str | None:
        """What a checkpoint of dcext holds; equal ones compute equal logits."""
        return INTEGERS.get(self.codec)

    def host_nbytes(self, weights_nbytes: int, little_nbytes: int) -> int | None:
        """Bytes for weights in memory; None for all."""
        return {"little": little_nbytes, "half": weights_nbytes // 2, "all": None}[self.resident]

    def memory_nbytes(self, host_nbytes: int | None) -> int | None:
        """Bytes of memory that the process may take in all; None for all there is."""
        if host_nbytes is None:
            return None
        if self.engine == "accelerate":
            return ACCELERATE_NBYTES
        whole = SYNCHRONOUS_NBYTES if self.engine == "synchronous" else 0
        return host_nbytes + PROCESS_NBYTES + whole


def offload_cases(model: str) -> list[Case]:
    """All rows that read from the disk."""

    def streamed(codec: str, resident: str) -> Case:
        return Case(model, codec, "stream", resident, f"{codec}, {PLACES[resident]}")

    return [
        *(streamed(codec, "little") for codec in CODECS),
        *(streamed(codec, "half") for codec in CODECS),
        *(Case(model, c, "synchronous", "little", f"{c}, no overlap") for c in CODECS[:2]),
        Case(model, BFLOAT16, "accelerate", "little", "accelerate bfloat16, from disk"),
    ]


def memory_cases(model: str) -> list[Case]:
    """The rows whose logits the others must compute, and whose speed they cannot pass."""
    return [Case(model, codec, "memory", "all", f"{codec}, in memory") for codec in CODECS]


def baselines(row: dict[str, Any]) -> dict[str, str]:
    """Names of rows that a row is compared with."""
    return {
        "raw": f"raw, {PLACES[row['resident']]}",
        "accelerate": "accelerate bfloat16, from disk",
        "memory": f"{row['codec']}, in memory",
    }
