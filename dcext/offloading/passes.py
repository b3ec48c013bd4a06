"""Forward passes of a model: what may happen only between them, and how long they take."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Listener = Callable[[int, float], None]  # of the tokens and seconds of a pass, once it is over
_gates: weakref.WeakKeyDictionary[nn.Module, PassGate] = weakref.WeakKeyDictionary()


class PassGate:
    """Lets passes of a model run side by side, and changes of its layers while none does."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running = 0
        self._changing = False
        self._here = threading.local()
        self.listener: Listener | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PassGate, ()  # a copy of a model has a gate of its own, which is open

    def attach(self, model: nn.Module) -> None:
        """Adds hooks to a model, which know of passes that begin from now on."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        here = self._here
        here.depth = getattr(here, "depth", 0) + 1
        if here.depth > 1:  # a pass that calls the model again
            return
        with self._free:
            while self._changing:
                self._free.wait()
            self._running += 1
        if self.listener is not None:
            here.tokens = _tokens_of(args, kwargs)
            here.began = time.perf_counter()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        here = self._here
        here.depth -= 1
        if here.depth > 0:
            return
        seconds = time.perf_counter() - getattr(here, "began", math.inf)
        with self._free:
            self._running -= 1
            if self._running == 0:
                self._free.notify_all()
        if self.listener is not None and output is not None and seconds > 0:
            self.listener(here.tokens, seconds)

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """Waits until no pass runs, and keeps new ones waiting. Not to be called within a pass."""
        if getattr(self._here, "depth", 0) > 0:
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


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a pass, by its first tensor of ids ``(batch, tokens)`` or of vectors ``(batch, tokens, features)``."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        if isinstance(value, Tensor):
            is_vectors = value.is_floating_point()
            return value.shape[:-1].numel() if is_vectors else value.numel()
    return 1


def gate_of(model: nn.Module) -> PassGate:
    """The gate of a model; made on first use, which must not be while a pass runs."""
    if model not in _gates:
        _gates[model] = PassGate()
        _gates[model].attach(model)
    return _gates[model]
