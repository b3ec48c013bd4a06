"""What a long compression keeps on the disk, so that an interruption costs one block."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn

from dcext.format.mapped import SafetensorsFile
from dcext.format.replace import replace_file

KEY_NAME = "key.json"


class ResumeFolder:
    """Steps of one job, each a safetensors file with its JSON in the metadata, written whole or not at all."""

    def __init__(self, path: Path, key: str) -> None:
        """Opens the folder of a job, or starts it anew where it belongs to another.

        Args:
            path: made if missing; what is in it is removed unless its key is this one.
            key: tells the job: hash of model, text and settings.
        """
        self.path = path
        stated = path / KEY_NAME
        known = json.loads(stated.read_text()).get("key") if stated.is_file() else None
        if known != key:
            if path.exists() and known is None and any(path.iterdir()):
                raise FileExistsError(
                    f"{path}: expected a folder of an interrupted compression, found something else"
                )
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            _write_synced(stated, json.dumps({"key": key}).encode())

    def save(self, step: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes a step, replacing an earlier one of the same name."""
        target = self.path / f"{step}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"json": json.dumps(meta)}
        replace_file(target, lambda partial: save_file(contiguous, partial, metadata=metadata))

    def load(self, step: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A step's tensors, mapped from the file, and its JSON; None where it is not there or was not finished."""
        path = self.path / f"{step}.safetensors"
        if not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
            return {name: file.get(name) for name in file.names()}, json.loads(
                file.metadata("json")
            )
        except ValueError:  # FormatError too
            return None

    def remove(self) -> None:
        """Removes the folder: the job is done."""
        shutil.rmtree(self.path, ignore_errors=True)


def job_key(model: nn.Module, calibration: Tensor, settings: dict[str, Any]) -> str:
    """A hash of everything that the result depends on. Weights on the meta device are told apart by shape alone."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(calibration.contiguous().numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
