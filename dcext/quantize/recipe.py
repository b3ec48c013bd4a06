"""Recipes by name: what each takes, and the function that compresses with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# Modules of the recipes that come with dcext. They lie above this one and are loaded when a recipe is first asked for;
# each calls ``register``, as any other module may.
_MODULES = {
    "rate": "dcext.recipes.rate",
    "paper": "dcext.recipes.paper",
    "data-free": "dcext.recipes.data_free",
    "int8": "dcext.recipes.int8",
}
_registered: dict[str, Recipe] = {}


@dataclass(frozen=True)
class Recipe:
    """One way in which the weights of linear layers become integers.

    Attributes:
        name: as ``CompressionConfig.recipe``, in reports and on the command line.
        compress: called with a ``dcext.calibrate.job.Job``; gives each of ``job.names`` to ``job.emit`` and returns rows
            for ``CompressionReport.alphas``. None where all layers become INT8, as embeddings do.
        calibrated: whether it needs calibration text; the others take none.
        takes: groups of fields of ``CompressionConfig`` that mean something to it: ``"target"`` (bits, ratio or bytes),
            ``"pruning"`` (``alpha`` and ``sparsity``).
        granularity: of ``CompressionConfig`` unless told otherwise.
        default_bits: stored bits per weight without a target, by codec; 8 / 2.2 for codecs that are not here.
        limits: least and most stored bits per weight that may be asked for, by codec; 0 to 8 for codecs that are not here.
        folds_col_scales: whether scales of columns move into the norms that feed them.
        note: a word on the command line's help.
    """

    name: str
    compress: Callable[[Any], list[dict[str, float]]] | None = None
    calibrated: bool = False
    takes: frozenset[str] = frozenset()
    granularity: str = "row"
    default_bits: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    folds_col_scales: bool = False
    note: str = ""


def register(recipe: Recipe) -> None:
    """Makes a recipe known by its name.

    Raises:
        ValueError: there is one of that name.
    """
    if recipe.name in _registered:
        raise ValueError(f"register: expected a new recipe, got a second {recipe.name!r}")
    _registered[recipe.name] = recipe


def recipe_names() -> tuple[str, ...]:
    """All names, those that come with dcext first; nothing is loaded for them."""
    return tuple(dict.fromkeys([*_MODULES, *_registered]))


def recipe_named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        KeyError: it is not one of ``recipe_names``.
    """
    if name not in _registered:
        import_module(_MODULES[name])
    return _registered[name]


def recipes() -> list[Recipe]:
    """All recipes, in the order of ``recipe_names``."""
    return [recipe_named(name) for name in recipe_names()]


def one_of(names: list[str]) -> str:
    """``'rate' or 'data-free'``, for messages."""
    return " or ".join(repr(name) for name in names)
