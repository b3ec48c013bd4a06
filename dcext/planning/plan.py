"""Plans for a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dcext.checks import check_model
from dcext.policy.machine import Machine
from dcext.policy.plan import Plan
from dcext.profiling.observe import Forward, Progress
from dcext.profiling.study import DEVICE, checked_mix, study
from dcext.sizes import check_nbytes


def plan(
    model: nn.Module,
    *,
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    slowdown: float | None = None,
    tokens: int = 1,
    mix: Mapping[int, float] | None = None,
    machine: Machine | str | Path | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Chooses for each layer what to keep in memory, in which codec, and what to leave on the disk.

    Codes every layer in every codec to know its exact size, runs a few passes of the model in which layers of each kind
    have each codec, reads its files, and minimises the time that follows (``dcext.policy.predict``). Nothing is moved:
    that is ``dcext.apply``.

    Args:
        model: a compressed model on the CPU.
        host_memory: bytes for weights, or a size such as ``"4GiB"``; None for what is free, if there is no ``slowdown``.
        device_memory: the same on the device of ``machine``, or on this machine's GPU, where the model is to run.
        slowdown: least memory instead of least time: a pass may take so much longer than with plain INT8 in memory (0.05
            is 5 %); the budgets are kept as well.
        tokens: of a forward pass.
        mix: how many passes there are of each number of tokens, instead: ``{1: 200, 512: 1}``.
        machine: a machine to plan for, its JSON file, or a preset's name; None for this one, measured (``tune``), with its
            GPU if there is ``device_memory``. Times of the model itself are taken on the CPU only.
        forward: runs a pass of so many tokens, for models that are not language models of transformers.
        progress: called with what is done and its share of the whole.

    Returns:
        The plan: JSON with ``Plan.save``.

    Raises:
        BudgetError: nothing fits: by how much.
        RuntimeError: there is ``device_memory``, and neither a ``machine`` nor a GPU.
        ValueError: an argument is not as above.
    """
    check_model("plan", model)
    lengths = tuple(checked_mix(tokens, mix, slowdown))
    check_nbytes(host_memory=host_memory, device_memory=device_memory)
    device = None if device_memory is None else DEVICE
    studied = study(
        model, lengths, machine=machine, device=device, forward=forward, progress=progress
    )
    return studied.plan(
        host_memory=host_memory,
        device_memory=device_memory,
        slowdown=slowdown,
        tokens=tokens,
        mix=mix,
    )
