"""The quantization method ``dcext`` of transformers: its configuration and its quantizer.

Imported while transformers is: nothing here may need its models.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from dcext.compress import AFTER_COMPRESSION, compress_
from dcext.config import CompressionConfig
from dcext.errors import FormatError
from dcext.format import CheckpointReader
from dcext.format.manifest import MANIFEST_NAME
from dcext.loading import (
    QUANT_METHOD,
    REPORT_ATTRIBUTE,
    Loader,
    current_load_options,
    describe,
    forget_ties,
    stored_report,
)
from dcext.nn.compressed import compressed_modules
from dcext.nn.convert import decompress_module_
from dcext.nn.placement import place
from dcext.quantize.recipe import recipe_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DCConfig(QuantizationConfigMixin):
    """How a model is compressed while transformers loads it, or was when it was stored.

    ``AutoModelForCausalLM.from_pretrained(FLOAT, quantization_config=dcext.DCConfig(recipe="data-free"))`` loads the
    float model, then compresses it. A folder that dcext wrote has its own configuration, and needs none.
    """

    def __init__(
        self,
        *,
        calibration: Tensor | None = None,
        include: str | None = None,
        exclude: str | None = None,
        **choices: Any,
    ) -> None:
        """Takes the choices of ``dcext.CompressionConfig``, and what ``dcext.compress_`` is given beside it.

        Args:
            calibration: for recipes ``rate`` and ``paper``.
            include: a regular expression, see ``dcext.compress_``.
            exclude: a regular expression, see ``dcext.compress_``.
            choices: fields of ``CompressionConfig``; ``recipe`` is ``"data-free"`` unless told otherwise, or ``"rate"`` with
                calibration.

        Raises:
            TypeError, ValueError: a choice that does not exist.
        """
        self.quant_method: Any = QUANT_METHOD
        choices.setdefault("recipe", "data-free" if calibration is None else "rate")
        self.compression: CompressionConfig | None = CompressionConfig(**choices)
        self.calibration = calibration
        self.include = include
        self.exclude = exclude
        self.stored: dict[str, Any] = {}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From ``quantization_config`` of a ``config.json``, or from the arguments of ``__init__``."""
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if "format_version" in values:
            config = cls()
            config.stored = {"quant_method": QUANT_METHOD, **values}
            how = values.get("config") or {}
            # Weights load without their recipe, which may be somebody else's; ``stored`` names it.
            is_known = how.get("recipe") in recipe_names()
            config.compression = CompressionConfig(**how) if is_known else None
        else:
            config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` stores: of a compressed model, how it is stored; before, the choices."""
        if self.stored:
            return dict(self.stored)
        choices = {} if self.compression is None else self.compression.to_dict()
        patterns = {"include": self.include, "exclude": self.exclude}
        return {"quant_method": QUANT_METHOD, **choices, **patterns}


class DCQuantizer(HfQuantizer):
    """Loads payloads as they are stored, each byte verified, into a skeleton; or compresses a float model."""

    requires_calibration = False
    quantization_config: DCConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what dcext does otherwise.

        Raises:
            ValueError: a device map with ``"disk"``.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map: expected devices, got 'disk': dcext reads what does not fit from its own files, with "
                "dcext.from_pretrained(.., host_memory=..)"
            )

    # Before the files are looked for, transformers of 5.24 calls the first of these, older ones the second.
    def update_attn_implementation(self, config: Any) -> Any:
        """Names the files of our checkpoints, which are not those that transformers looks for by itself."""
        return self._name_files(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Names the files, where transformers has no ``update_attn_implementation``."""
        return self._name_files(config)

    def update_ep_plan(self, config: Any) -> Any:
        """Changes nothing."""
        return config

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Changes nothing."""

    def _name_files(self, config: Any) -> Any:
        if self.pre_quantized and getattr(config, "transformers_weights", None) is None:
            config.transformers_weights = self.quantization_config.stored.get("weights")
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        options = current_load_options()
        reader = options.reader
        if reader is None:
            reader = CheckpointReader(_folder(checkpoint_files, model.config), partial=True)
        loader = Loader(
            reader,
            self.quantization_config.stored,
            options.progress,
            in_files=options.in_files,
            rename=functools.partial(_name_in, model),
        )
        with torch.device("cpu"):  # transformers makes what is made meanwhile on the meta device
            used = loader.load_compressed(model)
        self._report = stored_report(reader)
        for name in set(reader.names()) - used:  # transformers reads these, and knows no checksums
            reader.verify(name, options.progress)
        forget_ties(model)
        for module in compressed_modules(model).values():
            module.is_hidden = True
        self._known_unexpected = known = model._keys_to_ignore_on_load_unexpected or set()
        names = "|".join(re_escape(name) for name in sorted(used))
        model._keys_to_ignore_on_load_unexpected = {*known, f"^(?:{names})$"}

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """None: a checkpoint of ours has the names of the model's own modules."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return self._compress(model)
        for module in compressed_modules(model).values():
            module.is_hidden = False
        model.is_quantized = False  # else .half() and .float() are refused
        model.config.__dict__.pop("transformers_weights", None)
        model._keys_to_ignore_on_load_unexpected = self._known_unexpected
        model._weight_conversions = []
        if self._report is not None:
            setattr(model, REPORT_ATTRIBUTE, self._report)
        self._place(model)
        return model

    def _place(self, model: Any) -> None:
        device_map = getattr(model, "hf_device_map", None) or {}
        others = {str(device) for device in device_map.values()} - {"cpu"}
        if not others:
            return
        if len(set(map(str, device_map.values()))) == 1:
            place(model, torch.device(others.pop()))
            return
        for name, module in compressed_modules(model).items():
            owner = max((key for key in device_map if name.startswith(key)), key=len, default="")
            module.to(device_map[owner])

    def _compress(self, model: Any) -> Any:
        config = self.quantization_config
        assert config.compression is not None
        compress_(
            model,
            config.compression,
            config.calibration,
            include=config.include,
            exclude=config.exclude,
        )
        model.is_quantized = False
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """For ``model.dequantize()``: float layers again, with the weights that were stood for; tied ones are shared."""
        weights: dict[tuple[int, torch.Size], torch.nn.Parameter] = {}
        for module in compressed_modules(model).values():
            key = (id(module.payload), module.weight.shape)
            decompress_module_(module, weights.get(key))
            weights[key] = cast(torch.nn.Parameter, module.weight)
        if dtype is not None:
            model.to(dtype)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top of compressed layers, which stay frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Always."""
        return True


def re_escape(name: str) -> str:
    """A name as a regular expression; names of tensors have no other special characters than dots."""
    return name.replace(".", r"\.")


def _folder(checkpoint_files: list[str] | None, config: Any) -> Path:
    if not checkpoint_files:
        raise FormatError("expected the files of a dcext checkpoint, found none")
    folder = Path(checkpoint_files[0]).parent
    if not (
        folder / MANIFEST_NAME
    ).is_file():  # a folder of the hub's cache holds what was asked for
        commit = getattr(config, "_commit_hash", None)
        cached_file(config.name_or_path, MANIFEST_NAME, _commit_hash=commit)
    return folder


def _name_in(model: PreTrainedModel, name: str) -> str | None:
    """The name that a module of the checkpoint has in a model, which may be its base model or have it as such."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def mark_compressed(model: Any, config: CompressionConfig) -> None:
    """Gives a model of transformers that was compressed what one that was loaded has; others stay as they are."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    stored = DCConfig()
    stored.compression = config
    stored.stored = describe(model, config.to_dict())
    model.hf_quantizer = DCQuantizer(stored, pre_quantized=True)
    model.config.quantization_config = stored
    model._weight_conversions = []
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "base_model_prefix"):
            module.config._is_quantized = True


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(DCConfig)
    register_quantizer(QUANT_METHOD)(DCQuantizer)
    AFTER_COMPRESSION.append(mark_compressed)
