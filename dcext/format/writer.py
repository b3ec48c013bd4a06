"""Atomic writing of checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash
from torch import Tensor

from dcext.errors import FormatError
from dcext.format.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    SHARD_STEM,
    dump_manifest,
    hash_bytes,
    is_plain_name,
    parse_manifest,
)
from dcext.format.replace import replacing
from dcext.format.safetensors_header import (
    DTYPE_NAMES,
    METADATA_KEY,
    data_ptr_bytes,
    dump_header,
)

WRITE_NBYTES = 16 << 20
RESERVED_NAME = re.compile(r"dcext\.json|(dcext|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# What transformers would take for a model.
MODEL_NAME = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|.*\.gguf"
)


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    *,
    max_shard_nbytes: int = 5_000_000_000,
    overwrite: bool = False,
    beside: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a folder as CONTAINER.md specifies, all of it or nothing.

    Everything is written to a temporary folder beside the target, flushed to the disk, and put in place by one rename;
    an existing checkpoint is exchanged for the new one in that same system call (where the system cannot exchange
    folders, the old one is renamed away first, and put back by the next call if the process dies just then). A process
    that is killed leaves the target as it was, and a temporary folder that the next call removes. The same arguments,
    in the same order, always give the same bytes. A target that is a link stays one: the folder behind it is replaced.

    Files beside an earlier checkpoint that are not part of it, such as a README, are kept, and so are its small files
    that are not written anew, such as those of a tokenizer.

    Args:
        directory: the target. Missing, an empty folder, or, with ``overwrite``, a checkpoint.
        tensors: CPU tensors by name; streamed to the disk without copies of whole shards.
        files: small files by name, such as ``config.json``.
        max_shard_nbytes: a shard is closed before its tensors pass this size; one larger tensor is a shard of its own.
        overwrite: whether an existing checkpoint may be replaced.
        beside: whether the target may hold other files, which are kept, such as those of a tokenizer.
        progress: called with the number of bytes written since the last call.

    Raises:
        FileExistsError: the target holds something else, or with ``beside`` another model or the current folder; a
            checkpoint without ``overwrite``; or it is a mount point.
        ValueError: a tensor that is not on the CPU or has a dtype that safetensors lacks, or a reserved name.
    """
    _check_arguments(tensors, files)
    if max_shard_nbytes < 1:
        raise ValueError(f"max_shard_nbytes: expected at least 1, got {max_shard_nbytes}")
    target = Path(directory).resolve()  # a link stays, and what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, lambda: check_target(target, overwrite, beside)) as folder:
        kept = _earlier_files(target)
        report = progress or (lambda nbytes: None)
        _write_files(folder, tensors, {**kept, **files}, max_shard_nbytes, report)
        _keep_foreign(target, folder)


def _earlier_files(target: Path) -> dict[str, bytes]:
    """The small files of the checkpoint that is replaced; empty where there is none, or its manifest is damaged."""
    manifest = target / MANIFEST_NAME
    if not manifest.is_file():
        return {}
    try:
        entries = parse_manifest(manifest.read_bytes())
    except FormatError:
        return {}
    names = [name for name, entry in entries.items() if "tensors" not in entry]
    return {
        name: (target / name).read_bytes()
        for name in names
        if not RESERVED_NAME.fullmatch(name) and (target / name).is_file()
    }


