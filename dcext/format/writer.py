"""Atomic writing of checkpoints."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash
from torch import Tensor

from dcext.format.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    dump_manifest,
    hash_bytes,
)
from dcext.format.safetensors_header import DTYPE_NAMES, data_ptr_bytes, dump_header

WRITE_NBYTES = 16 << 20
RENAME_EXCHANGE = 2
AT_FDCWD = -100


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    *,
    max_shard_nbytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a folder as CONTAINER.md specifies, all of it or nothing.

    Everything is written to a temporary folder beside the target, flushed to the disk, and put in place by one rename;
    an existing checkpoint is exchanged for the new one in that same system call (where the system cannot exchange
    folders, the old one is renamed away first). A process that is killed leaves the target as it was, and a temporary
    folder that the next call removes. The same arguments always give the same bytes.

    Args:
        directory: the target. Missing, an empty folder, or, with ``overwrite``, a checkpoint.
        tensors: CPU tensors by name; streamed to the disk without copies of whole shards.
        files: small files by name, such as ``config.json``.
        max_shard_nbytes: a shard is closed before its tensors pass this size; one larger tensor is a shard of its own.
        overwrite: whether an existing checkpoint may be replaced.
        progress: called with the number of bytes written since the last call.

    Raises:
        FileExistsError: the target holds something else, or a checkpoint without ``overwrite``.
        ValueError: a tensor that is not on the CPU or has a dtype that safetensors lacks, or a reserved file name.
    """
    target = Path(directory).absolute()
    check_target(target, overwrite)
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{name}: expected a CPU tensor, got {tensor.dtype} on {tensor.device}"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = Path(
        tempfile.mkdtemp(prefix=_prefix(target) + f"{os.getpid()}-", dir=target.parent)
    )
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        _write_files(temporary, tensors, files, max_shard_nbytes, progress or (lambda nbytes: None))
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one that ``write_checkpoint`` wrote."""
    return (path / MANIFEST_NAME).is_file()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a target that must not be replaced; see ``write_checkpoint``.

    Raises:
        FileExistsError: what was expected and what was found.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_checkpoint(target):
        raise FileExistsError(
            f"{target}: expected a new or empty folder, found something that is not dcext's"
        )
    if not overwrite:
        raise FileExistsError(f"{target}: holds a dcext checkpoint; pass overwrite to replace it")


def _prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _remove_stale(target: Path) -> None:
    """Removes what writers of this target left behind when they were killed."""
    for path in target.parent.glob(_prefix(target) + "*"):
        pid = path.name.removeprefix(_prefix(target)).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
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
        if name in manifest or name == MANIFEST_NAME or "/" in name:
            raise ValueError(
                f"files: expected a plain name that the container does not use, got {name!r}"
            )
        _write_synced(folder / name, data)
        manifest[name] = {"nbytes": len(data), "xxh3_64": hash_bytes(data)}
    _write_synced(folder / MANIFEST_NAME, dump_manifest(manifest))
    _sync_folder(folder)


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """One rename; afterwards ``temporary`` is gone or holds what ``target`` held before."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name + "-old")
        os.rename(target, aside)
        os.rename(temporary, target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders atomically with renameat2(2). False where system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
