"""What a plan is in numbers: times of its layers as they are taken, and plans over the budget."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from dcext.offloading.apply import apply
from dcext.offloading.weights import weights_of
from dcext.policy.decide import BudgetError
from dcext.policy.plan import CurvePoint, Plan
from dcext.profiling.observe import Forward, LayerClock, Progress, pass_seconds
from dcext.profiling.study import Study

WATCHED = 3  # passes of each length
SHARES = [0.3 + 0.07 * i for i in range(11)]  # of plain INT8's memory


@torch.inference_mode()
def measured(model: nn.Module, plan: Plan, forward: Forward) -> Plan:
    """Moves the layers where a plan wants them and times passes of its mix, and the layers in them.

    Args:
        model: which keeps these tiers.
        plan: for this machine.
        forward: runs a pass of so many tokens.

    Returns:
        The plan with what was measured. A layer on the disk takes what it waits for, too.
    """
    apply(model, plan)
    clock = LayerClock(weights_of(model))
    layers: dict[str, dict[int, float]] = defaultdict(dict)
    passes = []
    for each in plan.passes:
        passes.append(replace(each, measured_s=pass_seconds(forward, each.tokens)))
        taken: dict[str, list[float]] = defaultdict(list)
        for _ in range(WATCHED):
            with clock.running() as seconds:
                forward(each.tokens)
            for name, value in seconds.items():
                taken[name].append(value)
        for name, values in taken.items():
            layers[name][each.tokens] = statistics.median(values)
    return replace(
        plan,
        passes=passes,
        layers=[replace(layer, measured_s=layers.get(layer.name, {})) for layer in plan.layers],
    )


def curve(
    study: Study,
    mix: Mapping[int, float],
    *,
    model: nn.Module | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """Plans over the budget, up to the memory of plain INT8; none where a budget is too small for any.

    Args:
        study: of the model.
        mix: passes by tokens.
        model: to measure each plan on, whose layers are moved; None for predictions only.
        forward: runs a pass, with ``model``.
        progress: called with what is done and its share of the whole.
    """
    report = progress or (lambda what, share: None)
    int8 = sum(unit.nbytes["raw"] for unit in study.units)
    points = []
    for share in SHARES:
        report(f"{share:.0%} of INT8's memory", 1 / len(SHARES))
        budget = study.others + int(share * int8)
        on_device = study.machine.device is not None
        try:
            plan = (
                study.plan(device_memory=budget, mix=mix)
                if on_device
                else study.plan(host_memory=budget, mix=mix)
            )
        except BudgetError:
            continue
        nbytes = plan.device_nbytes if on_device else plan.host_nbytes
        taken = None
        if model is not None and forward is not None:
            apply(model, plan)
            with torch.inference_mode():
                by_tokens = {tokens: pass_seconds(forward, tokens) for tokens in mix}
            taken = sum(mix[n] * s for n, s in by_tokens.items()) / sum(mix.values())
        points.append(CurvePoint(nbytes, plan.seconds, taken))
    return points