def _keep_foreign(target: Path, folder: Path) -> None:
    """Puts what lies in the target and is nobody's of a checkpoint into the folder that takes its place: the same files."""
    if not target.is_dir():
        return
    for path in sorted(target.iterdir()):
        if RESERVED_NAME.fullmatch(path.name) or (folder / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, folder / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _check_arguments(tensors: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{name}: expected a CPU tensor, got {tensor.dtype} on {tensor.device}"
            )
        if name == METADATA_KEY:
            raise ValueError(
                f"tensors: expected a name that safetensors does not use, got {name!r}"
            )
    for name in files:
        if not is_plain_name(name) or RESERVED_NAME.fullmatch(name):
            raise ValueError(
                f"files: expected a plain name that the container does not use, got {name!r}"
            )


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one that ``write_checkpoint`` wrote."""
    return (path / MANIFEST_NAME).is_file()


def check_target(target: Path, overwrite: bool, beside: bool = False) -> None:
    """Refuses a target that must not be replaced; see ``write_checkpoint``.

    Raises:
        FileExistsError: what was expected and what was found.
    """
    if target.is_mount():
        raise FileExistsError(
            f"{target}: expected a folder, found a mount point, which cannot be replaced as a whole; "
            "choose a folder inside it"
        )
    found = next(target.iterdir(), None) if target.is_dir() else target
    if found is None or not target.exists():
        return
    if beside and target.is_dir() and not is_checkpoint(target):
        _check_beside(target)
        return
    if not is_checkpoint(target):
        raise FileExistsError(
            f"{target}: expected a new or empty folder, found {found.name!r}, which is not dcext's"
        )
    if not overwrite:
        raise FileExistsError(
            f"{target}: expected a new or empty folder, found a dcext checkpoint: pass overwrite=True to replace it"
        )


def _check_beside(target: Path) -> None:
    models = [path.name for path in target.iterdir() if MODEL_NAME.fullmatch(path.name)]
    if models:
        raise FileExistsError(
            f"{target}: expected a folder without a model, found {models[0]!r}: remove it, or choose another folder"
        )
    if Path.cwd().is_relative_to(target):
        raise FileExistsError(
            f"{target}: expected a folder that can be replaced, found the current one; choose a folder inside it"
        )


def _shards(tensors: Mapping[str, Tensor], max_shard_nbytes: int) -> list[dict[str, Tensor]]:
    """Splits by size. Payloads come first: their sizes are multiples of 64, so that they stay aligned to that."""
    ordered = sorted(
        tensors, key=lambda name: (not name.endswith(".payload"), -tensors[name].element_size())
    )
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in ordered:
        nbytes = tensors[name].nbytes
        if shards[-1] and size + nbytes > max_shard_nbytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += nbytes
    return shards


def weights_file(tensors: Mapping[str, Tensor], max_shard_nbytes: int) -> str:
    """The file of a checkpoint that holds all tensors, or, with several, the one that says which file holds which."""
    return (
        f"{SHARD_STEM}.safetensors" if len(_shards(tensors, max_shard_nbytes)) == 1 else INDEX_NAME
    )


def _write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    max_shard_nbytes: int,
    progress: Callable[[int], None],
) -> None:
    manifest: dict[str, dict] = {}
    shards = _shards(tensors, max_shard_nbytes)
    count = len(shards)
    names = [f"{SHARD_STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [f"{SHARD_STEM}.safetensors"]
    small = dict(files)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        small[INDEX_NAME] = (json.dumps(index, indent=2) + "\n").encode()
    for name, shard in zip(names, shards, strict=True):
        manifest[name] = _write_shard(folder / name, shard, progress)
    for name, data in sorted(small.items()):
        _write_synced(folder / name, data)
        manifest[name] = {"nbytes": len(data), "xxh3_64": hash_bytes(data)}
    _write_synced(folder / MANIFEST_NAME, dump_manifest(manifest))


def _write_shard(path: Path, shard: Mapping[str, Tensor], progress: Callable[[int], None]) -> dict:
    header = dump_header(shard, {"format": "pt", "dcext_format_version": str(FORMAT_VERSION)})
    hashes: dict[str, str] = {}
    with open(path, "xb") as file:
        file.write(header)
        for name, tensor in shard.items():
            hashes[name] = _write_tensor(file, tensor, progress)
        file.flush()
        os.fsync(file.fileno())
        nbytes = file.tell()
    return {"nbytes": nbytes, "header_xxh3_64": hash_bytes(header), "tensors": hashes}


def _write_tensor(file: BinaryIO, tensor: Tensor, progress: Callable[[int], None]) -> str:
    data = data_ptr_bytes(tensor.detach().contiguous())
    digest = xxhash.xxh3_64()
    for begin in range(0, len(data), WRITE_NBYTES):
        part = data[begin : begin + WRITE_NBYTES]
        file.write(part)
        digest.update(part)
        progress(len(part))
    return digest.hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
