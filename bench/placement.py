"""What does the policy gain on machines that one does not have? Projected, by the model of dcext.policy.predict.

    python bench/placement.py [--output FILE.json] [--smoke]

Shapes of published models on the presets of `dcext plan --machine`, each in the memory that such machines have, less a fifth
for what is not weights; where plain INT8 fits in that, in half of plain INT8 instead. The policy's time against

- uniform: the paper's share. Every n-th layer is entropy-coded, the others are plain INT8 where the model runs; as few as let
  the model fit. With a device those coded rest there or wait on the host, whichever is faster.
- one tier: the best single tier for all layers that fits, all or nothing.
- no packed: the policy itself, without codec packed: what is left is placing.
- INT8: plain INT8, as many layers as fit where the model runs, the others from the host or, without a device, the disk.

Attention, norms and the host's own time are not in it, so ratios are upper bounds of what a user sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from hardware import ROOT, hardware_line
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.machine import PROJECTED
from dcext.policy.predict import Predictor, Unit
from dcext.policy.presets import presets
from dcext.policy.shapes import SHAPES, units_of
from dcext.policy.tier import Tier
from dcext.policy.timeline import SLOTS_NBYTES

LENGTHS = (1, 16, 512)
TOLERANCE = 2e-3  # relative; plans leave out reads and travels that gain less than half of it
FOR_WEIGHTS = 0.8  # of memory; the rest is for activations and past tokens
# Bytes of device and host memory, as such machines are sold.
MEMORY = {
    "pcie3": (11e9, 32e9),
    "pcie4": (24e9, 64e9),
    "pcie5": (80e9, 512e9),
    "nvlink-c2c": (96e9, 480e9),
    "jetson": (32e9, 32e9),  # shared, one half each
    "laptop": (0.0, 16e9),
}
Tiers = dict[str, Tier]


def evenly(units: list[Unit], count: int, chosen: Tier, other: Tier) -> Tiers:
    """``count`` units in one tier, evenly spread, the others in another; embeddings that are looked up last."""
    order = sorted(units, key=lambda unit: unit.multiplied == 0)
    total = len(order)
    return {
        unit.name: chosen if (i + 1) * count // total > i * count // total else other
        for i, unit in enumerate(order)
    }


def fits(decider: Decider, tiers: Tiers, budget: Budget) -> bool:
    """Whether every unit can be where it is, and all within the budget."""
    exists = all(tiers[unit.name] in decider.tiers[i] for i, unit in enumerate(decider.units))
    if not exists:
        return False
    host, device = decider.nbytes(tiers, budget)
    enough = budget.host is None or host <= budget.host
    return enough and (budget.device is None or device <= budget.device)


def smallest_in_memory(decider: Decider, unit: Unit, tiers: list[Tier]) -> Tier:
    """The tier of least memory in which a unit rests where the model runs."""
    in_memory = [tier for tier in tiers if tier.place in ("device", "memory")]
    return min(in_memory, key=lambda tier: sum(decider.predictor.memory(unit, tier)))


def first_fit(decider: Decider, budget: Budget, chosen: Tier, other: Tier) -> Tiers | None:
    """As few units in one tier as let all fit; embeddings and heads rest where the model runs."""
    for count in range(len(decider.units) + 1):
        tiers = evenly(decider.units, count, chosen, other)
        for unit, known in zip(decider.units, decider.tiers, strict=True):
            if tiers[unit.name] not in known:
                tiers[unit.name] = smallest_in_memory(decider, unit, known)
        if fits(decider, tiers, budget):
            return tiers
    return None


def one_tier(decider: Decider, budget: Budget) -> Iterator[Tiers]:
    """Every tier for all; embeddings that are only looked up where the model runs."""
    names = dict.fromkeys(tier for tiers in decider.tiers for tier in tiers)
    for name in names:
        tiers = {
            unit.name: name if name in known else smallest_in_memory(decider, unit, known)
            for unit, known in zip(decider.units, decider.tiers, strict=True)
        }
        if fits(decider, tiers, budget):
            yield tiers


def baselines(decider: Decider, bare: Decider, plain: Decider, budget: Budget) -> dict[str, float]:
    """Seconds of a pass under each rule; infinity where it does not fit.

    Args:
        decider: of the model.
        bare: of the model without codec packed.
        plain: of the model whose file holds plain INT8.
        budget: of memory.
    """

    def placed() -> float:
        try:
            return bare.mean_s(bare.within(budget))
        except BudgetError:
            return float("inf")

    def seconds(of: Decider, tiers: Tiers | None) -> float:
        return float("inf") if tiers is None else of.mean_s(tiers)

    on_device = decider.on_device
    plain_tier = Tier.parse("device/raw") if on_device else Tier.parse("memory/raw")
    coded = (
        (Tier.parse("device/zstd"), Tier.parse("host/zstd"))
        if on_device
        else (Tier.parse("memory/zstd"),)
    )
    uniform = [seconds(decider, first_fit(decider, budget, tier, plain_tier)) for tier in coded]
    int8 = (
        (Tier.parse("host/raw"), Tier.parse("device/raw"))
        if on_device
        else (Tier.parse("disk/raw"), Tier.parse("memory/raw"))
    )
    return {
        "uniform": min(uniform),
        "one tier": min(
            (decider.mean_s(t) for t in one_tier(decider, budget)), default=float("inf")
        ),
        "no packed": placed(),
        "INT8": seconds(plain, first_fit(plain, budget, *int8)),
    }


def row(shape: str, machine_name: str, tokens: int) -> dict[str, Any]:
    """One model on one machine."""
    machine = presets()[machine_name]
    units, others = units_of(shape)
    device, host = (FOR_WEIGHTS * size for size in MEMORY[machine_name])
    int8 = others + sum(unit.weights for unit in units)
    holds = device if machine.device is not None else host
    if int8 <= holds:
        holds = int8 / 2
    if machine.device is not None:
        budget = Budget(int(host), int(holds), others, SLOTS_NBYTES)
    else:
        budget = Budget(int(holds), None, others, SLOTS_NBYTES)
    predictor = Predictor(machine, slots_nbytes=SLOTS_NBYTES)
    decider = Decider(predictor, units, {tokens: 1.0}, others)
    raw = [replace(unit, nbytes=dict(unit.nbytes), file_codec="raw") for unit in units]
    plain = Decider(predictor, raw, {tokens: 1.0}, others)
    two = [replace(u, nbytes={c: n for c, n in u.nbytes.items() if c != "packed"}) for u in units]
    bare = Decider(predictor, two, {tokens: 1.0}, others)
    found: dict[str, Any] = {
        "model": shape,
        "machine": machine_name,
        "tokens": tokens,
        "kind": PROJECTED,
        "memory_share": holds / int8,
    }
    try:
        tiers = decider.within(budget)
    except BudgetError as error:
        return {**found, "error": str(error)}
    best = decider.mean_s(tiers)
    gains = {name: s / best for name, s in baselines(decider, bare, plain, budget).items()}
    # Plain INT8 on a disk is another file, which the plan does not have: there it may lose.
    same = gains if machine.device is not None else {**gains, "INT8": 1.0}
    slower = {name: gain for name, gain in same.items() if gain < 1 - TOLERANCE}
    if slower:
        raise AssertionError(f"{shape}, {machine_name}, {tokens}: faster than the plan: {slower}")
    unbounded = decider.mean_s(decider.int8())
    return {
        **found,
        "seconds": best,
        "over_unbounded_int8": best / unbounded,
        "tiers": dict(Counter(map(str, tiers.values()))),
        "gain_over": {name: None if gain == float("inf") else gain for name, gain in gains.items()},
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A line for each."""
    table = Table(
        caption="gain: time under the rule over time of the plan; - where the rule does not fit. Slowdown: time of the plan "
        "over that of plain INT8 if memory had no end"
    )
    for heading in ("model", "machine"):
        table.add_column(heading)
    for heading in (
        "tokens",
        "of INT8",
        "ms",
        "slowdown",
        "uniform",
        "one tier",
        "no packed",
        "INT8",
        "tiers",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = ["does not fit", *[""] * 6]
        if "error" not in row:
            gains = ["-" if g is None else f"{g:.2f}" for g in row["gain_over"].values()]
            tiers = ", ".join(f"{count} {tier}" for tier, count in row["tiers"].items())
            figures = [
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['over_unbounded_int8']:.2f}",
                *gains,
                tiers,
            ]
        share = f"{row['memory_share']:.0%}"
        table.add_row(row["model"], row["machine"], str(row["tokens"]), share, *figures)
    console.print(table)


