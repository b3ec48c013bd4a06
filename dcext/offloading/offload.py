"""Runs models that are larger than the memory they are given: what does not fit is streamed while they run."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from dcext.checks import check_model, torch_device
from dcext.nn.placement import check_device
from dcext.offloading.apply import move_weights
from dcext.offloading.device import place_on_device
from dcext.offloading.device_budget import MODES, device_tiers, plan_device
from dcext.offloading.spread import spread_evenly
from dcext.offloading.state import (
    LEAST_SLOTS_NBYTES,
    OFFLOAD_ATTRIBUTE,
    Offload,
    other_nbytes,
    slots_for,
)
from dcext.offloading.weights import Weight, weights_of
from dcext.policy.tier import Tier
from dcext.sizes import format_nbytes, parse_nbytes


def offload(
    model: nn.Module,
    *,
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    device: torch.device | str = "cuda",
    mode: str = "auto",
    page_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Offload:
    """Keeps as many weights of a model in memory as a budget allows, and streams the others while the model runs.

    Outputs stay the same bit for bit. May be called again with another budget, between forward passes.

    - ``host_memory`` alone, on the CPU: layers that do not fit stay in their files and are read with large direct reads,
      panel by panel, ahead of their use; every chunk is compared with its checksum each time. Do not alter the files
      meanwhile: that raises ``FormatError`` in the layer that needs them.
    - ``device_memory``: the model runs on a device; decoder blocks that do not fit there wait in pinned host memory, those
      that do not fit in ``host_memory`` either stay in their files, and all are copied ahead of their use (not yet run on
      a GPU). Call blocks, not layers inside of them.

    Args:
        model: from ``dcext.from_pretrained``, on the CPU.
        host_memory: for weights, bytes or ``"4GiB"``: compressed or not, and room for reads. The cache of past tokens
            and activations come on top.
        device_memory: for weights on the device, slots for what is copied and room to decode: bytes or ``"4GiB"``.
        device: with ``device_memory``, where the model runs.
        mode: with ``device_memory``, how weights are copied there: ``"device"``, as they are stored, to be decoded there;
            ``"host"``, decoded by the host on their way; ``"raw"``, decoded once and copied as INT8; ``"auto"``: ``"device"``.
        page_cache: with ``host_memory`` alone, whether the system may also keep pages of the files in memory that is not
            counted here.
        progress: called with the number of bytes that were read into memory since the last call.

    Returns:
        Where each weight is, with statistics; also ``model.dcext_offload``.

    Raises:
        TypeError: no model, or no device.
        ValueError: the model does not come from files, is not on the CPU, or a budget is too small: by how much.
        FormatError: what is read into memory is damaged.
        RuntimeError: there is no such device, or dcext was built without CUDA.
    """
    check_model("offload", model)
    on = torch_device("offload: device", device)
    if mode not in MODES:
        raise ValueError(f"offload: mode: expected one of {', '.join(MODES)}, got {mode!r}")
    report = progress or (lambda nbytes: None)
    if device_memory is not None:
        budget = parse_nbytes("device_memory", device_memory)
        host = None if host_memory is None else parse_nbytes("host_memory", host_memory)
        result = _offload_to_device(model, on, budget, host, mode, report)
    elif host_memory is not None:
        budget = parse_nbytes("host_memory", host_memory)
        result = _offload_to_disk(model, budget, page_cache, report)
    else:
        raise ValueError("offload: expected host_memory or device_memory, got neither")
    setattr(model, OFFLOAD_ATTRIBUTE, result)
    return result


def _offload_to_device(
    model: nn.Module,
    device: torch.device,
    budget: int,
    host_budget: int | None,
    mode: str,
    progress: Callable[[int], None],
) -> Offload:
    check_device("offload", "device_memory", device)
    weights = _weights(model)
    mode = "device" if mode == "auto" else mode
    plan = plan_device(model, mode, budget, host_budget)
    placed = place_on_device(
        model,
        device_tiers(weights, plan, mode),
        device,
        plan.reads_nbytes,
        read=progress,
        moved=lambda weight: None,
    )
    tiers = {block.name: "device" for block in plan.resident}
    tiers |= {block.name: "host" for block in plan.prefetched}
    tiers |= {block.name: "disk" for block in plan.from_disk}
    nbytes = {block.name: block.device_nbytes for block in [*plan.resident, *plan.prefetched]}
    return Offload(
        tiers=tiers,
        nbytes=nbytes,
        memory_nbytes=plan.host_nbytes,
        device_nbytes=plan.device_nbytes,
        device_stream=placed.device_stream,
    )


def _offload_to_disk(
    model: nn.Module, budget: int, page_cache: bool, progress: Callable[[int], None]
) -> Offload:
    weights = _weights(model)
    others = other_nbytes(model)
    total = sum(weight.nbytes for weight in weights)
    resident = {weight.name for weight in weights}
    slots_nbytes = 0
    if others + total > budget:
        slots_nbytes = slots_for(budget)
        room = budget - others - slots_nbytes
        if room < 0:
            least = others + LEAST_SLOTS_NBYTES
            raise ValueError(
                f"host_memory: expected at least {least} bytes ({format_nbytes(least)}): {format_nbytes(others)} that "
                f"are not compressed and {format_nbytes(LEAST_SLOTS_NBYTES)} to read into; got {budget}"
            )
        resident = _choose_resident(weights, room)
    tiers = {
        weight.name: Tier("memory" if weight.name in resident else "disk", weight.disk_tier.codec)
        for weight in weights
    }
    return move_weights(
        model, weights, tiers, slots_nbytes, page_cache=page_cache, progress=progress
    )


def _weights(model: nn.Module) -> list[Weight]:
    """All payloads, each in a file."""
    try:
        weights = weights_of(model)
    except ValueError as error:
        raise ValueError(f"offload: {error}") from None
    for weight in weights:
        if weight.origin is None:
            raise ValueError(
                f"offload: {weight.name}: expected a payload from a checkpoint, got one that is not in a file: save the "
                "model and load it with from_pretrained"
            )
    return weights


def _choose_resident(weights: list[Weight], room: int) -> set[str]:
    """Names of what stays in memory: nothing that is only looked up, and evenly many of the others.

    What is left over goes to whatever still fits, embeddings last.
    """
    layers = [weight for weight in weights if not weight.is_looked_up]
    stays = spread_evenly([weight.nbytes for weight in layers], room)
    chosen = {weight.name: weight.nbytes for weight in itertools.compress(layers, stays)}
    left = room - sum(chosen.values())
    for weight in sorted(weights, key=lambda weight: weight.is_looked_up):
        if weight.name not in chosen and weight.nbytes <= left:
            chosen[weight.name] = weight.nbytes
            left -= weight.nbytes
    return set(chosen)
