"""What a long compression keeps on the disk, so that an interruption costs one block."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dcext.calibrate.inputs import Calibration
from dcext.format.mapped import SafetensorsFile
from dcext.format.replace import replace_file

KEY_NAME = "key.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ResumeFolder:
    """Steps of one job, each a safetensors file with its JSON in the metadata, written whole or not at all.

    The folder outlives the job: layers made from it map its files, and only when the result is saved is what it holds no
    longer needed. Then the caller removes it: ``ResumeFolder.remove`` or ``remove_resume_folder``.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Opens the folder of a job, or starts it anew where it belongs to another.

        Args:
            path: made if missing; what is in it is removed unless its key is this one.
            key: tells the job: hash of model, text and settings.

        Raises:
            FileExistsError: a folder that is no such one.
            OSError: the folder cannot be made.
        """
        self.path = path
        known = _key_of(path)
        if known == key:
            for partial in path.glob(".*.tmp-*"):  # of a process that was killed
                partial.unlink(missing_ok=True)
            return
        if path.exists() and known is None and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path}: expected a folder of an interrupted compression, found something else"
            )
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        self._write(
            KEY_NAME, lambda partial: partial.write_bytes(json.dumps({"key": key}).encode())
        )

    def save(self, step: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes a step, replacing an earlier one of the same name.

        Raises:
            OSError: it could not be written, the disk being full for example. What was kept before stays as it was.
        """
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"json": json.dumps(meta)}
        self._write(
            f"{step}.safetensors", lambda partial: save_file(contiguous, partial, metadata=metadata)
        )

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
        """Removes the folder: its job is done, and the result saved."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        target = self.path / name
        try:
            replace_file(target, write)
        except (OSError, SafetensorError) as error:
            number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
            if number not in NO_SPACE and isinstance(error, OSError):
                raise
            raise OSError(
                number,
                f"{os.strerror(number or errno.EIO)} while a step of the compression was kept; the steps before it are kept: make "
                "room and run the same again, which goes on there",
                str(target),
            ) from error


def remove_resume_folder(path: str | Path) -> None:
    """Removes the folder of a job whose result was saved; nothing where there is none.

    Raises:
        FileExistsError: a folder that no compression made.
    """
    path = Path(path)
    if not path.exists():
        return
    if _key_of(path) is None:
        raise FileExistsError(f"{path}: expected a folder of a compression, found something else")
    shutil.rmtree(path, ignore_errors=True)


def job_key(model: nn.Module, calibration: Calibration, settings: dict[str, Any]) -> str:
    """A hash of everything that the result depends on. Weights on the meta device are told apart by shape alone."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    if isinstance(calibration, Tensor):
        digest.update(_bytes_of(calibration))
    else:
        for name, tensor in calibration.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes_of(tensor))
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(_bytes_of(parameter))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def _key_of(path: Path) -> str | None:
    """The key of a resume folder; None for anything else, a folder whose key was not finished among them."""
    try:
        return json.loads((path / KEY_NAME).read_text()).get("key")
    except (OSError, ValueError, AttributeError):
        return None


def _errno_in(message: str) -> int:
    """The error number in a message of safetensors, which has no other place for it: ``.. (os error 28)``."""
    digits = message.rpartition("os error ")[2].partition(")")[0]
    return int(digits) if digits.isdigit() else errno.EIO
