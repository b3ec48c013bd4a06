"""Where the weights of a block come from: a model in memory, or the shards of a checkpoint larger than memory."""

from __future__ import annotations

import copy
import ctypes
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import Block, Intercept
from dcext.format.mapped import SafetensorsFile
from dcext.nn.split import ITEMS_SUFFIX, item_of

INDEX_NAME = "model.safetensors.index.json"


class BlockSource:
    """The float weights of a model that is in memory."""

    @contextmanager
    def skeleton(self, blocks: list[Block] | None = None) -> Iterator[None]:
        """While entered, everything outside the blocks (by default, those of ``find_blocks``) has its weights."""
        yield

    @contextmanager
    def weights(self, block: Block) -> Iterator[nn.Module]:
        """While entered, the block itself has its weights; yields it."""
        yield block.module

    def bias(self, name: str, module: nn.Module) -> Tensor | None:
        """The bias of a module of this name."""
        return getattr(module, "bias", None)

    def identity(self) -> str:
        """Tells weights that are not in memory from others."""
        return ""

    def fill_rest(self) -> None:
        """Gives its weights, for good, to what was not compressed."""

    @contextmanager
    def working_copy(self, block: Block, dtype: torch.dtype | None) -> Iterator[nn.Module]:
        """A frozen copy of a block in ``dtype`` (None for its own), to be run and changed freely.

        Hooks of the block itself are left to the original, those of its parts are copied.
        """
        with self.weights(block) as module:
            duplicate = copy.deepcopy(module)
        for part in duplicate.modules():
            intercept = part.__dict__.get("forward")
            if isinstance(intercept, Intercept):
                intercept.remove_from(part)
        duplicate._forward_hooks.clear()
        duplicate._forward_pre_hooks.clear()
        yield duplicate.to(dtype).requires_grad_(False)


class ShardSource(BlockSource):
    """The safetensors files of a Hugging Face folder; a block's weights are read when it is entered, dropped after.

    The model itself is on the meta device (``dcext.hub.load_lazy_model``).
    """

    def __init__(self, model: nn.Module, folder: Path, blocks: list[Block]) -> None:
        """Opens the files; reads nothing but their headers.

        Raises:
            FileNotFoundError: no safetensors file.
            ValueError: a parameter of the model that no file holds.
        """
        self._model = model
        self._dtype = {name: p.dtype for name, p in model.named_parameters()}
        self._blocks = blocks
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{folder}: expected safetensors files, found none")
        index = folder / INDEX_NAME
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
        self._files = {}
        stats = [(name, (folder / name).stat()) for name in names]
        self._identity = str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        for name in names:
            file = SafetensorsFile(folder / name)
            self._files.update(dict.fromkeys(file.names(), file))
        tied = set(dict(model.named_parameters(remove_duplicate=False))) - set(self._dtype)
        missing = sorted(set(self._dtype) - set(self._files) - tied)
        if missing:
            raise ValueError(f"{folder}: expected a tensor {missing[0]!r}, found none of that name")
        for name, buffer in model.named_buffers():
            if name in self._files:
                buffer.copy_(self._files[name].get(name))

    def bias(self, name: str, module: nn.Module) -> Tensor | None:
        if getattr(module, "bias", None) is None:
            return None
        key = f"{name}.bias"
        return self._files[key].get(key).to(self._dtype[key])

    def identity(self) -> str:
        return self._identity

    def fill_rest(self) -> None:
        for name, parameter in list(self._model.named_parameters()):
            if parameter.is_meta:
                self._put(name, self._value(name))

    def _value(self, name: str) -> Tensor:
        """A parameter as its file has it; of one that became layers, the matrix of the layer.

        Raises:
            ValueError: no file holds it.
        """
        if name in self._files:
            return self._files[name].get(name)
        item = re.fullmatch(rf"((?:.*\.)?)(\w+){ITEMS_SUFFIX}\.(\d+)\.weight", name)
        if item is not None and item[1] + item[2] in self._files:
            whole = self._files[item[1] + item[2]].get(item[1] + item[2])
            module = self._model.get_submodule(item[1].removesuffix("."))
            return item_of(module, item[2], int(item[3]), whole)
        raise ValueError(
            f"{name}: expected a tensor that the files hold, found none of that name: load the model into memory "
            "(--no-low-memory)"
        )

    @contextmanager
    def skeleton(self, blocks: list[Block] | None = None) -> Iterator[None]:
        inside = {
            id(module)
            for block in (self._blocks if blocks is None else blocks)
            for module in block.module.modules()
        }
        with self._filled(m for m in self._model.modules() if id(m) not in inside):
            yield

    @contextmanager
    def weights(self, block: Block) -> Iterator[nn.Module]:
        with self._filled(block.module.modules()):
            yield block.module

    @contextmanager
    def _filled(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """While entered, modules have their own parameters; those that have them already keep them afterwards."""
        wanted = {id(p) for module in modules for p in module._parameters.values()}
        empty: dict[str, nn.Parameter] = {}
        for name, parameter in list(self._model.named_parameters()):
            if id(parameter) in wanted and parameter.is_meta:
                empty[name] = self._put(name, self._value(name))
        try:
            yield
        finally:
            for name, parameter in empty.items():
                self._restore(name, parameter)
            _return_free_memory()

    def _put(self, name: str, value: Tensor) -> nn.Parameter:
        parent, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(parent)
        old = module._parameters[leaf]
        if old is None:
            raise ValueError(f"{name}: expected a parameter of that name, found none")
        filled = nn.Parameter(value.to(old.dtype), requires_grad=False)
        for owner in self._model.modules():  # tied weights too
            for key, parameter in owner._parameters.items():
                if parameter is old:
                    owner._parameters[key] = filled
        return old

    def _restore(self, name: str, old: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(parent)
        filled = module._parameters.get(leaf)
        for owner in self._model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is filled:
                    owner._parameters[key] = old


def _return_free_memory() -> None:
    """Lets glibc give freed pages back: blocks come and go, and its heap would keep several of them."""
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # other C libraries have none, and no such heap
    if trim is not None:
        trim(0)
