"""Makes transformers know the quantization method ``dcext``, and PEFT compressed layers, without importing either.

``import dcext`` calls ``register``. What has to be done is done at once where they are imported already, else as soon as
their modules that are concerned are.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _add_method(module: ModuleType) -> None:
    from dcext.integrations import hf  # noqa: F401  (registers when it is imported)


def _replace_saving(module: ModuleType) -> None:
    from dcext.integrations import hf_saving

    hf_saving.replace_save_pretrained(module.PreTrainedModel)


def _extend_tuners(module: ModuleType) -> None:
    from dcext.integrations import peft

    peft.extend_tuners(module)


def _extend_modules_to_save(module: ModuleType) -> None:
    from dcext.integrations import peft

    peft.extend_modules_to_save(module)


def _extend_conversion(module: ModuleType) -> None:
    from dcext.integrations import peft

    peft.extend_conversion(module)


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.quantizers.auto": _add_method,
    "transformers.modeling_utils": _replace_saving,
    "peft.tuners.tuners_utils": _extend_tuners,
    "peft.utils.other": _extend_modules_to_save,
    "peft.utils.transformers_weight_conversion": _extend_conversion,
}


def register() -> None:
    """Registers now or when transformers and PEFT are imported; again changes nothing."""
    waiting = [name for name in _AFTER if name not in sys.modules]
    for name, act in _AFTER.items():
        if name not in waiting:
            act(sys.modules[name])
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has a module loaded as it would be, then does what is to be done after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _AFTER[name])
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module, then acts."""

    def __init__(self, loader: importlib.abc.Loader, act: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._act = act

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._act(module)
