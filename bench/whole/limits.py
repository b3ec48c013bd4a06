"""Processes that get less memory, and a slower disk, than the machine has. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SYSTEMD = Path("/run/systemd/system")  # there if systemd runs this machine: sd_booted(3)
NAME = "dcext-offload-{}"
LEAVE_S = 5.0  # for the kernel to notice that a process has left its group
# A shell enters the groups before there is anything to count.
ENTER = 'for group in {groups}; do echo $$ > "$group/cgroup.procs" || exit 1; done; exec "$@"'
LIMIT_DATA = 'ulimit -d {kib} || exit 1; exec "$@"'


@dataclass(frozen=True)
class Limits:
    """What a process may use; None for all there is.

    Attributes:
        memory_nbytes: of memory, page cache that it causes included.
        disk_bytes_per_s: read from the disk that a folder lies on.
        folder: that folder.
    """

    memory_nbytes: int | None
    disk_bytes_per_s: float | None
    folder: Path


class Confinement:
    """How a process is held within limits.

    Attributes:
        means: what does it, for the row.
        prefix: of the command that it runs.
    """

    def __init__(self, means: str, prefix: list[str], memory_group: Path | None = None) -> None:
        self.means = means
        self.prefix = prefix
        self.memory_group = memory_group

    def peak_nbytes(self) -> int | None:
        """The most memory that it has used, page cache included; None where nobody counts."""
        if self.memory_group is None:
            return None
        return int((self.memory_group / "memory.max_usage_in_bytes").read_text())


@contextlib.contextmanager
def confined(limits: Limits) -> Iterator[Confinement]:
    """Makes what holds a process within limits, and removes it afterwards; the process must be gone then.

    Control groups of version 1 where they may be made; else a scope of systemd; else, for memory, RLIMIT_DATA, which
    counts what is allocated and no page cache.

    Raises:
        RuntimeError: nothing here can limit the disk.
    """
    if limits.memory_nbytes is None and limits.disk_bytes_per_s is None:
        yield Confinement("nothing", [])
        return
    with contextlib.ExitStack() as stack:
        try:
            confinement = _control_groups(limits, stack)
        except OSError:
            confinement = _scope(limits) or _resource_limit(limits)
        yield confinement


@contextlib.contextmanager
def slower_disk(folder: Path, bytes_per_s: float) -> Iterator[None]:
    """Holds what this process reads from the disk of a folder to a rate meanwhile, by a control group of version 1.

    Raises:
        OSError: there are none, or they may not be made.
    """
    with contextlib.ExitStack() as stack:
        group = _group("blkio", stack)
        rule = f"{disk_of(folder)} {bytes_per_s:.0f}"
        (group / "blkio.throttle.read_bps_device").write_text(rule)
        own = str(os.getpid())
        (group / "cgroup.procs").write_text(own)
        try:
            yield
        finally:
            (group.parent / "cgroup.procs").write_text(own)


def disk_of(folder: Path) -> str:
    """``major:minor`` of the whole disk that a folder lies on.

    Raises:
        RuntimeError: there is no disk, or not one, behind its file system.
    """
    device = folder.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        raise RuntimeError(f"{folder}: expected a file system on one disk to limit")
    entry = entry.resolve()
    return (
        (entry.parent if (entry / "partition").exists() else entry)
        .joinpath("dev")
        .read_text()
        .strip()
    )


def _control_groups(limits: Limits, stack: contextlib.ExitStack) -> Confinement:
    """Groups of version 1 below those of this process; OSError where they cannot be made."""
    groups = []
    memory_group = None
    if limits.memory_nbytes is not None:
        memory_group = _group("memory", stack)
        groups.append(memory_group)
        for name in (
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
        ):  # the latter counts swap
            if (memory_group / name).exists():
                (memory_group / name).write_text(str(limits.memory_nbytes))
    if limits.disk_bytes_per_s is not None:
        groups.append(_group("blkio", stack))
        rule = f"{disk_of(limits.folder)} {limits.disk_bytes_per_s:.0f}"
        (groups[-1] / "blkio.throttle.read_bps_device").write_text(rule)
    script = ENTER.format(groups=" ".join(f"'{group}'" for group in groups))
    return Confinement("cgroup v1", ["sh", "-c", script, "sh"], memory_group)


def _group(controller: str, stack: contextlib.ExitStack) -> Path:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = {
        c: path
        for _, names, path in (line.split(":", 2) for line in lines)
        for c in names.split(",")
    }
    if controller not in paths:
        raise FileNotFoundError(controller)
    group = CGROUPS / controller / paths[controller].lstrip("/") / NAME.format(os.getpid())
    group.mkdir()
    stack.callback(_remove, group)
    return group


def _remove(group: Path) -> None:
    end = time.monotonic() + LEAVE_S
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _scope(limits: Limits) -> Confinement | None:
    """A scope of systemd (control groups of version 2); None where systemd does not run."""
    if not SYSTEMD.is_dir() or shutil.which("systemd-run") is None:
        return None
    command = ["systemd-run", "--scope", "--quiet", "--collect"]
    command += [] if os.geteuid() == 0 else ["--user"]
    if limits.memory_nbytes is not None:
        command += ["-p", f"MemoryMax={limits.memory_nbytes}", "-p", "MemorySwapMax=0"]
    if limits.disk_bytes_per_s is not None:
        rule = f"/dev/block/{disk_of(limits.folder)} {limits.disk_bytes_per_s:.0f}"
        command += ["-p", f"IOReadBandwidthMax={rule}"]
    return Confinement("systemd scope", [*command, "--"])


def _resource_limit(limits: Limits) -> Confinement:
    if limits.disk_bytes_per_s is not None:
        raise RuntimeError(
            "--disk-limit: expected control groups that may be made here, or systemd"
        )
    script = LIMIT_DATA.format(kib=(limits.memory_nbytes or 0) >> 10)
    return Confinement("RLIMIT_DATA (no page cache)", ["sh", "-c", script, "sh"])
