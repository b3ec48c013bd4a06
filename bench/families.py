"""Every family of models under every recipe: how much is compressed, how far outputs move, whether files give the same back.

Models are tiny, random and the worst case for rounding: real ones are wider. Writes results/families.json row by row (a
run goes on where another stopped) and docs/FAMILIES.md from it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import typer
from hardware import ROOT, hardware
from rowfile import Row, RowFile

sys.path.insert(0, str(ROOT / "tests"))

from zoo import FAMILIES
from zoo.check import RECIPES, check_family

RESULTS = ROOT / "bench" / "results" / "families.json"
TABLE = ROOT / "docs" / "FAMILIES.md"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Families; all unless named.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes; all unless named.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure again what is in the results.")] = False,
    table: Annotated[bool, typer.Option(help="Only write the table.")] = False,
) -> None:
    """Check families and write the table."""
    from rich.progress import track

    file = RowFile(RESULTS, lambda row: (row["family"], row["recipe"]), figures)
    torch.set_num_threads(1)
    keys = [(n, r) for n in names or FAMILIES for r in recipe or RECIPES]
    todo = [] if table else [key for key in keys if fresh or key not in file.rows]
    line = hardware()["line"]
    for name, how in track(todo, description="families"):
        family = FAMILIES[name]
        reason = family.missing()
        if reason:
            print(f"{name}: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = check_family(family, how, Path(folder)).to_dict()
        file.add((name, how), {**row, "hardware": line})
        print(f"{name:28} {how:10} error {row['error']:.4f} {row['error_int8']:.4f}", flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text_of(file.rows))


def figures(rows: list[Row]) -> dict[str, Any]:
    """Counts over all rows, by recipe."""
    result = {}
    for recipe in RECIPES:
        chosen = [row for row in rows if row["recipe"] == recipe]
        if not chosen:
            continue
        result[recipe] = {
            "families": len(chosen),
            "covered": sum(row["coverage"] >= 0.95 for row in chosen),
            "as computed by the dequantized model": sum(row["computed"] < 1e-3 for row in chosen),
            "files give the same back": sum(row["loaded"] is True for row in chosen),
            "error at most 2 %": sum(row["error"] <= 0.02 for row in chosen),
            "error in int8 at most 8 %": sum(row["error_int8"] <= 0.08 for row in chosen),
            "median error": median(row["error"] for row in chosen),
            "median error in int8": median(row["error_int8"] for row in chosen),
        }
    return result


def text_of(rows: dict[tuple[str, str], Row]) -> str:
    """The page."""
    counts = figures(list(rows.values()))
    families = {name: group for (name, _), row in rows.items() for group in [row["group"]]}
    lines = [
        "# Families of models",
        "",
        f"{len(families)} families of models, tiny and with random weights, were compressed (with which recipe how many, the first table",
        "says), run, stored, loaded by `dcext.from_pretrained` and by the automatic class of transformers, and stored again.",
        "`make families` measures this and writes the page.",
        "",
        "- *covered*: weights of matrices that are compressed; what is left, and why, stands below.",
        "- *W8A16, W8A8*: distance of the outputs from the float model's, relative (2-norm), with activations in float and in int8.",
        "  Layers of random models that are 64 wide are the worst case: weights have no structure, and nothing averages out.",
        "- With float activations all outputs are those of a float model with the dequantized weights, to 0.1 %, unless marked.",
        "- *files*: the same outputs from both loaders, and the same bytes when stored again. Empty: no model of transformers.",
        "- Recipes `data-free` and `rate` aim at 5 bits in the blocks, `packed` is `rate` for codec packed at 5.5. Calibration has 16 times",
        "  the windows of a test input, some 500 tokens: few for experts, which see only their own.",
        "",
        str(next(iter(rows.values()))["hardware"]),
        "",
        "| recipe | families | covered to 95 % | as dequantized | files | W8A16 within 2 % | W8A8 within 8 % | median W8A16 / W8A8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, figure in counts.items():
        values = list(figure.values())
        shares = " | ".join(str(value) for value in values[:6])
        lines.append(f"| `{recipe}` | {shares} | {values[6]:.2%} / {values[7]:.2%} |")
    lines += [
        "",
        "| family | covered | `int8` W8A16 / W8A8 | `data-free` | `rate` | `packed` | files | left float |",
        "|---|---|---|---|---|---|---|---|",
    ]
    group = ""
    for name, found in families.items():
        if found != group:
            group = found
            lines.append(f"| **{group}** | | | | | | | |")
        lines.append(_line(name, {r: rows[name, r] for r in RECIPES if (name, r) in rows}))
    return "\n".join(lines) + "\n"


def _line(name: str, found: dict[str, Row]) -> str:
    first = next(iter(found.values()))
    cells = []
    for recipe in RECIPES:
        row = found.get(recipe)
        text = "" if row is None else f"{row['error']:.1%} / {row['error_int8']:.1%}"
        cells.append(text + (" *" if row is not None and row["computed"] >= 1e-3 else ""))
    loaded = {row["loaded"] for row in found.values()}
    files = "" if loaded == {None} else "same" if loaded == {True} else "**differ**"
    left = ", ".join(f"{weights:,} {reason}" for reason, weights in first["left"].items())
    return f"| {name} | {first['coverage']:.1%} | {' | '.join(cells)} | {files} | {left} |"


if __name__ == "__main__":
    typer.run(main)
