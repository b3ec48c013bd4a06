"""Does the policy predict, and choose, well? On a real model, against the clock.

    python bench/policy.py [--questions accuracy,choice,..] [--models zstd,packed] [--output FILE.json] [--smoke]

SmolLM2-135M-Instruct as `dcext compress` makes it for each codec, made once in build/policy. Layers are moved from tier to
tier within one process, in random order and several rounds, since the speed of shared machines drifts by a third within
minutes. Four questions:

- accuracy: predicted against measured time of passes, for placements of all kinds, and the same over the time of plain
  INT8 just before and after. Predictions are made before the clock runs, as they follow from `dcext plan`.
- choice: the plan for a budget against 30 random ones that take the same memory.
- pareto: plans over the budget, against the uniform share of the paper and all-or-nothing.
- adaptation: a model that runs under `dcext.adapt` while threads go, or a control group holds the disk back.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "third_party"))

import torch
from hardware import ROOT, hardware_line
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rowfile import Row, RowFile
from whole.limits import slower_disk
from whole.placing import Placement, Rig
from whole.policy_models import policy_model

from dcext.planning.adapt import Adapter
from dcext.policy.tier import Tier
from dcext.profiling.study import study

QUESTIONS = ("accuracy", "choice", "pareto", "adaptation")
TOLERANCE = 0.01  # of the memory, that random placements may leave
SLOW_DISK = 0.3e9  # bytes/s
# Of a visit to a model that adapted, and of those the first, not counted: the kernel lets a group that has read nothing for a
# while read faster at first, and then holds every second or third pass back, so that medians would mean nothing.
STEADY_PASSES, UNSTEADY_PASSES = 40, 10


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: tokens of passes, for accuracy.
        mix: passes by tokens, for the others.
        shares: of plain INT8's memory, for pareto.
        choice_shares: likewise, for choice.
        random_placements: for each of those.
        adapt_shares: likewise, for adaptation.
        passes: that run before and after the change.
        rounds: in which each placement is visited; half of them for choice.
    """

    lengths: tuple[int, ...] = (1, 16, 512)
    mix: Mapping[int, float] = field(default_factory=lambda: {1: 128.0, 512: 1.0})
    shares: tuple[float, ...] = (0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)
    choice_shares: tuple[float, ...] = (0.6,)
    random_placements: int = 30
    adapt_shares: tuple[float, ...] = (0.35, 0.5)
    passes: tuple[int, int] = (60, 20)
    rounds: int = 4


SMOKE = Sizes((1, 4), {1: 8.0, 4: 1.0}, (0.6,), (0.6,), 2, (0.5,), (12, 12), 1)


def placements(rig: Rig, mix: Mapping[int, float]) -> dict[str, Placement]:
    """By name: uniform ones, mixtures, plans, random ones."""
    units = rig.units
    on_disk = {unit.name: Tier("disk", unit.file_codec) for unit in units}
    codecs = ("raw", "packed", "zstd")
    found = {f"all {codec}": rig.uniform(codec) for codec in codecs}
    thirds = {unit.name: Tier("memory", codecs[i % 3]) for i, unit in enumerate(units)}
    found["a third of each"] = Placement(thirds)
    found["all on disk"] = Placement(on_disk)
    for codec in ("raw", "packed"):
        half = {unit.name: on_disk[unit.name] for unit in units[1::2]}
        found[f"half {codec}, half on disk"] = Placement({**rig.uniform(codec).tiers, **half})
    for share in (0.35, 0.5, 0.7):
        found[f"plan for {share:.0%} of INT8"], _ = rig.planned(int(share * int8_nbytes(rig)), mix)
    draw = random.Random(0)
    predictor = rig.study.predictor()
    for number in range(3):
        tiers = {u.name: draw.choice(predictor.tiers(u)) for u in units}
        found[f"random {number + 1}"] = Placement(tiers)
    return found


def int8_nbytes(rig: Rig) -> int:
    """Bytes of the model as plain INT8."""
    return rig.study.others + sum(unit.nbytes["raw"] for unit in rig.units)


Key = tuple[str, int]  # name of a placement, tokens of a pass


