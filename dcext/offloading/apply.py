"""Moves the layers of a loaded model to where a plan wants them, between its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dcext.checks import check_model, check_type
from dcext.codecs import codec_names
from dcext.nn.placement import check_device
from dcext.offloading.device import check_device_tiers, place_on_device
from dcext.offloading.passes import gate_of
from dcext.offloading.state import (
    OFFLOAD_ATTRIBUTE,
    Offload,
    offload_of,
    other_nbytes,
)
from dcext.offloading.weights import Weight, all_weights, weights_of
from dcext.policy.plan import Plan
from dcext.policy.tier import HOST_DECODE, Tier
from dcext.weights.host_stream import HostStream, StreamedWeight

PLAN_ATTRIBUTE = "dcext_plan"
BATCH_NBYTES = 64 << 20  # of payloads that are made before they are exchanged
Progress = Callable[[int], None]
Between = Callable[[], AbstractContextManager[None]]


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    device: torch.device | str = "cuda",
    progress: Progress | None = None,
) -> Offload:
    """Moves every layer to its tier: recoded, unpacked, read into memory or left on the disk. Outputs stay the same bits.

    May be called while the model runs in another thread: layers are exchanged between passes only. Knowing of passes takes
    hooks on the model: ``torch.compile`` of the whole model has graph breaks there (compile ``model.forward``, or without
    ``fullgraph``).

    On the CPU, layers that make room move first and a few at a time, so that memory never holds the model twice; what fails
    leaves a model that computes the same, some layers moved and some not. A plan for a device moves the model there, block
    by block and between two passes; what fails leaves a model that does not run until a plan is applied. Call its blocks
    then, not layers inside of them (never run on a GPU yet).

    Args:
        model: a compressed model on the CPU, any tiers; of a plan for a device, also on that device.
        plan: from ``dcext.plan`` or ``dcext.policy.plan.load_plan``. Layers that it does not name stay; a plan for a device
            names all.
        device: where the model runs, of a plan for a device.
        progress: called with the number of INT8 bytes whose layers are done since the last call.

    Returns:
        Where the weights are, as ``dcext.offload`` returns it.

    Raises:
        FormatError: a file is damaged.
        RuntimeError: there is no such device.
        ValueError: a layer or tier that the model does not have, or that cannot be where the model runs.
    """
    check_model("apply", model)
    expected = "a Plan, from dcext.plan or of a file by dcext.policy.plan.load_plan"
    check_type("apply: plan", plan, Plan, expected)
    weights = all_weights(model) if plan.on_device else weights_of(model)
    _check(plan, weights)
    report = progress or (lambda nbytes: None)

    def moved(weight: Weight) -> None:
        report(weight.module.num_weights)

    if plan.on_device:
        device = check_device("apply", "a plan for one", device)
        check_device_tiers(model, weights, plan.tiers)
        with gate_of(model).between_passes():
            result = place_on_device(
                model, plan.tiers, device, plan.slots_nbytes, read=lambda nbytes: None, moved=moved
            )
    else:
        moves = {weight.name: plan.tiers.get(weight.name, weight.tier) for weight in weights}
        between = gate_of(model).between_passes
        result = move_weights(
            model, weights, moves, plan.slots_nbytes, between=between, moved=moved
        )
    setattr(model, PLAN_ATTRIBUTE, plan)
    return result


def plan_of(model: Any) -> Plan | None:
    """The plan that was last applied to a model, or None."""
    return getattr(model, PLAN_ATTRIBUTE, None)


def _check(plan: Plan, weights: list[Weight]) -> None:
    by_name = {weight.name: weight for weight in weights}
    places = ("device", "host", "disk") if plan.on_device else ("memory", "disk")
    for name, tier in plan.tiers.items():
        if name not in by_name:
            raise ValueError(f"plan: {name}: expected a compressed layer of the model, found none")
        place, codec = tier.place, tier.codec
        is_known = not tier.decoded_by_host or (tier == HOST_DECODE and plan.on_device)
        if place not in places or codec not in codec_names() or not is_known:
            known = " or ".join(f"{place}/CODEC" for place in places)
            where = "a device" if plan.on_device else "the CPU"
            raise ValueError(
                f"plan: {name}: expected {known} with a codec of {codec_names()}, as the model runs on {where}, found {str(tier)!r}"
            )
        found = by_name[name].file_codec
        if place == "disk" and codec != found:
            raise ValueError(
                f"plan: {name}: {str(tier)!r}: expected codec {codec!r} in the model's file, found "
                f"{'no file' if found is None else repr(found)}"
            )


def move_weights(
    model: nn.Module,
    weights: list[Weight],
    tiers: Mapping[str, Tier],
    slots_nbytes: int,
    *,
    page_cache: bool | None = None,
    between: Between = nullcontext,
    progress: Progress | None = None,
    moved: Callable[[Weight], None] | None = None,
) -> Offload:
    """Moves layers to tiers that are known to exist; see ``apply``.

    Args:
        model: whose attribute says where they are.
        weights: all of the model.
        tiers: of each weight, by name.
        slots_nbytes: to read into, where some are on disk and a stream must be made.
        page_cache: as for ``dcext.offload``; None for as it is now.
        between: a context in which layers may be exchanged.
        progress: called with the number of bytes read from files since the last call.
        moved: called with each weight that is where it shall be.
    """
    done = moved or (lambda weight: None)
    streamed = [weight for weight in weights if tiers[weight.name].place == "disk"]
    stream = _stream_for(offload_of(model), streamed, slots_nbytes, page_cache)
    try:
        if stream is not None:
            with between():
                for unit, weight in enumerate(streamed):
                    _stream(weight, StreamedWeight(stream, unit))
            for weight in streamed:
                done(weight)
        resident = [weight for weight in weights if weight not in streamed]
        _to_memory(between, resident, tiers, progress, done)
    finally:
        result = _offload(model, weights, stream)
        setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


def _stream_for(
    before: Offload | None, streamed: list[Weight], slots_nbytes: int, page_cache: bool | None
) -> HostStream | None:
    """The stream that there is, where it reads the same, else a new one."""
    if not streamed:
        return None
    stream = None if before is None else before.stream
    if page_cache is None:
        page_cache = stream is not None and stream.page_cache
    names = [weight.name for weight in streamed]
    if stream is not None and stream.is_for(names, slots_nbytes, page_cache):
        return stream
    origins = {weight.name: weight.origin for weight in streamed if weight.origin is not None}
    return HostStream(origins, slots_nbytes, page_cache=page_cache)


def _stream(weight: Weight, streamed: StreamedWeight) -> None:
    assert weight.origin is not None
    backing = weight.module.backing
    if isinstance(backing, StreamedWeight) and backing.stream is streamed.stream:
        return
    view = weight.origin.view()
    for module in weight.modules:
        module.stream_from(view, streamed)


def _to_memory(
    between: Between,
    weights: list[Weight],
    tiers: Mapping[str, Tier],
    progress: Progress | None,
    done: Callable[[Weight], None],
) -> None:
    """Recodes in batches, what shrinks first."""
    wanted = {weight.name: tiers[weight.name].codec for weight in weights}
    moving = [w for w in weights if w.tier != tiers[w.name]]
    for weight in weights:
        if weight.tier == tiers[weight.name]:
            done(weight)

    def grows(weight: Weight) -> tuple[bool, int]:
        shrinks = not weight.module.is_in_file and wanted[weight.name] != "raw"
        return not shrinks, codec_names()[::-1].index(wanted[weight.name])

    batch: list[tuple[Weight, Tensor]] = []
    for weight in sorted(moving, key=grows):
        batch.append((weight, weight.payload(wanted[weight.name], progress)))
        if sum(payload.nbytes for _, payload in batch) >= BATCH_NBYTES:
            _exchange(between, batch)
        done(weight)
    _exchange(between, batch)


def _exchange(between: Between, batch: list[tuple[Weight, Tensor]]) -> None:
    if batch:
        with between():
            for weight, payload in batch:
                weight.set_payload(payload)
    batch.clear()


def _offload(model: nn.Module, weights: list[Weight], stream: HostStream | None) -> Offload:
    in_memory = sum(w.module.payload.nbytes for w in weights if not w.module.is_in_file)
    slots = 0 if stream is None else stream.slots_nbytes
    return Offload(
        tiers={weight.name: weight.tier.place for weight in weights},
        nbytes={weight.name: weight.module.payload.nbytes for weight in weights},
        memory_nbytes=other_nbytes(model) + in_memory + slots,
        stream=stream,
    )
