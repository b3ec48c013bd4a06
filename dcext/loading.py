"""A compressed model put together from a float skeleton and a checkpoint, and what a checkpoint says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dcext.codec import payload_info
from dcext.errors import FormatError
from dcext.find import bake_, splits_in
from dcext.format import CheckpointReader
from dcext.format.manifest import FORMAT_VERSION, parse_json_object
from dcext.nn.compressed import CompressedModule, compressed_modules, storage_form
from dcext.nn.convert import compress_module_
from dcext.nn.linear import CompressedLinear
from dcext.nn.matrix import kind_of
from dcext.nn.split import Split, split_
from dcext.quantize.report import CompressionReport
from dcext.weights.origin import Origin

QUANT_METHOD = "dcext"
REPORT_ATTRIBUTE = "dcext_report"
REPORT_NAME = "compression_report.json"
LEAVES = ("payload", "row_scale", "col_scale", "outlier_index", "outlier_weight")


@dataclass(frozen=True)
class LoadOptions:
    """What ``dcext.from_pretrained`` tells the quantizer that transformers makes.

    Attributes:
        in_files: whether payloads are left in their files.
        progress: called with the number of bytes loaded since the last call.
        reader: the checkpoint, open already.
    """

    in_files: bool = False
    progress: Callable[[int], None] = lambda nbytes: None
    reader: CheckpointReader | None = None


_OPTIONS: ContextVar[LoadOptions | None] = ContextVar("dcext_load_options", default=None)


def current_load_options() -> LoadOptions:
    """Those of this thread; the defaults where none were given."""
    return _OPTIONS.get() or LoadOptions()


@contextmanager
def load_options(options: LoadOptions) -> Iterator[None]:
    """While entered, models that this thread loads are loaded with these options."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def describe(model: nn.Module, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed model's ``config.json``; see format/CONTAINER.md.

    Args:
        model: compressed.
        config: how it was made, JSON-ready, or None.
    """
    modules = compressed_modules(model)
    tied = tied_modules(modules)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "activations": {
            name: m.activations for name, m in modules.items() if isinstance(m, CompressedLinear)
        },
        "tied": tied,
        "shared": _shared_scales(modules, tied),
        "split": {
            name: {attribute: split.to_list() for attribute, split in splits.items()}
            for name, splits in splits_in(model).items()
        },
        "config": None if config is None else dict(config),
    }


def tied_modules(modules: Mapping[str, CompressedModule]) -> dict[str, str]:
    """Modules that share the payload of an earlier one, and which."""
    first: dict[int, str] = {}
    tied = {}
    for name, module in modules.items():
        owner = first.setdefault(id(module.payload), name)
        if owner != name:
            tied[name] = owner
    return tied


def _shared_scales(
    modules: Mapping[str, CompressedModule], tied: Mapping[str, str]
) -> dict[str, str]:
    """Layers that share the ``col_scale`` of an earlier one, and which: those that read the same input do."""
    first: dict[int, str] = {}
    shared = {}
    for name, module in modules.items():
        if module.col_scale is not None and name not in tied:
            owner = first.setdefault(id(module.col_scale), name)
            if owner != name:
                shared[name] = owner
    return shared


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint of a model holds: its state dict without what is stored under another name."""
    compressed = compressed_modules(model)
    tied = tied_modules(compressed)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        if module in tied and leaf in LEAVES:
            continue
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach()
        if leaf in ("row_scale", "col_scale") and module in compressed:
            tensor = storage_form(tensor)
        tensors[name] = tensor
    return tensors


def stored_report(reader: CheckpointReader) -> CompressionReport | None:
    """What compression said of the layers of a checkpoint, verified; None where it is not there."""
    if REPORT_NAME not in reader.file_names or not (reader.directory / REPORT_NAME).exists():
        return None
    data = parse_json_object(reader.read_file(REPORT_NAME), REPORT_NAME)
    try:
        return CompressionReport.from_dict(data)
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{REPORT_NAME}: expected a report, found another field: {error}"
        ) from None


