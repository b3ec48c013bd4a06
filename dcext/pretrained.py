"""Compressed Hugging Face models on disk: saved as a folder, loaded back without the float weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcext.codec import payload_info
from dcext.compress import REPORT_ATTRIBUTE, compressed_modules, forget_ties
from dcext.config import CompressionConfig
from dcext.errors import FormatError
from dcext.format import CheckpointReader, write_checkpoint
from dcext.format.manifest import FORMAT_VERSION, parse_json_object
from dcext.nn import DCEmbedding, DCLinear
from dcext.nn.compressed import CompressedModule, storage_form
from dcext.nn.device import check_device, place
from dcext.policy.plan import Plan
from dcext.quantize.report import CompressionReport
from dcext.runtime.budget import parse_nbytes
from dcext.runtime.offload import offload
from dcext.runtime.origin import Origin
from dcext.runtime.retier import apply

QUANT_METHOD = "dcext"
REPORT_NAME = "compression_report.json"
# Of a float tensor that becomes three: headers, hashes, its row in the report.
SIDE_NBYTES_PER_TENSOR = 600


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    config: CompressionConfig | None = None,
    max_shard_nbytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a compressed transformers model: all of it or nothing (see ``dcext.format.write_checkpoint``).

    Args:
        model: a ``PreTrainedModel`` that went through ``compress_``.
        directory: the target; missing or empty, or with ``overwrite`` an earlier checkpoint.
        tokenizer: a transformers tokenizer to store beside it, or None.
        config: recorded in ``config.json`` for those who ask how the model was made.
        max_shard_nbytes: a shard is closed before it passes this size.
        overwrite: whether an earlier checkpoint may be replaced.
        progress: called with the number of bytes written since the last call.

    Raises:
        ValueError: ``model`` has no transformers config, or nothing in it is compressed.
        FileExistsError: the target holds something else.
    """
    modules = compressed_modules(model)
    if not hasattr(model, "config") or not modules:
        raise ValueError(
            "save_pretrained: model: expected a compressed transformers model, got "
            f"{type(model).__name__} with {len(modules)} compressed modules"
        )
    tied = _tied_modules(modules)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "activations": {
            name: m.activations for name, m in modules.items() if isinstance(m, DCLinear)
        },
        "tied": tied,
        "shared": _shared_scales(modules, tied),
        "config": None if config is None else config.to_dict(),
    }
    files = _side_files(model, tokenizer)
    model_config = json.loads(files["config.json"])
    model_config["architectures"] = [type(model).__name__]
    model_config["quantization_config"] = quantization
    files["config.json"] = (json.dumps(model_config, indent=2, sort_keys=True) + "\n").encode()
    report = getattr(model, REPORT_ATTRIBUTE, None)
    if isinstance(report, CompressionReport):
        files[REPORT_NAME] = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    write_checkpoint(
        directory,
        _tensors(model, tied),
        files,
        max_shard_nbytes=max_shard_nbytes,
        overwrite=overwrite,
        progress=progress,
    )


