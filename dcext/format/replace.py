"""Folders and files put in place whole: written beside their target, swapped in by one rename, cleaned up after a crash."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RENAME_EXCHANGE = 2
AT_FDCWD = -100
OLD_SUFFIX = "-old"
ATTEMPTS = 100


@contextmanager
def replacing(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Gives an empty folder that takes the place of ``target`` when the block ends, and is removed when it raises.

    Args:
        target: resolved path of the folder to make or to replace; its parent exists.
        check: raises where ``target`` must not be replaced; called before, and again just before the exchange.
    """
    _clean_up(target)
    check()
    temporary, descriptor = _make_temporary(target)
    try:
        yield temporary
        sync_folder(temporary)
        check()
        _put_in_place(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path``, then puts it in its place."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _make_temporary(target: Path) -> tuple[Path, int]:
    """A new folder beside ``target`` and the descriptor that keeps it locked while its writer lives.

    A lock, and not the process id in the name, tells whether the writer lives: ids are reused, and mean nothing in
    another container or on another machine that shares the file system.
    """
    for _ in range(ATTEMPTS):
        path = target.parent / f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(path)
        descriptor = _lock(path)
        if descriptor is not None and path.exists():
            return path, descriptor
        # Another writer took the folder for a dead one's before it was locked, and removes it.
        if descriptor is not None:
            os.close(descriptor)
    raise FileExistsError(f"{target}: other writers removed {ATTEMPTS} temporary folders beside it")


def _lock(path: Path, needed: bool = False) -> int | None:
    """Opens and locks a folder; None where it is gone or another holds the lock.

    With ``needed`` also where it cannot be opened or the file system has no such locks; without, the latter is let pass.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if needed or isinstance(error, FileNotFoundError):
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if needed or isinstance(error, BlockingIOError):
            os.close(descriptor)
            return None
    return descriptor


def _clean_up(target: Path) -> None:
    """Removes what killed writers of this target left, and puts back what one had renamed away."""
    prefix = _prefix(target)
    for path in sorted(target.parent.iterdir()):
        if not path.name.startswith(prefix):
            continue
        if not path.name.removeprefix(prefix).partition("-")[0].isdigit():
            continue
        descriptor = _lock(path, needed=True)
        if descriptor is None:
            continue
        try:
            if path.name.endswith(OLD_SUFFIX) and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Afterwards ``temporary`` is gone or holds what ``target`` held before."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        _rename_in_two_steps(temporary, target)


def _rename_in_two_steps(temporary: Path, target: Path) -> None:
    aside = temporary.with_name(temporary.name + OLD_SUFFIX)
    descriptor = _lock(target)  # so that no other writer puts it back meanwhile
    try:
        os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    sync_folder(target.parent)
    os.rename(
        aside, temporary
    )  # a name that nobody puts back: from now on it is removed piece by piece


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
