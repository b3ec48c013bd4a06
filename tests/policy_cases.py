"""Machines, drawn units and plans that tests of the policy share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dcext.offloading.state import LEAST_SLOTS_NBYTES
from dcext.offloading.weights import weights_of
from dcext.policy.decide import Budget, Decider
from dcext.policy.machine import PROJECTED, Machine, Processor
from dcext.policy.plan import Plan
from dcext.policy.predict import Observed, Predictor, Unit
from dcext.policy.tier import Tier
from dcext.profiling.observe import describe
from dcext.profiling.study import Study

CPU = Machine(
    name="a CPU",
    kind=PROJECTED,
    host={2: Processor(30.0, 0.7, {"zstd": 5.0, "packed": 80.0})},
    disk_gbps=2.0,
    verify_gbps=30.0,
)
GPU = Machine(
    name="a GPU",
    kind=PROJECTED,
    host={8: Processor(60.0, 3.0, {"zstd": 20.0})},
    disk_gbps=3.0,
    verify_gbps=100.0,
    device=Processor(900.0, 250.0, {"zstd": 300.0}, scratch=("zstd",)),
    link_gbps=25.0,
)

# Everything is streamed: room for what is not compressed, and the least to read into.
LEAST = LEAST_SLOTS_NBYTES + 200_000


def drawn_units(draw: np.random.Generator, count: int) -> list[Unit]:
    """Layers of a few sizes, and perhaps an embedding."""
    units = []
    for i in range(count):
        rows, cols = (int(n) for n in draw.choice([256, 1024, 4096, 20000], 2))
        weights = rows * cols
        looked_up = int(i == 0 and draw.random() < 0.3)
        units.append(
            Unit(
                name=f"layer {i}",
                shape=(rows, cols),
                multiplied=1 - looked_up if draw.random() < 0.5 else 1,
                looked_up=looked_up,
                nbytes={
                    "raw": weights + 64,
                    "packed": int(weights * draw.uniform(0.5, 0.8)),
                    "zstd": int(weights * draw.uniform(0.4, 0.6)),
                },
                index_nbytes={"packed": weights >> 6, "zstd": weights >> 8},
                block=None if looked_up or draw.random() < 0.1 else f"block {i % 2}",
                file_codec="zstd",
                panels=max(1, weights >> 17),
            )
        )
    return units


def study_of(model: nn.Module, machine: Machine) -> Study:
    return Study(describe(model, weights_of(model)), machine, Observed(), 0)


def logits(model: nn.Module, count: int = 5) -> torch.Tensor:
    with torch.inference_mode():
        return model((torch.arange(count) * 97 % 4096)[None]).logits


def every_tier(model: nn.Module) -> dict[str, Tier]:
    """All tiers that there are, in turns."""
    weights = weights_of(model)
    tiers = [
        Tier.parse("memory/raw"),
        Tier.parse("memory/packed"),
        Tier.parse("memory/zstd"),
        Tier("disk", weights[0].file_codec),
    ]
    return {weight.name: tiers[i % len(tiers)] for i, weight in enumerate(weights)}


def plan_with(model: nn.Module, tiers: dict[str, Tier]) -> Plan:
    decider = Decider(Predictor(CPU), describe(model, weights_of(model)), {1: 1.0}, 0)
    return decider.plan(tiers, Budget(None, None, slots=16 << 20), "a test")
