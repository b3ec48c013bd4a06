"""Reading of checkpoints: mapped into memory, nothing loaded that is not asked for, nothing trusted."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from dcext.errors import FormatError
from dcext.format.manifest import MANIFEST_NAME, MAX_MANIFEST_NBYTES, hash_bytes, parse_manifest
from dcext.format.mapped import map_file, tensor_view
from dcext.format.safetensors_header import TensorInfo, header_nbytes, parse_header

HASH_NBYTES = 4 << 20


class CheckpointReader:
    """An open checkpoint. Every byte that it hands out can be checked against the manifest.

    Opening validates the manifest, names of all files, and sizes and headers of the shards; data, and small files, are
    read when asked for. The files stay mapped until the reader and all tensors taken from it are gone; nothing has to be
    closed. One that another process shrinks meanwhile faults (SIGBUS), as with any mapping. ``write_checkpoint`` never
    does that: it replaces whole folders.
    """

    def __init__(self, directory: str | Path, *, partial: bool = False) -> None:
        """Opens a folder that ``write_checkpoint`` wrote.

        Args:
            directory: the folder.
            partial: whether small files may be missing, as in the cache of a hub, which holds what was asked for.

        Raises:
            FileNotFoundError, NotADirectoryError: no such folder.
            FormatError: not a dcext checkpoint, or one that is damaged: file, expected and found.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            is_file = self.directory.exists()
            kind = NotADirectoryError if is_file else FileNotFoundError
            raise kind(
                f"{self.directory}: expected a folder that `dcext compress` or save_pretrained wrote, found "
                f"{'a file' if is_file else 'none'}"
            )
        self._files = self._read_manifest()
        self._views: dict[str, memoryview] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for name, entry in self._files.items():
            path = self.directory / name
            if partial and "tensors" not in entry and not path.exists():
                continue
            if not path.is_file():
                raise FormatError(f"{path}: expected {entry['nbytes']} bytes, found no such file")
            if "tensors" not in entry:
                continue  # read_file checks it: an edited tokenizer must not keep the weights from being loaded
            if path.stat().st_size != entry["nbytes"]:
                raise FormatError(
                    f"{path}: expected {entry['nbytes']} bytes, found {path.stat().st_size}"
                )
            self._open_shard(name, entry)

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.directory / MANIFEST_NAME
        if not path.is_file():
            raise FormatError(
                f"{path}: expected the manifest of a dcext checkpoint, found no such file; "
                "`dcext compress` makes one from an ordinary model"
            )
        if path.stat().st_size > MAX_MANIFEST_NBYTES:
            raise FormatError(
                f"{path}: expected at most {MAX_MANIFEST_NBYTES} bytes, found {path.stat().st_size}"
            )
        return parse_manifest(path.read_bytes())

    def _open_shard(self, name: str, entry: dict[str, Any]) -> None:
        view = self._map(name)
        header = view[: header_nbytes(name, view)]
        _compare(f"{name}: header", entry["header_xxh3_64"], hash_bytes(header))
        infos = parse_header(name, view)
        if infos.keys() != entry["tensors"].keys():
            different = sorted(infos.keys() ^ entry["tensors"].keys())[0]
            raise FormatError(
                f"{name}: expected the tensors of the manifest, found a difference in {different!r}"
            )
        for tensor, info in infos.items():
            if tensor in self._tensors:
                raise FormatError(
                    f"{name}: tensor {tensor!r}: found in {self._tensors[tensor].file} too"
                )
            self._tensors[tensor] = info

    def _map(self, name: str) -> memoryview:
        if name not in self._views:
            self._views[name] = map_file(self.directory / name)
        return self._views[name]

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; reads nothing.

        Raises:
            KeyError: no such tensor.
        """
        return self._tensors[name]

    @property
    def file_names(self) -> list[str]:
        """All files of the folder but the manifest."""
        return sorted(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files on the disk, the manifest included."""
        return sum((self.directory / name).stat().st_size for name in [*self._files, MANIFEST_NAME])

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    def get(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file: no copy, not verified, read-only (writing to it is undefined).

        A tensor that does not lie at a multiple of its element size, as only other writers' do, is copied.

        Raises:
            KeyError: no such tensor.
        """
        info = self._tensors[name]
        return tensor_view(self._map(info.file), info)

    def release(self, name: str) -> None:
        """Gives the pages of a tensor that were read back to the system; they are read again when they are touched."""
        info = self._tensors[name]
        mapping = self._map(info.file).obj
        if isinstance(mapping, mmap.mmap) and info.nbytes > 0:
            begin = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)

    def _bytes(self, info: TensorInfo) -> memoryview:
        return self._map(info.file)[info.offset : info.offset + info.nbytes]

    def verify(self, name: str, progress: Callable[[int], None] | None = None) -> None:
        """Compares a tensor's bytes with their hash.

        Raises:
            FormatError: file, tensor, expected and found.
        """
        info = self._tensors[name]
        data, digest = self._bytes(info), xxhash.xxh3_64()
        for begin in range(0, info.nbytes, HASH_NBYTES):
            part = data[begin : begin + HASH_NBYTES]
            digest.update(part)
            if progress is not None:
                progress(len(part))
        expected = self._files[info.file]["tensors"][name]
        _compare(f"{info.file}: tensor {name!r}", expected, digest.hexdigest())

    def verify_all(self, progress: Callable[[int], None] | None = None) -> None:
        """Compares every byte of every file with its hash.

        Args:
            progress: called with the number of tensor bytes checked since the last call.

        Raises:
            FormatError: the first difference.
        """
        self.read_files()
        for name in self.names():
            self.verify(name, progress)

    def read_files(self) -> dict[str, bytes]:
        """All small files, such as ``config.json`` and the tokenizer's, verified.

        Raises:
            FormatError: the first difference.
        """
        small = [name for name, entry in self._files.items() if "tensors" not in entry]
        return {name: self.read_file(name) for name in small}

    def read_file(self, name: str) -> bytes:
        """A small file such as ``config.json``, verified.

        Raises:
            KeyError: the manifest has no such file.
            FormatError: its bytes are not those that were written.
        """
        path = self.directory / name
        data, entry = path.read_bytes(), self._files[name]
        found = hash_bytes(data)
        if found != entry["xxh3_64"]:
            raise FormatError(
                f"{path}: checksum: expected {entry['xxh3_64']} of {entry['nbytes']} bytes, found {found} of {len(data)}: "
                "restore it; or, if you edited it or saved a tokenizer there, seal the folder as it is: "
                "dcext.save_pretrained(dcext.from_pretrained(FOLDER), FOLDER, overwrite=True)"
            )
        return data


def _compare(place: str, expected: str, found: str) -> None:
    if expected != found:
        raise FormatError(f"{place}: checksum: expected {expected}, found {found}")