def from_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    mode: str = "auto",
    page_cache: bool = False,
    plan: Plan | None = None,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Loads a model that ``save_pretrained`` wrote, every byte verified, without ever holding its float weights.

    With ``host_memory``, weights that do not fit there stay in the files and are read while the model runs, ahead of
    their use; they are verified whenever they are used. With ``device_memory``, decoder blocks that do not fit on the
    device wait in host memory and are copied ahead of their use. See ``dcext.offload``.

    Args:
        directory: the folder.
        dtype: what to compute in; None for the dtype of the model that was compressed.
        device: where the weights rest, compressed, and the model runs (``dcext.nn.place``).
        host_memory: bytes for weights, or a size such as ``"4GiB"``; None for as much as they need.
        device_memory: the same on the device.
        mode: with ``device_memory``, how weights travel: ``"auto"``, ``"device"``, ``"host"`` or ``"raw"``.
        plan: where each layer is to be, from ``dcext.plan``, instead of the budgets; for the CPU or for ``device``.
        page_cache: with ``host_memory`` on the CPU, whether the system may also keep files in memory that is not counted.
        progress: called with the number of bytes loaded since the last call.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        RuntimeError: as ``dcext.nn.place``.
        ValueError: a budget is too small: by how much; or there is one that the device does not have.
        FileNotFoundError: no such folder.
        FormatError: not a dcext checkpoint, or one that is damaged: file and tensor, expected and found.
    """
    has_budget = host_memory is not None or device_memory is not None
    if plan is not None:
        _check_plan(torch.device(device), plan, has_budget)
    _check_budgets(torch.device(device), host_memory, device_memory)
    in_files = has_budget or plan is not None
    reader = CheckpointReader(directory)
    if "config.json" not in reader.file_names:
        raise FormatError(
            f"{directory}: expected config.json in the manifest, found {reader.file_names}"
        )
    model_config = parse_json_object(reader.read_file("config.json"), "config.json")
    quantization = model_config.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{directory}: config.json: quantization_config: expected quant_method 'dcext'"
        )
    generation_config = None
    if "generation_config.json" in reader.file_names:
        data = reader.read_file("generation_config.json")
        generation_config = parse_json_object(data, "generation_config.json")
    model = _skeleton(directory, model_config, generation_config)
    loader = _Loader(reader, quantization, progress or (lambda nbytes: None), not in_files)
    loader.load_into(model)
    forget_ties(model, set(compressed_modules(model)))
    if dtype is not None:
        model.to(dtype)
    if plan is not None:
        apply(model, plan, device=device)
        return model.eval()
    if not has_budget:
        place(model, device)
        return model.eval()
    offload(
        model,
        host_memory=host_memory,
        device_memory=device_memory,
        device=device,
        mode=mode,
        page_cache=page_cache,
        progress=progress,
    )
    return model.eval()


def _check_plan(device: torch.device, plan: Plan, has_budget: bool) -> None:
    """Before anything is read."""
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
    check_device("from_pretrained", "a plan for one", device)


def _check_budgets(
    device: torch.device, host_memory: int | str | None, device_memory: int | str | None
) -> None:
    """Before anything is read."""
    for name, size in (("host_memory", host_memory), ("device_memory", device_memory)):
        if size is not None:
            parse_nbytes(name, size)
    if device.type == "cpu" and device_memory is not None:
        raise ValueError(
            f"from_pretrained: device_memory: expected None with device 'cpu', got {device_memory!r}"
        )
    if device.type != "cpu" and host_memory is not None and device_memory is None:
        raise ValueError(
            f"from_pretrained: device_memory: expected a size beside host_memory with device {str(device)!r}, got None"
        )


def _tied_modules(modules: Mapping[str, CompressedModule]) -> dict[str, str]:
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


def _tensors(model: nn.Module, tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict without what is stored under another name already."""
    tensors: dict[str, Tensor] = {}
    compressed = compressed_modules(model)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        if module in tied and leaf != "bias":
            continue
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach()
        if leaf in ("row_scale", "col_scale") and module in compressed:
            tensor = storage_form(tensor)
        tensors[name] = tensor
    return tensors


def side_nbytes(model: Any, tokenizer: Any) -> int:
    """About how many bytes a checkpoint takes beside its tensors: config, tokenizer, manifest, headers."""
    files = sum(len(data) for data in _side_files(model, tokenizer).values())
    return files + SIDE_NBYTES_PER_TENSOR * len(model.state_dict())


