"""Python environments of their own for peers that do not go beside what the project uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hardware import ROOT


def output_of(
    command: list[str], folder: Path = ROOT, variables: Mapping[str, str] | None = None
) -> str:
    """Runs a process, without a model hub, and gives what it writes to stdout; nothing reaches the terminal.

    Args:
        command: program and arguments.
        folder: to run in.
        variables: added to the environment.

    Raises:
        RuntimeError: it failed; the message is the last line of its output.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(variables or {})}
    with tempfile.TemporaryFile("w+") as log:
        result = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
        log.seek(0)
        lines = (result.stdout + log.read()).strip().splitlines() or ["no output"]
    if result.returncode != 0:
        code = result.returncode
        raise RuntimeError(f"{' '.join(command[1:])}: exit code {code}: {lines[-1]}")
    return result.stdout


def run_job(python: Callable[..., str], worker: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What a worker makes of a job; both are JSON, it reads the one from a file and prints the other.

    Args:
        python: runs a Python, as ``Environment.python``.
        worker: its script.
        job: what it is told.
    """
    with tempfile.TemporaryDirectory(prefix="dcext-job-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        return json.loads(python(str(worker), str(path)))


@dataclass(frozen=True)
class Environment:
    """A folder beside ``.venv`` that borrows torch and all else from the environment that runs this, and adds peers.

    Attributes:
        name: of the folder.
        requirements: pinned versions of the peers.
        variables: environment variables of the installation, such as ``CMAKE_ARGS``.
    """

    name: str
    requirements: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def is_ready(self) -> bool:
        """Whether it holds the pinned versions and borrows from this very environment."""
        stamp = ROOT / self.name / "stamp"
        return stamp.is_file() and stamp.read_text() == self._stamp()

    def make(self) -> None:
        """Creates it unless it is ready; this environment's torch is used and not replaced.

        Raises:
            RuntimeError: pip failed; the message is its last line.
        """
        if self.is_ready():
            return
        print(f"installing {', '.join(self.requirements)} into {self.name}", file=sys.stderr)
        folder = ROOT / self.name
        if folder.exists():
            shutil.rmtree(folder)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        constraints = folder / "constraints.txt"
        constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n")
        pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraints))
        self.python(*pip, *self.requirements, variables=self.variables)
        (folder / "stamp").write_text(self._stamp())

    def python(
        self, *arguments: str, folder: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> str:
        """Runs its Python: see ``output_of``."""
        return output_of([str(ROOT / self.name / "bin/python"), *arguments], folder, variables)

    def _stamp(self) -> str:
        borrowed = [f"torch=={version('torch')}", sysconfig.get_path("purelib")]
        return "\n".join([*self.requirements, *borrowed]) + "\n"