def summary(rows: list[dict[str, Any]], console: Console) -> None:
    """Geometric means over the models."""
    table = Table(title="gain over each rule, geometric mean of the models that fit under it")
    rules = ("uniform", "one tier", "no packed", "INT8")
    for heading in ("machine", "tokens", *rules):
        table.add_column(heading, justify="left" if heading == "machine" else "right")
    for machine in MEMORY:
        for tokens in LENGTHS:
            mine = [r for r in rows if r["machine"] == machine and r["tokens"] == tokens]
            gains = [[r["gain_over"][rule] for r in mine if "gain_over" in r] for rule in rules]
            known = [[gain for gain in each if gain is not None] for each in gains]
            means = [f"{geometric_mean(each):.2f}" if each else "-" for each in known]
            table.add_row(machine, str(tokens), *means)
    console.print(table)


def main() -> None:
    """Computes what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/placement.json")
    parser.add_argument("--smoke", action="store_true", help="the smallest model alone")
    options = parser.parse_args()
    shapes = list(SHAPES)[:1] if options.smoke else list(SHAPES)
    cases = [(s, m, t) for s in shapes for m in MEMORY for t in LENGTHS]
    console = Console(stderr=True)
    rows = [row(*case) for case in track(cases, "planning", console=console, transient=True)]
    line = hardware_line("dcext", "bench/placement.py")
    report = {"kind": PROJECTED, "hardware": line, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 180)
    show(rows, console)
    summary(rows, console)
    console.print(f"computed on {line}", highlight=False)


if __name__ == "__main__":
    main()