def _side_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """``config.json`` and the files of generation config and tokenizer, as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _skeleton(
    directory: str | Path, model_config: dict[str, Any], generation_config: dict[str, Any] | None
) -> nn.Module:
    """The model with parameters on the meta device; buffers that are computed at construction are real."""
    import transformers
    from accelerate import init_empty_weights

    architectures = model_config.get("architectures") or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    if model_class is None:
        raise FormatError(
            f"{directory}: config.json: architectures: expected one of transformers', found {architectures}"
        )
    config = model_class.config_class.from_dict(model_config)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.tie_weights()  # meta parameters are made one by one and lose their ties
    if generation_config is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(generation_config)
    return model


class _Loader:
    """Fills a skeleton from a checkpoint and accounts for every tensor of both."""

    def __init__(
        self,
        reader: CheckpointReader,
        quantization: Mapping[str, Any],
        progress: Callable[[int], None],
        payloads: bool,
    ) -> None:
        """Args: payloads: whether to load them, or to leave them in their files."""
        self.reader = reader
        self.payloads = payloads
        self.quantization = quantization
        self.progress = progress
        self.used: set[str] = set()
        self.col_scales: dict[str, Tensor] = {}

    def load_into(self, model: nn.Module) -> None:
        compressed = [
            key.removesuffix(".payload") for key in self.reader.names() if key.endswith(".payload")
        ]
        shared = self.quantization.get("shared", {})
        for name in sorted(compressed, key=lambda name: name in shared):  # owners first
            self.replace(model, name, self.compressed_module(model, name))
        for name, owner in self.quantization.get("tied", {}).items():
            self.replace(model, name, self.tied_module(model, name, owner))
        self.load_float_tensors(model)
        unused = sorted(set(self.reader.names()) - self.used)
        if unused:
            raise FormatError(f"tensor {unused[0]!r}: the model has no place for it")

    def tensor(self, name: str) -> Tensor:
        """A verified copy."""
        self.use(name)
        self.reader.verify(name, self.progress)
        return self.reader.get(name).clone()

    def use(self, name: str) -> None:
        if name not in self.reader:
            raise FormatError(f"tensor {name!r}: expected in the checkpoint, found none")
        self.used.add(name)

    def payload(self, origin: Origin) -> Tensor:
        """A verified payload in weight memory, or where it lies in its file."""
        self.use(origin.name)
        return origin.load(self.progress) if self.payloads else origin.view()

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.reader else None

    def compressed_module(self, model: nn.Module, name: str) -> CompressedModule:
        origin = Origin(self.reader, f"{name}.payload")
        payload = self.payload(origin)
        try:
            found = payload_info(payload)["shape"]
            original = self.float_module(model, name)
            expected = tuple(original.weight.shape)
            if found != expected:
                raise FormatError(f"expected shape {expected}, found {found}")
            module = self.build(name, original, payload, self.tensor(f"{name}.row_scale"))
            module.come_from(origin, in_file=not self.payloads)
            return module
        except FormatError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"tensor {name + '.payload'!r}: {error}") from None

    def build(
        self, name: str, original: nn.Linear | nn.Embedding, payload: Tensor, row_scale: Tensor
    ) -> CompressedModule:
        col_scale = self.col_scale(name, payload_info(payload)["shape"][1])
        dtype = original.weight.dtype
        if isinstance(original, nn.Embedding):
            return DCEmbedding(payload, row_scale, col_scale, dtype, original.padding_idx)
        bias = None if original.bias is None else self.tensor(f"{name}.bias")
        activations = self.quantization.get("activations", {}).get(name, "int8")
        index = self.optional(f"{name}.outlier_index")
        outliers = None if index is None else (index, self.tensor(f"{name}.outlier_weight"))
        return DCLinear(payload, row_scale, col_scale, bias, activations, dtype, outliers)

    def col_scale(self, name: str, in_features: int) -> Tensor | None:
        """A layer's own, widened to float32, or the tensor of the layer that it shares it with."""
        owner = self.quantization.get("shared", {}).get(name)
        if owner is not None:
            if owner not in self.col_scales:
                raise FormatError(
                    f"config.json: shared: {name!r}: expected {owner!r} to have a col_scale, found none"
                )
            return self.col_scales[owner]
        stored = self.optional(f"{name}.col_scale")
        if stored is None:
            return None
        size = in_features if stored.shape == (1,) else stored.shape[0]
        self.col_scales[name] = stored.expand(size).float().contiguous()
        return self.col_scales[name]

    def tied_module(self, model: nn.Module, name: str, owner: str) -> CompressedModule:
        source = model.get_submodule(owner)
        if not isinstance(source, CompressedModule):
            raise FormatError(
                f"config.json: tied: expected {owner!r} to be compressed, found that it is not"
            )
        original = self.float_module(model, name)
        dtype, scales = original.weight.dtype, (source.row_scale, source.col_scale)
        module: CompressedModule
        if isinstance(original, nn.Embedding):
            module = DCEmbedding(source.payload, *scales, dtype, original.padding_idx)
        else:
            bias = None if original.bias is None else self.tensor(f"{name}.bias")
            activations = self.quantization.get("activations", {}).get(name, "int8")
            module = DCLinear(source.payload, *scales, bias, activations, dtype)
        if source.origin is not None:
            module.come_from(source.origin, in_file=source.is_in_file)
        return module

    def float_module(self, model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise FormatError(
                f"tensor {name + '.payload'!r}: expected a linear layer or embedding of that name in the model"
            )
        return module

    def replace(self, model: nn.Module, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)

    def load_float_tensors(self, model: nn.Module) -> None:
        """Everything that is not compressed: parameters on the meta device, and persistent buffers."""
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
