"""Are plans for a GPU as fast as predicted, and faster than chance?

    python bench/gpu/policy.py [--output FILE.json] [--seconds S] [--smoke]

A Llama of drawn weights in less and less device memory, each time placed as the policy plans for this machine (``tune``,
``dcext.apply``); what is not a layer is taken from one pass of plain INT8. One forward pass of 1 and of 512 tokens, predicted
and as a user waits for it. In the middle of the budgets also placements drawn at random that fit in the same memory. All
rows must predict equal tokens.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, Report, Settings, numbers_table, start, was_measured
from passes import begin, disagreements, ids_of, one_pass, save
from rich.table import Table

import dcext
from dcext.offloading.state import other_nbytes
from dcext.offloading.weights import weights_of
from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.predict import Observed
from dcext.policy.presets import preset
from dcext.policy.tier import Tier
from dcext.profiling.measure import tune
from dcext.profiling.observe import describe
from dcext.profiling.study import Study

LENGTHS = (1, 512)
SHARES = (1.2, 0.8, 0.6, 0.45, 0.35)  # of plain INT8's memory
SMOKE_SHARES = (3.0,)  # slots are most of so small a model
DRAWN = 5
REPEATS = 7
INT8 = "all as INT8"
Tiers = dict[str, Tier]


@dataclass
class Bench:
    """A model that moves from placement to placement."""

    report: Report
    settings: Settings
    model: Any
    study: Study

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of passes."""
        return (1,) if self.settings.smoke else LENGTHS

    def decider(self, tokens: int) -> Decider:
        """Of plans for passes of so many tokens."""
        return Decider(self.study.predictor(), self.study.units, {tokens: 1.0}, self.study.others)

    def time(self, name: str, tokens: int, tiers: Tiers, budget: Budget) -> None:
        """Moves the model and adds what is predicted and what it takes."""
        plan = self.decider(tokens).plan(tiers, budget, name)

        def taken() -> dict[str, Any]:
            placed = dcext.apply(self.model, plan, device=DEVICE)
            vocabulary = self.model.config.vocab_size
            repeats = 1 if self.settings.smoke else REPEATS
            measured = one_pass(self.model, ids_of(tokens, vocabulary), repeats)
            (planned,) = plan.passes
            return {
                **measured,
                "predicted_ms": 1e3 * planned.seconds,
                "binds": planned.binds,
                "planned_device_nbytes": plan.device_nbytes,
                "device_nbytes": placed.device_nbytes,
            }

        self.report.attempt(name, str(tokens), taken)

    def observe_others(self) -> None:
        """What of a pass of plain INT8 is not in its layers."""
        others: dict[int, float] = {}
        for tokens in self.lengths:
            tiers = self.decider(tokens).int8()
            self.time(INT8, tokens, tiers, Budget(None, None, self.study.others))
            found = self.report.rows.rows[INT8][str(tokens)]
            if was_measured(found):
                others[tokens] = max(found["median_ms"] - found["predicted_ms"], 1e-3) / 1e3
        self.study = replace(self.study, observed=Observed(other_s=others))


def drawn_tiers(decider: Decider, budget: Budget, seed: int) -> Tiers | None:
    """Tiers at random, of which as many as it takes are drawn again until they fit; None if they never do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    tiers = {u.name: t[draw(len(t))] for u, t in zip(decider.units, decider.tiers, strict=True)}
    for _ in range(100 * len(decider.units)):
        _, device = decider.nbytes(tiers, budget)
        if budget.device is None or device <= budget.device:
            return tiers
        i = draw(len(decider.units))
        name, known = decider.units[i].name, decider.tiers[i]
        other = {**tiers, name: known[draw(len(known))]}
        if decider.nbytes(other, budget)[1] <= device:
            tiers = other
    return None


def measure(bench: Bench) -> None:
    """All rows."""
    study = bench.study
    int8 = study.others + sum(unit.weights for unit in study.units)
    bench.report.figures.update(int8_nbytes=int8, machine=study.machine.to_dict())
    bench.observe_others()
    shares = SMOKE_SHARES if bench.settings.smoke else SHARES
    for share in shares:
        budget = Budget(None, int(share * int8), study.others, 16 << 20)
        for tokens in bench.lengths:
            decider = bench.decider(tokens)
            try:
                tiers = decider.within(budget)
            except BudgetError as error:
                bench.report.add(f"{share:.0%} of INT8", not_planned=str(error))
                continue
            bench.time(f"{share:.0%} of INT8", tokens, tiers, budget)
            if share != shares[len(shares) // 2]:
                continue
            for seed in range(1 if bench.settings.smoke else DRAWN):
                drawn = drawn_tiers(decider, budget, seed)
                if drawn is not None:
                    bench.time(f"{share:.0%}, drawn {seed}", tokens, drawn, budget)


def table(report: Report, lengths: tuple[int, ...]) -> Table:
    """One line for each placement."""
    headings = ["device memory", "planned, GB", "there, GB"]
    for tokens in lengths:
        headings += [f"{tokens}: ms", "predicted", "binds"]
    shown = numbers_table("plans", headings)
    for row in report.rows.rows.values():
        found = [row.get(str(tokens)) for tokens in lengths]
        known = [value for value in found if was_measured(value)]
        sizes = [
            f"{known[0][key] / 1e9:.2f}" if known else "-"
            for key in ("planned_device_nbytes", "device_nbytes")
        ]
        cells = []
        for value in found:
            if was_measured(value):
                times = (value["median_ms"], value["predicted_ms"])
                cells += [*(f"{ms:.2f}" for ms in times), value["binds"]]
            else:
                cells += ["-", "-", "-"]
        shown.add_row(row["name"], *sizes, *cells)
    return shown


@torch.inference_mode()
def run(settings: Settings) -> None:
    """Measures and prints."""
    report, shape = begin(settings)
    machine = preset("pcie4") if settings.smoke else tune(device=DEVICE)
    with tempfile.TemporaryDirectory(prefix="dcext-policy-") as folder:
        model = dcext.from_pretrained(save("zstd", shape, Path(folder)))
        units = describe(model, weights_of(model))
        study = Study(units, machine, Observed(), other_nbytes(model))
        bench = Bench(report, settings, model, study)
        measure(bench)
    report.failed += disagreements(report)
    remarks = ["a pass has no cache of past tokens", "what is not a layer: from the first row"]
    report.finish([table(report, bench.lengths)], remarks)


if __name__ == "__main__":
    run(start(__doc__, "policy"))
