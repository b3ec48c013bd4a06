"""The ``dcext`` command: commands, entry point and error handling."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from dcext.cli import analyze, policy, report, run, store

app = typer.Typer(
    name="dcext",
    help="Double compression of language models: quantized so that they compress, entropy-coded, decoded just in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    store.compress,
    report.inspect,
    store.verify,
    store.decompress,
    run.evaluate,
    run.generate,
    analyze.analyze,
    policy.tune,
    policy.plan,
    report.info,
):
    app.command(name={"evaluate": "eval"}.get(command.__name__, command.__name__))(command)


def main() -> None:
    """Runs the command line. Errors are one line on stderr and exit code 1; ``DCEXT_TRACEBACK=1`` shows all of it."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("DCEXT_TRACEBACK") == "1":
            raise
        console = Console(stderr=True)
        console.print("[bold red]error:[/]", end=" ")
        console.print(
            f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(1)
