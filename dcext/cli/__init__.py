"""The ``dcext`` command. Heavy modules are imported inside the commands, so that help is instant."""

from __future__ import annotations

import sys

_PACKAGES = ("typer", "rich")  # of the extra dcext[cli]


def main() -> None:
    """Runs the command line, or says what to install where its packages are missing."""
    try:
        from dcext.cli.app import main as run
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.exit(
            f"error: dcext: expected the package {package}, found none: pip install 'dcext[cli]'"
        )
    run()
