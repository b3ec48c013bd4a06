"""What all plots share: where they may be written, their size and resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcext.format.replace import replace_file

DPI = 120
PANEL_INCHES = (6.5, 4.2)


def check_plot(path: str | Path) -> None:
    """Tells before any work whether a figure can be written.

    Args:
        path: of the PNG file; it may exist.

    Raises:
        ValueError: its name does not end in ``.png``.
        FileNotFoundError: its folder does not exist.
        RuntimeError: matplotlib is missing; names the extra that brings it.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"plot: {path}: expected a name ending in .png, got {path.suffix or 'no suffix'}"
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"plot: {path}: expected a folder {path.parent}, found none")
    new_figure(1, 1)


def new_figure(rows: int, columns: int) -> Any:
    """A figure of the Agg canvas, apart from pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            f"plots: expected matplotlib, found none ({error}): pip install 'dcext[plot]'"
        ) from error
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns + 1.5, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes a figure as PNG, all or nothing."""
    replace_file(Path(path), lambda file: figure.savefig(file, format="png", dpi=DPI))