def beside_plain(
    rig: Rig,
    cases: Mapping[str, Placement],
    lengths: Iterable[int],
    rounds: int,
    progress: Any,
    label: str,
) -> tuple[dict[Key, list[float]], dict[Key, list[float]]]:
    """Seconds of passes, and those over the time of plain INT8, a value for each round.

    Each placement is measured between two visits of plain INT8, so that the machine's drift is in both; rounds are in random
    order.
    """
    taken: dict[Key, list[float]] = defaultdict(list)
    over: dict[Key, list[float]] = defaultdict(list)
    plain = rig.uniform("raw")
    task = progress.add_task(label, total=rounds * len(cases))
    draw = random.Random(2)

    def visit(placement: Placement) -> dict[int, float]:
        rig.place(placement)
        return {tokens: rig.visit(tokens).median_s for tokens in lengths}

    for _ in range(rounds):
        before = visit(plain)
        for name in draw.sample(list(cases), len(cases)):
            found = visit(cases[name])
            after = visit(plain)
            for tokens, seconds in found.items():
                taken[name, tokens].append(seconds)
                over[name, tokens].append(2 * seconds / (before[tokens] + after[tokens]))
            before = after
            progress.advance(task)
    return taken, over


def accuracy(rig: Rig, sizes: Sizes, progress: Any) -> list[Row]:
    """A row for every placement and length.

    What is predicted of the time over that of plain INT8 holds whatever speed the machine has meanwhile.
    """
    cases = placements(rig, sizes.mix)
    predicted = {
        (name, n): rig.predict(case, n) for name, case in cases.items() for n in sizes.lengths
    }
    plain = {n: rig.predict(rig.uniform("raw"), n).pipelined_s for n in sizes.lengths}
    taken, over = beside_plain(rig, cases, sizes.lengths, sizes.rounds, progress, "accuracy")
    rows = []
    for (name, tokens), found in predicted.items():
        measured_s = statistics.median(taken[name, tokens])
        over_int8 = statistics.median(over[name, tokens])
        rows.append(
            {
                "question": "accuracy",
                "placement": name,
                "tokens": tokens,
                "predicted_s": found.pipelined_s,
                "binds": found.binds,
                "measured_s": measured_s,
                "rounds_s": taken[name, tokens],
                "error": found.pipelined_s / measured_s - 1,
                "over_int8": over_int8,
                "error_over_int8": found.pipelined_s / plain[tokens] / over_int8 - 1,
            }
        )
    return rows


def timed(
    rig: Rig, cases: dict[str, Placement], sizes: Sizes, progress: Any, label: str
) -> dict[str, dict[int, float]]:
    """Seconds of passes of each length of the mix over those of plain INT8, medians of rounds, by name of the case."""
    _, over = beside_plain(rig, cases, sizes.mix, sizes.rounds, progress, label)
    return {
        name: {tokens: statistics.median(over[name, tokens]) for tokens in sizes.mix}
        for name in cases
    }


def plain_s(rig: Rig, mix: Mapping[int, float]) -> dict[int, float]:
    """Seconds of passes of plain INT8, now."""
    rig.place(rig.uniform("raw"))
    return {tokens: rig.visit(tokens).median_s for tokens in mix}


def row(
    question: str,
    name: str,
    ratios: dict[int, float],
    weighted: dict[int, float],
    **more: Any,
) -> Row:
    """Of a placement among others. ``weighted``: seconds of plain INT8 times passes, by tokens."""
    over = sum(weighted[n] * ratio for n, ratio in ratios.items()) / sum(weighted.values())
    by_tokens = {str(tokens): ratio for tokens, ratio in ratios.items()}
    return {
        "question": question,
        "placement": name,
        "over_int8": over,
        "by_tokens": by_tokens,
        **more,
    }


def weighted_plain(rig: Rig, mix: Mapping[int, float]) -> dict[int, float]:
    """Seconds of plain INT8 times passes, by tokens."""
    return {tokens: mix[tokens] * seconds for tokens, seconds in plain_s(rig, mix).items()}


