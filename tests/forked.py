"""Processes that are forked from one that has imported torch already, which takes seconds each time.

A server is started once, without threads of its own; what runs here is a child of it with its own streams, environment,
modules and exit status. What depends on how Python starts (``PYTHONPATH``, ``OMP_NUM_THREADS``) or on when a module is
imported (``TRITON_INTERPRET``: the server has imported triton) takes ``subprocess`` instead.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.context
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

PRELOADED = ["transformers", "transformers.models.llama.modeling_llama", "dcext.cli.app"]


def run(
    *arguments: object, code: int = 0, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command ``dcext`` as a user does.

    Args:
        arguments: of the command.
        code: exit status that is expected.
        before: called in the child first; a function of a module, or a partial of one.

    Returns:
        Its arguments, exit status, and what it wrote.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return _in_child(_command, (before,), ["dcext", *arguments], environment, code)


def run_json(*arguments: object) -> dict:
    """What the command prints with ``--json``."""
    return json.loads(run(*arguments, "--json").stdout)


def run_script(path: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a file of Python, and expects that exit status."""
    return _in_child(_script, (path,), [path, *arguments], dict(os.environ), code)


def run_code(source: str, *arguments: object, timeout_s: float) -> None:
    """Runs lines of Python."""
    _in_child(_code, (source,), ["-c", *arguments], dict(os.environ), 0, timeout_s)


def _in_child(
    target: Callable[..., object],
    given: tuple[object, ...],
    arguments: list[object],
    environment: dict[str, str],
    code: int,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        for name in "12":
            (streams / name).touch()
        call = (target, given, command, environment, os.getcwd(), streams)
        process = _server().Process(target=_child, args=call)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{' '.join(command)}: more than {timeout_s} s")
        out, err = ((streams / name).read_text(encoding="utf-8") for name in "12")
    assert process.exitcode == code, out + err
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def _child(
    target: Callable[..., object],
    given: tuple[object, ...],
    command: list[str],
    environment: dict[str, str],
    directory: str,
    streams: Path,
) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(streams / str(descriptor), os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = command
    target(*given)


def _command(before: Callable[[], object] | None) -> None:
    from dcext.cli.app import main

    if before is not None:
        before()
    main()


def _script(path: Path) -> None:
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _code(source: str) -> None:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(source, main.__dict__)
