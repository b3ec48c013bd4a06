"""Other quantizers at their own bit counts, run in an environment of their own.

Installed beside transformers they change what it imports and prints, and llmcompressor wants an older one; so they
live in ``.venv-peers``, which borrows torch and adds the versions pinned below.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Environment
from safetensors import safe_open
from torch import Tensor

from quality.models import Subject, write_float_model

ENVIRONMENT = Environment(
    ".venv-peers",
    ("torchao==0.18.0", "hqq==0.2.8.post1", "bitsandbytes==0.50.2", "llmcompressor==0.14.0.1"),
)
WORKER = Path(__file__).with_name("peer_worker.py")


@dataclass(frozen=True)
class PeerRow:
    """One row: its name, its curve, the worker's options, and what is special about it."""

    name: str
    series: str
    options: dict[str, Any]
    note: str = ""


def peer_rows(subject: Subject) -> list[PeerRow]:
    """The peers with the group sizes that fit the model.

    A group of 32 is taken only where nothing else fits: SmolLM2's weights come from blocks of 32.

    Raises:
        ValueError: a width that no group size of a peer divides.
    """
    widths = {module.in_features for module in subject.linears().values()}
    tinygemm, gptq = _group_size(widths, (64, 32)), _group_size(widths, (64, 96, 32))

    def row(
        series: str, detail: str, peer: str, bits: int, group_size: int, note: str = ""
    ) -> PeerRow:
        options = {"peer": peer, "bits": bits, "group_size": group_size}
        return PeerRow(f"{series} {detail}", series, options, note)

    return [
        row("torchao", "int8 per row", "torchao-int8", 8, 0),
        row("torchao", f"int4, groups of {tinygemm}", "torchao-int4", 4, tinygemm),
        row("NF4", "blocks of 64", "nf4", 4, 64, "bitsandbytes"),
        row("NF4", "blocks of 64, doubly", "nf4-double", 4, 64, "bitsandbytes"),
        row("HQQ", "4 bits, groups of 64", "hqq", 4, 64),
        row("HQQ", "3 bits, groups of 64", "hqq", 3, 64, "10 weights in 32 bits"),
        row("HQQ", "2 bits, groups of 64", "hqq", 2, 64),
        row("GPTQ", f"4 bits, groups of {gptq}", "gptq", 4, gptq, "llmcompressor"),
        row("GPTQ", f"3 bits, groups of {gptq}", "gptq", 3, gptq, "llmcompressor"),
    ]


class Peers:
    """Runs peers in ``ENVIRONMENT``, which must be there; keeps one subject's float model on disk for them."""

    def __init__(self, scratch: Path) -> None:
        """Args: scratch: an empty folder, for float models and results."""
        self.scratch = scratch
        self.subject: Subject | None = None

    def quantize(
        self, subject: Subject, peer: str, bits: int, group_size: int
    ) -> tuple[dict[str, Tensor], int]:
        """Quantizes a model's linear layers with a peer's own code.

        Returns:
            Dequantized weights by layer, float32, and the bytes that the peer stores for all of them.

        Raises:
            RuntimeError: the peer failed; the message is its last line.
        """
        folder = self.scratch / "float"
        if self.subject is not subject:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_float_model(subject, folder)
            self.subject = subject
        command = [str(WORKER), str(folder), "--peer", peer, "--bits", str(bits)]
        ENVIRONMENT.python(*command, "--group-size", str(group_size), folder=folder)
        result = folder / "weights.safetensors"
        with safe_open(result, "pt") as file:
            nbytes = int(file.metadata()["stored_nbytes"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        result.unlink()
        return weights, nbytes


def _group_size(widths: set[int], choices: tuple[int, ...]) -> int:
    for size in choices:
        if all(width % size == 0 for width in widths):
            return size
    raise ValueError(f"peers: widths {sorted(widths)}: expected multiples of one of {choices}")
