"""Forward passes of a model: what may happen only between them, and how long they take."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_gates: weakref.WeakKeyDictionary[nn.Module, PassGate] = weakref.WeakKeyDictionary()


class PassGate:
    """Lets passes of a model run side by side, and changes of its layers while none does."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running = 0
        self._changing = False
        self._depth = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return PassGate, ()  # a copy of a model has a gate of its own, which is open

    def attach(self, model: nn.Module) -> None:
        """Adds hooks to a model, which know of passes that begin from now on."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: Any) -> None:
        depth = getattr(self._depth, "value", 0)
        self._depth.value = depth + 1
        if depth > 0:  # a pass that calls the model again
            return
        with self._free:
            while self._changing:
                self._free.wait()
            self._running += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth.value -= 1
        if self._depth.value > 0:
            return
        with self._free:
            self._running -= 1
            if self._running == 0:
                self._free.notify_all()

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """Waits until no pass runs, and keeps new ones waiting. Not to be called within a pass."""
        if getattr(self._depth, "value", 0) > 0:
            raise RuntimeError("between_passes: expected a call outside of the model's own pass")
        with self._free:
            while self._changing:
                self._free.wait()
            self._changing = True
            while self._running > 0:
                self._free.wait()
        try:
            yield
        finally:
            with self._free:
                self._changing = False
                self._free.notify_all()


def gate_of(model: nn.Module) -> PassGate:
    """The gate of a model; made on first use, which must not be while a pass runs."""
    if model not in _gates:
        _gates[model] = PassGate()
        _gates[model].attach(model)
    return _gates[model]