def choice(rig: Rig, share: float, sizes: Sizes, progress: Any) -> list[Row]:
    """The plan for a budget and random ones of the same memory."""
    budget = int(share * int8_nbytes(rig))
    draw = random.Random(3)
    cases = {"plan": rig.planned(budget, sizes.mix)[0]}
    for number in range(sizes.random_placements):
        cases[f"random {number + 1}"] = rig.random_placement(draw, budget, TOLERANCE)
    few = replace(sizes, rounds=max(1, sizes.rounds // 2))
    taken = timed(rig, cases, few, progress, f"choice at {share:.0%}")
    weighted = weighted_plain(rig, sizes.mix)
    return [row("choice", name, ratios, weighted, share=share) for name, ratios in taken.items()]


def pareto(rig: Rig, sizes: Sizes, progress: Any) -> list[Row]:
    """Plans and the paper's uniform share over the budget."""
    cases: dict[str, Placement] = {}
    more: dict[str, dict[str, Any]] = {}
    others = rig.study.others
    for codec in ("raw", "packed", "zstd"):
        cases[f"all {codec}"] = rig.uniform(codec)
        more[f"all {codec}"] = {"nbytes": others + sum(u.nbytes[codec] for u in rig.units)}
    for share in sizes.shares:
        budget = int(share * int8_nbytes(rig))
        cases[f"plan {share:.0%}"], plan = rig.planned(budget, sizes.mix)
        plain = sum(each.weight * each.int8_s for each in plan.passes) / sum(sizes.mix.values())
        predicted = {"predicted": plan.seconds / plain, "share": share}
        more[f"plan {share:.0%}"] = {"nbytes": plan.host_nbytes, **predicted}
        uniform = rig.uniform_share(budget)
        if uniform is not None:
            cases[f"uniform {share:.0%}"] = uniform
            more[f"uniform {share:.0%}"] = {"nbytes": budget, "share": share}
    taken = timed(rig, cases, sizes, progress, "pareto")
    weighted = weighted_plain(rig, sizes.mix)
    return [row("pareto", name, taken[name], weighted, **more[name]) for name in cases]


def adaptation(rig: Rig, folder: Path, sizes: Sizes, progress: Any) -> list[Row]:
    """Passes of one token under an adapter; in the middle there are fewer threads, or a slower disk.

    For each change: passes until layers were moved last, and the time of a pass then over that of the plan that is made from
    scratch under the new condition, both measured in turns.
    """
    threads = torch.get_num_threads()

    @contextlib.contextmanager
    def one_thread() -> Iterator[None]:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    changes: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "one thread": one_thread,
        "disk at 0.3 GB/s": lambda: slower_disk(folder, SLOW_DISK),
    }
    rows = []
    task = progress.add_task("adaptation", total=len(changes) * len(sizes.adapt_shares))
    for share in sizes.adapt_shares:
        for name, change in changes.items():
            try:
                rows.append(adapted(rig, share, name, change, sizes))
            except OSError as error:
                print(f"{name}: not measured: {error}", file=sys.stderr)
            progress.advance(task)
    return rows


def adapted(
    rig: Rig,
    share: float,
    name: str,
    change: Callable[[], contextlib.AbstractContextManager[None]],
    sizes: Sizes,
) -> Row:
    """One change, of ``adaptation``."""
    budget = int(share * int8_nbytes(rig))
    options = {"host_memory": budget, "tokens": 1}
    rig.place(rig.uniform("raw"))
    adapter = Adapter(rig.model, rig.study, options)
    with torch.inference_mode():
        for _ in range(sizes.passes[0]):
            rig.forward(1)
        looked, passes = len(adapter.replans), adapter.passes
        before = Placement(adapter.plan.tiers, adapter.plan.slots_nbytes)
        with change():
            for _ in range(sizes.passes[1]):
                rig.forward(1)
            adapter.stop()
            looks = adapter.replans[looked:]
            after = Placement(adapter.plan.tiers, adapter.plan.slots_nbytes)
            rig.place(rig.uniform("raw"))
            fresh = study(rig.model, (1,)).plan(**options)
            best = Placement(fresh.tiers, fresh.slots_nbytes)
            cases = {"before": before, "adapted": after, "best": best}
            taken: dict[str, list[float]] = defaultdict(list)
            for _ in range(sizes.rounds):
                for case, placement in cases.items():
                    rig.place(placement)
                    seconds = rig.visit(1, STEADY_PASSES).seconds
                    taken[case].append(statistics.mean(seconds[UNSTEADY_PASSES:]))
    medians = {case: statistics.median(seconds) for case, seconds in taken.items()}
    moves = [look.passes - passes for look in looks if look.moved]
    return {
        "question": "adaptation",
        "placement": name,
        "share": share,
        "seconds": medians,
        "moved_after": moves,
        "looks": [asdict(look) for look in looks],
        "over_best": medians["adapted"] / medians["best"],
        "unadapted_over_best": medians["before"] / medians["best"],
    }


def show_adaptation(rows: list[Row], title: str, console: Console) -> None:
    """Passes until layers were moved, and what that gave."""
    table = Table(title=title, caption="ms: of a pass of one token under the new condition")
    table.add_column("change")
    for heading in ("of INT8", "moved after passes", "ms before", "adapted", "best", "over best"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = [f"{row['seconds'][case] * 1e3:.2f}" for case in ("before", "adapted", "best")]
        moved = ", ".join(str(n) for n in row["moved_after"]) or "not"
        over = f"{row['over_best']:.3f}"
        table.add_row(row["placement"], f"{row['share']:.0%}", moved, *figures, over)
    console.print(table)


def show(rows: list[Row], console: Console) -> None:
    """A table for each question, and what there is to say of it."""
    for question in QUESTIONS:
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [r for r in rows if r["question"] == question and r["model"] == model]
            if mine:
                TABLES[question](mine, f"{question}, model for {model}", console)


def show_accuracy(rows: list[Row], title: str, console: Console) -> None:
    """Predicted against measured."""
    table = Table(title=title)
    table.add_column("placement")
    for heading in ("tokens", "measured ms", "predicted ms", "error", "over INT8", "binds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["placement"],
            str(row["tokens"]),
            f"{row['measured_s'] * 1e3:.2f}",
            f"{row['predicted_s'] * 1e3:.2f}",
            f"{row['error']:+.1%}",
            f"{row['error_over_int8']:+.1%}",
            row["binds"],
        )
    console.print(table)
    for name, key in (
        ("as planned", "error"),
        ("of the time over plain INT8 beside it", "error_over_int8"),
    ):
        sizes = sorted(abs(row[key]) for row in rows)
        console.print(
            f"error {name}: median {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}",
            highlight=False,
        )


def show_choice(rows: list[Row], title: str, console: Console) -> None:
    """The plan among random ones."""
    for share in dict.fromkeys(row["share"] for row in rows):
        mine = [row for row in rows if row["share"] == share]
        plan = next(row for row in mine if row["placement"] == "plan")["over_int8"]
        others = sorted(r["over_int8"] for r in mine if r["placement"] != "plan")
        console.print(
            f"{title}, {share:.0%} of INT8's memory: time of the mix over plain INT8: plan {plan:.3f}; {len(others)} random "
            f"placements {others[0]:.3f} to {others[-1]:.3f}, median {statistics.median(others):.3f}; plan over the best of "
            f"them {plan / others[0]:.3f}",
            highlight=False,
        )


def show_pareto(rows: list[Row], title: str, console: Console) -> None:
    """Time over memory."""
    whole = next(row["nbytes"] for row in rows if row["placement"] == "all raw")
    table = Table(title=title, caption="time over that of plain INT8, measured beside it")
    table.add_column("placement")
    for heading in (
        "MB",
        "of INT8",
        "mix",
        "predicted",
        *(f"{n} tokens" for n in rows[0]["by_tokens"]),
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        predicted = row.get("predicted")
        table.add_row(
            row["placement"],
            f"{row['nbytes'] / 1e6:.1f}",
            f"{row['nbytes'] / whole:.1%}",
            f"{row['over_int8']:.3f}",
            "" if predicted is None else f"{predicted:.3f}",
            *(f"{ratio:.3f}" for ratio in row["by_tokens"].values()),
        )
    console.print(table)


TABLES = {
    "accuracy": show_accuracy,
    "choice": show_choice,
    "pareto": show_pareto,
    "adaptation": show_adaptation,
}


def answers(rig: Rig, folder: Path, asked: list[str], sizes: Sizes, progress: Any) -> Iterator[Row]:
    """Rows of all questions."""
    if "accuracy" in asked:
        yield from accuracy(rig, sizes, progress)
    if "choice" in asked:
        for share in sizes.choice_shares:
            yield from choice(rig, share, sizes, progress)
    if "pareto" in asked:
        yield from pareto(rig, sizes, progress)
    if "adaptation" in asked:
        yield from adaptation(rig, folder, sizes, progress)


def key_of(row: Row) -> Any:
    """What makes two rows the same measurement."""
    return row["model"], row["question"], row.get("share"), row["placement"], row.get("tokens")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", default=",".join(QUESTIONS), help="some of %(default)s")
    parser.add_argument("--models", default="zstd,packed", help="the codecs they are made for")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/policy.json")
    parser.add_argument("--smoke", action="store_true", help="a small model, little of everything")
    options = parser.parse_args()
    asked = options.questions.split(",")
    if not set(asked) <= set(QUESTIONS):
        parser.error(f"--questions: expected some of {QUESTIONS}, got {options.questions}")
    line = hardware_line("csrc", "dcext", "bench/policy.py", "bench/whole")
    results: RowFile[Any] = RowFile(options.output, key_of)
    sizes = SMOKE if options.smoke else Sizes()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    for codec in options.models.split(","):
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("studying", total=1.0)
            folder = policy_model(codec, options.smoke)
            rig = Rig(folder, sizes.lengths, lambda what, share, t=task: progress.advance(t, share))
            for row in answers(rig, folder, asked, sizes, progress):
                whole = {"model": codec, "hardware": line, **row}
                results.add(key_of(whole), whole)
    console = Console(width=None if sys.stdout.isatty() else 140)
    show(list(results.rows.values()), console)
    console.print(line, highlight=False)


if __name__ == "__main__":
    main()