class Loader:
    """Fills a skeleton from a checkpoint and accounts for every tensor of both."""

    def __init__(
        self,
        reader: CheckpointReader,
        quantization: Mapping[str, Any],
        progress: Callable[[int], None],
        *,
        in_files: bool,
        rename: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        """Reads nothing yet.

        Args:
            reader: the checkpoint.
            quantization: its ``quantization_config``.
            progress: called with the number of bytes loaded since the last call.
            in_files: whether payloads are left in their files, mapped and not verified.
            rename: gives the name in the skeleton of a module of the checkpoint, or None if it has none.
        """
        self.reader = reader
        self.in_files = in_files
        self.quantization = quantization
        self.progress = progress
        self.rename = rename
        self.used: set[str] = set()
        self.col_scales: dict[str, Tensor] = {}

    def load_compressed(self, model: nn.Module) -> set[str]:
        """Turns layers of the skeleton into compressed ones.

        Returns:
            The names of the tensors of the checkpoint that were used.

        Raises:
            FormatError: damaged, or not of this model: the tensor, expected and found.
        """
        self.split(model)
        names = [
            key.removesuffix(".payload") for key in self.reader.names() if key.endswith(".payload")
        ]
        shared = self.quantization.get("shared", {})
        for name in sorted(names, key=lambda name: name in shared):  # owners first
            target = self.rename(name)
            if target is not None:
                self.compress(name, self.float_module(model, name, target))
        for name, owner in self.quantization.get("tied", {}).items():
            target, source = self.rename(name), self.rename(owner)
            if target is not None and source is not None:
                self.tie(model, name, target, owner, source)
        return self.used

    def split(self, model: nn.Module) -> None:
        """Turns parameters into layers where the checkpoint has layers."""
        for name, splits in self.quantization.get("split", {}).items():
            target = self.rename(name)
            if target is None:
                continue
            try:
                module = model.get_submodule(target)
                split_(module, {attribute: Split(*split) for attribute, split in splits.items()})
            except (AttributeError, TypeError, ValueError) as error:
                raise FormatError(f"config.json: split: {name!r}: {error}") from None

    def tensor(self, name: str) -> Tensor:
        """A verified copy."""
        self.use(name)
        self.reader.verify(name, self.progress)
        return self.reader.get(name).clone()

    def use(self, name: str) -> None:
        """Notes that a tensor is used; raises ``FormatError`` where there is none."""
        if name not in self.reader:
            raise FormatError(f"tensor {name!r}: expected in the checkpoint, found none")
        self.used.add(name)

    def payload(self, origin: Origin) -> Tensor:
        """A verified payload in weight memory, or where it lies in its file."""
        self.use(origin.name)
        return origin.view() if self.in_files else origin.load(self.progress)

    def optional(self, name: str) -> Tensor | None:
        """A verified copy, or None where there is none."""
        return self.tensor(name) if name in self.reader else None

    def compress(self, name: str, module: nn.Module) -> None:
        """Gives a layer of the skeleton its payload."""
        origin = Origin(self.reader, f"{name}.payload")
        payload = self.payload(origin)
        try:
            info = payload_info(payload)
            index = self.optional(f"{name}.outlier_index")
            compressed = compress_module_(
                module,
                payload,
                self.tensor(f"{name}.row_scale"),
                self.col_scale(name, info["shape"][1]),
                bias=self.bias(name, module),
                activations=self.activations(name),
                outliers=None if index is None else (index, self.tensor(f"{name}.outlier_weight")),
            )
        except FormatError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"tensor {name + '.payload'!r}: {error}") from None
        compressed.set_origin(origin, in_file=self.in_files)

    def tie(self, model: nn.Module, name: str, target: str, owner: str, source: str) -> None:
        """Gives a layer the payload that another has."""
        shared = model.get_submodule(source)
        if not isinstance(shared, CompressedModule):
            raise FormatError(
                f"config.json: tied: expected {owner!r} to be compressed, found that it is not"
            )
        module = self.float_module(model, name, target)
        try:
            compressed = compress_module_(
                module,
                shared.payload,
                shared.row_scale,
                shared.col_scale,
                bias=self.bias(name, module),
                activations=self.activations(name),
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"config.json: tied: {name!r}: {error}") from None
        if shared.origin is not None:
            compressed.set_origin(shared.origin, in_file=shared.is_in_file)

    def bias(self, name: str, module: nn.Module) -> Tensor | None:
        """Of a linear layer; convolutions load theirs as any other float tensor."""
        kind = kind_of(module)
        is_linear = kind is not None and kind.name in ("linear", "conv1d")
        has_bias = is_linear and getattr(module, "bias", None) is not None
        return self.tensor(f"{name}.bias") if has_bias else None

    def activations(self, name: str) -> str:
        """How a layer quantizes its activations."""
        return self.quantization.get("activations", {}).get(name, "int8")

    def col_scale(self, name: str, in_features: int) -> Tensor | None:
        """A layer's own, widened to float32, or the tensor of the layer that it shares it with."""
        owner = self.quantization.get("shared", {}).get(name)
        if owner is not None and owner not in self.col_scales and self.rename(owner) is None:
            self.col_scales[owner] = self._own_col_scale(owner, in_features)
        if owner is not None:
            if self.col_scales.get(owner) is None:
                raise FormatError(
                    f"config.json: shared: {name!r}: expected {owner!r} to have a col_scale, found none"
                )
            return self.col_scales[owner]
        if f"{name}.col_scale" not in self.reader:
            return None
        self.col_scales[name] = self._own_col_scale(name, in_features)
        return self.col_scales[name]

    def _own_col_scale(self, name: str, in_features: int) -> Tensor:
        stored = self.tensor(f"{name}.col_scale")
        size = in_features if stored.shape == (1,) else stored.shape[0]
        return stored.expand(size).float().contiguous()

    def float_module(self, model: nn.Module, name: str, target: str) -> nn.Module:
        """A layer of the skeleton, with a plain weight."""
        try:
            module = model.get_submodule(target)
        except AttributeError:
            module = None
        if module is not None and kind_of(module) is not None:
            bake_(module)
            if module._parameters.get("weight") is not None:
                return module
        raise FormatError(
            f"tensor {name + '.payload'!r}: expected a layer with a weight of that name in the model, found "
            + ("none" if module is None else type(module).__name__)
        )

    def load_float(self, model: nn.Module) -> None:
        """Everything that is not compressed: parameters on the meta device, and persistent buffers.

        Raises:
            FormatError: one is missing, or of another shape, or the checkpoint has more than the model.
        """
        loaded: dict[int, nn.Parameter] = {}
        for name, old in list(model.named_parameters(remove_duplicate=False)):
            if id(old) not in loaded and name in self.reader:
                value = self.tensor(name)
                if value.shape != old.shape:
                    raise FormatError(
                        f"tensor {name!r}: expected shape {tuple(old.shape)}, found {tuple(value.shape)}"
                    )
                loaded[id(old)] = nn.Parameter(value, requires_grad=False)
        for name, old in list(model.named_parameters(remove_duplicate=False)):
            if id(old) not in loaded:
                raise FormatError(f"tensor {name!r}: expected in the checkpoint, found none")
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, loaded[id(old)])
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in self.reader and name in persistent and name not in self.used:
                buffer.copy_(self.tensor(name))
        unused = sorted(set(self.reader.names()) - self.used)
        if unused:
            raise FormatError(f"tensor {unused[0]!r}: the model has no place for it")


def forget_ties(model: nn.Module) -> None:
    """Takes compressed layers out of what transformers models tie: they share a payload, and have no weight to tie."""
    gone = []
    for name, module in compressed_modules(model).items():
        gone.append(f"{name}.weight")
        if "bias" in module._buffers:  # no parameter any more
            gone.append(f"{name}.bias")
    for path, owner in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = [name.removeprefix(prefix) for name in gone if name.startswith(prefix)]
        for keys in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(owner, keys, None)
            if not isinstance(tied, dict) or not inside:
                continue
            left = {
                target: source
                for target, source in tied.items()
                if not any(name == target or re.search(target, name) for name in inside)
            }
            if left != tied:
                setattr(owner, keys, left or ({} if keys.startswith("all") else None))
