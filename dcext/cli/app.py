"""The ``dcext`` command: commands, entry point and error handling."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

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

# Arguments of functions that are not named as the options that users type for them.
_OPTION_OF = {
    "target_bits": "bits",
    "target_ratio": "ratio",
    "target_nbytes": "size_mb",
    "calibration text": "calibration",
    "max_shard_nbytes": "max_shard_gb",
    "mix": "tokens",
}
_FUNCTIONS = ("CompressionConfig: ", "compress_: ", "from_pretrained: ", "offload: ", "tune: ")
_ClickException: Any = typer.BadParameter.__mro__[2]  # click's, or that of typer's own copy of it


def main() -> None:
    """Runs the command line. Errors are one line on stderr and exit code 1, or 2 for options that there are not.

    ``DCEXT_TRACEBACK=1`` shows all of an error.
    """
    command = typer.main.get_command(app)
    try:
        sys.exit(command.main(standalone_mode=False))
    except _ClickException as error:
        if len(sys.argv) == 1:  # what is missing is told by the help
            error.show()
        else:
            _print_error(
                "UsageError", error.format_message() + _given(getattr(error, "param", None))
            )
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if os.environ.get("DCEXT_TRACEBACK") == "1":
            raise
        _print_error(type(error).__name__, as_typed(str(error), _options(command, sys.argv[1])))
        sys.exit(1)


def _print_error(kind: str, message: str) -> None:
    console = Console(stderr=True)
    console.print("[bold red]error:[/]", end=" ")
    line = " ".join(message.split())
    console.print(f"{kind}: {line}", markup=False, highlight=False, soft_wrap=True)


def _given(parameter: Any) -> str:
    """What a user gave for an option that is refused, as not every version of typer says."""
    for option in getattr(parameter, "opts", ()):
        for argument, value in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
            if argument == option or argument.startswith(f"{option}="):
                return f", got {(value if argument == option else argument.partition('=')[2])!r}"
    return ""


def _options(command: Any, name: str) -> dict[str, str]:
    """What users type for each argument of a command and of the functions that it calls."""
    typed = {p.name: p.opts[-1] for p in command.commands[name].params}
    typed = {name: text for name, text in typed.items() if text.startswith("--")}
    return typed | {own: typed[option] for own, option in _OPTION_OF.items() if option in typed}


def as_typed(message: str, options: Mapping[str, str]) -> str:
    """A message with arguments as users typed them: ``--bits: ..`` for ``CompressionConfig: target_bits: ..``.

    Args:
        message: ``FUNCTION: ARGUMENT: ..`` or ``ARGUMENT: ..``; several arguments are separated by commas.
        options: what users type, by argument; messages about other arguments stay as they are.
    """
    message = re.sub(r"\b(\w+)=True\b", lambda found: options.get(found[1], found[0]), message)
    function = next((name for name in _FUNCTIONS if message.startswith(name)), "")
    names, colon, rest = message.removeprefix(function).partition(": ")
    typed = [options.get(name) for name in names.split(", ")]
    if not colon or None in typed:
        return message
    return f"{', '.join(map(str, typed))}: {rest}"
