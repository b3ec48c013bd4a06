"""A real model whose layers are moved from tier to tier, and timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from watch import Watch

import dcext
from dcext.codecs import codec_names
from dcext.offloading.apply import move_weights
from dcext.offloading.state import LEAST_SLOTS_NBYTES, slots_for
from dcext.offloading.weights import weights_of
from dcext.policy.plan import Plan
from dcext.policy.predict import Prediction, Unit
from dcext.policy.tier import Tier
from dcext.policy.timeline import SLOTS_NBYTES
from dcext.profiling.observe import forward_of
from dcext.profiling.study import Study, study

Tiers = Mapping[str, str]
# Of a visit, by their tokens.
PASSES = {1: 12, 16: 6, 512: 2}


@dataclass(frozen=True)
class Visit:
    """Seconds of passes of one length, and the share of the CPUs that others took meanwhile."""

    seconds: list[float]
    others: float

    @property
    def median_s(self) -> float:
        """Of the passes."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Placement:
    """Where every layer is, and memory to read into."""

    tiers: Tiers
    slots_nbytes: int = SLOTS_NBYTES


class Rig:
    """A model with all its payloads in every codec at hand, so that moving layers takes no time.

    Attributes:
        model: the model.
        study: what the policy knows of it.
    """

    def __init__(
        self, folder: Path, lengths: Sequence[int], progress: Callable[[str, float], None]
    ) -> None:
        """Args: lengths: tokens of passes that the policy takes the times of."""
        self.model = dcext.from_pretrained(folder)
        self.weights = weights_of(self.model)
        self.study: Study = study(self.model, tuple(lengths), progress=progress)
        self.forward = forward_of(self.model)
        self._payloads: dict[tuple[str, str], Tensor] = {
            (weight.name, codec): weight.payload(codec)
            for weight in self.weights
            for codec in codec_names()
        }

    @property
    def units(self) -> list[Unit]:
        """Of the model."""
        return self.study.units

    def place(self, placement: Placement) -> None:
        """Moves every layer to its tier."""
        for weight in self.weights:
            tier = placement.tiers[weight.name]
            if tier.place == "memory" and weight.tier != tier:
                weight.set_payload(self._payloads[weight.name, tier.codec])
        move_weights(self.model, self.weights, placement.tiers, placement.slots_nbytes)

    def predict(self, placement: Placement, tokens: int) -> Prediction:
        """Of a pass."""
        predictor = self.study.predictor(placement.slots_nbytes)
        return predictor.predict(self.units, placement.tiers, tokens)

    def planned(self, budget: int, mix: Mapping[int, float]) -> tuple[Placement, Plan]:
        """The plan for a budget of host memory."""
        plan = self.study.plan(host_memory=budget, mix=mix)
        return Placement(plan.tiers, plan.slots_nbytes), plan

    @torch.inference_mode()
    def visit(self, tokens: int, passes: int | None = None) -> Visit:
        """Times passes, after one of a single token that is not counted."""
        passes = passes or PASSES.get(tokens, 3)
        self.forward(1)
        watch, taken = Watch(), []
        for _ in range(passes):
            begin = time.perf_counter()
            self.forward(tokens)
            taken.append(time.perf_counter() - begin)
        return Visit(taken, watch.others())

    def uniform(self, codec: str) -> Placement:
        """All in memory, in one codec."""
        return Placement({unit.name: Tier("memory", codec) for unit in self.units})

    def random_placement(self, draw: random.Random, budget: int, tolerance: float) -> Placement:
        """Random tiers that fit in a budget of host memory and leave little of it.

        Starts anywhere and moves random layers, never further from the budget, until at most ``tolerance`` of it is left.
        """
        slots = draw.choice([slots_for(budget), LEAST_SLOTS_NBYTES])
        predictor = self.study.predictor(slots)
        options = {unit.name: predictor.tiers(unit) for unit in self.units}
        units = {unit.name: unit for unit in self.units}
        base = self.study.others

        def room(tiers: Tiers) -> int:
            taken = sum(predictor.memory(units[n], tier)[0] for n, tier in tiers.items())
            reads = any(tier.place == "disk" for tier in tiers.values())
            return budget - base - taken - (slots if reads else 0)

        # How often each place is drawn differs from plan to plan, so that plans differ as wholes.
        weight = {
            tier: draw.random() ** 2 for tier in sorted({t for o in options.values() for t in o})
        }
        tiers = {n: draw.choices(o, [weight[t] for t in o])[0] for n, o in options.items()}
        left = room(tiers)
        while not 0 <= left <= tolerance * budget:
            name = draw.choice(list(options))
            moved = tiers | {name: draw.choice(options[name])}
            new = room(moved)
            if (left < 0 and new > left) or (left > 0 and 0 <= new < left):
                tiers, left = moved, new
        return Placement(tiers, slots)

    def uniform_share(self, budget: int) -> Placement | None:
        """The paper's: so many layers, evenly spread, entropy-coded that the others fit as plain INT8; None if they never do."""
        for count in range(len(self.units) + 1):
            tiers = {
                unit.name: Tier.parse("memory/zstd")
                if (i + 1) * count // len(self.units) > i * count // len(self.units)
                else Tier.parse("memory/raw")
                for i, unit in enumerate(self.units)
            }
            taken = sum(u.nbytes[tiers[u.name].codec] for u in self.units)
            if taken + self.study.others <= budget:
                return Placement(tiers)
        return None
