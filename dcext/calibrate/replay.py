"""How a pass that was interrupted gets to where it was, without running what is done where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcext.calibrate.blocks import Call
from dcext.calibrate.resume import ResumeFolder
from dcext.calibrate.tree import tensors_in


class ReplayError(Exception):
    """What was kept of the calls that are done does not do for the next one."""


class Chain:
    """Whether each call so far was given just what the one before returned, so that this is all that need be kept.

    Attributes:
        hidden: what was returned last; None where the calls are no such chain.
        form: ``"tensor"`` or ``"tuple"``: how it was returned.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.form = ""
        self._is_chain = True

    def enter(self, call: Call) -> None:
        """Takes a call before it is made."""
        is_next = not call.index or call.hidden is self.hidden
        if not is_next or not _is_plain((call.args, *call.kwargs.values())):
            self._is_chain, self.hidden = False, None

    def leave(self, output: Any) -> None:
        """Takes what the call returned."""
        tensors = tensors_in(output)
        self._is_chain = (
            self._is_chain and isinstance(output, (Tensor, tuple)) and len(tensors) == 1
        )
        self.hidden = tensors[0] if self._is_chain else None
        self.form = "tensor" if isinstance(output, Tensor) else "tuple"


@dataclass
class Replay:
    """The calls that an interrupted pass has done.

    Attributes:
        calls: how many.
        recipe: the recipe's state after them.
        hidden: what the last one returned, if no other one matters: then none need be run again.
        form: as in ``Chain``.
    """

    calls: int
    recipe: dict[str, Any]
    hidden: Tensor | None
    form: str

    @classmethod
    def load(cls, resume: ResumeFolder) -> Replay | None:
        """What was kept; None for nothing."""
        loaded = resume.load("state")
        if loaded is None or loaded[1]["calls"] == 0:
            return None
        tensors, meta = loaded
        return cls(meta["calls"], meta["recipe"], tensors.get("hidden"), meta.get("form", ""))

    def output(self, call: Call) -> Any:
        """What a call returns without being run: what was kept, or NaN, which must not matter; None if it has to run."""
        if self.hidden is None:
            return None
        value = self.hidden
        if call.index < self.calls - 1:
            value = torch.full((), torch.nan, dtype=value.dtype).expand(value.shape)
        return value if self.form == "tensor" else (value,)

    def check(self, call: Call) -> None:
        """Raises where the first call to be made depends on one that was not run."""
        if self.hidden is None:
            return
        inputs = [t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point()]
        if any(bool(torch.isnan(tensor).any()) for tensor in inputs):
            raise ReplayError


def _is_plain(value: Any) -> bool:
    """Whether a value cannot carry what one block leaves for another, as a dict, a list or an object can."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))
