"""What ``from_pretrained`` checks of plans and budgets before anything is read."""

from __future__ import annotations

import torch

from dcext.checks import check_type, torch_device
from dcext.nn.placement import check_device
from dcext.offloading.device_budget import MODES
from dcext.policy.plan import Plan
from dcext.sizes import check_nbytes


def check_placement(
    device: torch.device | str,
    plan: Plan | None,
    host_memory: int | str | None,
    device_memory: int | str | None,
    mode: str,
) -> None:
    """Checks where a model is to be, as ``from_pretrained`` is told; see there for the arguments.

    Raises:
        RuntimeError: torch finds no such device.
        TypeError, ValueError: an argument is not as it has to be, or does not go with another.
    """
    if mode not in MODES:
        raise ValueError(f"from_pretrained: mode: expected one of {', '.join(MODES)}, got {mode!r}")
    on = torch_device("from_pretrained: device", device)
    if plan is not None:
        _check_plan(on, plan, host_memory is not None or device_memory is not None)
    _check_budgets(on, host_memory, device_memory)
    wanted_for = "the model" if device_memory is None else "device_memory"
    check_device("from_pretrained", "a plan for one" if plan is not None else wanted_for, on)


def _check_plan(device: torch.device, plan: Plan, has_budget: bool) -> None:
    """Checks that a plan is one, alone, and for the kind of device.

    Raises:
        TypeError: no plan, but its file or JSON.
        ValueError: a budget beside it, or another kind of device.
    """
    expected = "a Plan, from dcext.plan or of a file by dcext.policy.plan.load_plan"
    check_type("from_pretrained: plan", plan, Plan, expected)
    if has_budget:
        raise ValueError("from_pretrained: plan: expected no budget beside it, got one")
    if plan.on_device and device.type == "cpu":
        raise ValueError(
            f"from_pretrained: device: expected a device beside a plan for one, got {str(device)!r}"
        )
    if not plan.on_device and device.type != "cpu":
        raise ValueError(
            f"from_pretrained: device: expected 'cpu' beside a plan for it, got {str(device)!r}"
        )


def _check_budgets(
    device: torch.device, host_memory: int | str | None, device_memory: int | str | None
) -> None:
    """Checks that sizes are sizes, of memory that the device has.

    Raises:
        ValueError: they are not.
    """
    check_nbytes(host_memory=host_memory, device_memory=device_memory)
    if device.type == "cpu" and device_memory is not None:
        raise ValueError(
            f"from_pretrained: device_memory: expected None with device 'cpu', got {device_memory!r}"
        )
    if device.type != "cpu" and host_memory is not None and device_memory is None:
        raise ValueError(
            f"from_pretrained: device_memory: expected a size beside host_memory with device {str(device)!r}, got None"
        )
