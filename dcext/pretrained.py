"""Compressed Hugging Face models on disk: saved as a folder, loaded back without the float weights."""

from __future__ import annotations

import json
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcext.checks import check_model, check_type, require, shown, torch_dtype
from dcext.config import CompressionConfig
from dcext.errors import FormatError
from dcext.format import CheckpointReader, write_checkpoint
from dcext.format.manifest import parse_json_object
from dcext.format.writer import weights_file
from dcext.loading import (
    QUANT_METHOD,
    REPORT_ATTRIBUTE,
    REPORT_NAME,
    LoadOptions,
    describe,
    load_options,
    stored_tensors,
)
from dcext.nn.compressed import CompressedModule, compressed_modules
from dcext.nn.placement import place
from dcext.offloading.apply import apply
from dcext.offloading.arguments import check_placement
from dcext.offloading.offload import offload
from dcext.policy.plan import Plan
from dcext.quantize.report import CompressionReport
from dcext.sizes import parse_nbytes

# Of a float tensor that becomes three: headers, hashes, its row in the report.
SIDE_NBYTES_PER_TENSOR = 600
# transformers makes a model while torch's default dtype and its initializers are replaced, for all threads.
_LOADING = threading.RLock()


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    config: CompressionConfig | None = None,
    max_shard_nbytes: int | str = 5_000_000_000,
    overwrite: bool = False,
    beside: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a compressed transformers model: all of it or nothing (see ``dcext.format.write_checkpoint``).

    Args:
        model: a ``PreTrainedModel`` that went through ``compress_``.
        directory: the target; missing or empty, or with ``overwrite`` an earlier checkpoint.
        tokenizer: a transformers tokenizer or processor to store beside it, or None.
        config: recorded in ``config.json`` for those who ask how the model was made; None for what its report says.
        max_shard_nbytes: a shard is closed before it passes this size, bytes or ``"5GB"``.
        overwrite: whether an earlier checkpoint may be replaced. Files beside it that are not part of it are kept.
        beside: whether the target may hold other files, which are kept, such as those of a tokenizer.
        progress: called with the number of bytes written since the last call.

    Raises:
        TypeError: an argument is of another kind, such as a name in place of what it names.
        ValueError: ``model`` has no transformers config, or nothing in it is compressed.
        FileExistsError: the target holds something else.
    """
    check_model("save_pretrained", model)
    if not hasattr(tokenizer, "save_pretrained") and tokenizer is not None:
        raise TypeError(
            f"save_pretrained: tokenizer: expected a tokenizer that is loaded, or None, got {shown(tokenizer)}"
        )
    check_type("save_pretrained: config", config, (CompressionConfig, type(None)))
    modules = compressed_modules(model)
    if not hasattr(getattr(model, "config", None), "save_pretrained") or not modules:
        raise ValueError(
            "save_pretrained: model: expected a compressed transformers model, got "
            f"{type(model).__name__} with {len(modules)} compressed modules"
        )
    max_shard_nbytes = parse_nbytes("max_shard_nbytes", max_shard_nbytes)
    report = getattr(model, REPORT_ATTRIBUTE, None)
    how = _how(model, report) if config is None else config.to_dict()
    files = _side_files(model, tokenizer)
    model_config = json.loads(files["config.json"])
    model_config["architectures"] = [type(model).__name__]
    dtype = str(_dtype(modules)).removeprefix("torch.")
    model_config["dtype"] = dtype
    _fill_dtypes(model_config, dtype)
    tensors = stored_tensors(model)
    model_config["quantization_config"] = {
        **describe(model, how),
        "weights": weights_file(tensors, max_shard_nbytes),
    }
    model_config.pop("transformers_weights", None)
    files["config.json"] = (json.dumps(model_config, indent=2, sort_keys=True) + "\n").encode()
    if isinstance(report, CompressionReport):
        files[REPORT_NAME] = (json.dumps(report.to_dict(), indent=1) + "\n").encode()
    write_checkpoint(
        directory,
        tensors,
        files,
        max_shard_nbytes=max_shard_nbytes,
        overwrite=overwrite,
        beside=beside,
        progress=progress,
    )


def _how(model: Any, report: Any) -> dict[str, Any] | None:
    """The settings that a model was compressed with, as its report or the checkpoint that it comes from has them."""
    if isinstance(report, CompressionReport) and report.config is not None:
        return report.config
    return getattr(getattr(model.config, "quantization_config", None), "stored", {}).get("config")


def _dtype(modules: Mapping[str, CompressedModule]) -> torch.dtype:
    """What most compressed layers compute in."""
    dtypes = [module.dtype for module in modules.values()]
    return max(set(dtypes), key=dtypes.count)


def _fill_dtypes(config: dict[str, Any], dtype: str) -> None:
    """Gives configurations within a configuration the dtype that transformers would give them when it loads them."""
    for inner in config.values():
        if isinstance(inner, dict):
            if "model_type" in inner or "dtype" in inner:
                inner["dtype"] = inner.get("dtype") or dtype
            _fill_dtypes(inner, dtype)


def save_for_transformers(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> None:
    """``PreTrainedModel.save_pretrained`` of a compressed model: an earlier checkpoint of dcext is replaced, other files stay.

    Args:
        model: a ``PreTrainedModel``.
        save_directory: the folder.
        is_main_process: only this one writes.
        state_dict: not stored, the model's own tensors are; names that the model does not have are an error.
        push_to_hub: whether to upload the folder afterwards.
        max_shard_size: bytes, or ``"5GB"``.
        kwargs: of ``push_to_hub``; ``safe_serialization`` and ``save_peft_format`` do nothing here.

    Raises:
        FileExistsError: the folder holds another model, or is the current one.
        ValueError: ``variant`` or ``distributed_checkpoint``, which a checkpoint of dcext does not have.
    """
    for option in ("variant", "distributed_checkpoint"):
        if kwargs.pop(option, None):
            raise ValueError(
                f"save_pretrained: {option}: expected none for a compressed model, got one"
            )
    for option in ("safe_serialization", "save_peft_format", "save_original_format"):
        kwargs.pop(option, None)
    if state_dict is not None and not set(state_dict) <= set(model.state_dict()):
        unknown = sorted(set(state_dict) - set(model.state_dict()))[0]
        raise ValueError(
            f"save_pretrained: state_dict: expected names of the compressed model, got {unknown!r}"
        )
    if not is_main_process:
        return
    directory = Path(save_directory)
    nbytes = (
        max_shard_size
        if isinstance(max_shard_size, int)
        else parse_nbytes("max_shard_size", max_shard_size)
    )
    save_pretrained(model, directory, max_shard_nbytes=nbytes, overwrite=True, beside=True)
    if push_to_hub:
        from huggingface_hub import create_repo

        token = kwargs.pop("token", None)
        message, create_pr = kwargs.pop("commit_message", None), kwargs.pop("create_pr", False)
        repo_id = create_repo(
            kwargs.pop("repo_id", directory.name), exist_ok=True, token=token, **kwargs
        ).repo_id
        model._upload_modified_files(
            str(directory),
            repo_id,
            {},  # all files are new
            commit_message=message,
            token=token,
            create_pr=create_pr,
        )


def from_pretrained(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    device: torch.device | str = "cpu",
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    mode: str = "auto",
    page_cache: bool = False,
    plan: Plan | None = None,
    progress: Callable[[int], None] | None = None,
    model_class: type | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads a model that ``save_pretrained`` wrote, every byte of it verified, without ever holding its float weights.

    A tokenizer beside it may have been edited or saved anew: ``dcext verify`` and who reads it through dcext tell.

    The loader is transformers' own, with the quantizer of ``dcext.integrations.hf``; any number of threads may load.

    With ``host_memory``, weights that do not fit there stay in the files and are read while the model runs, ahead of
    their use; they are verified whenever they are used. With ``device_memory``, decoder blocks that do not fit on the
    device wait in host memory and are copied ahead of their use. See ``dcext.offload``.

    Args:
        directory: the folder, or a name on the Hugging Face hub.
        dtype: what to compute in, such as ``torch.bfloat16`` or ``"bfloat16"``; None for the dtype of the model that was
            compressed.
        device: where the weights are resident, compressed, and the model runs (``dcext.nn.place``).
        host_memory: bytes for weights, or a size such as ``"4GiB"``; None for as much as they need.
        device_memory: the same on the device.
        mode: with ``device_memory``, how weights are copied there: ``"auto"``, ``"device"``, ``"host"`` or ``"raw"``.
        plan: where each layer is to be, from ``dcext.plan``, instead of the budgets; for the CPU or for ``device``.
        page_cache: with ``host_memory`` on the CPU, whether the system may also keep files in memory that is not counted.
        progress: called with the number of bytes loaded since the last call.
        model_class: the model's class, or an ``AutoModel..`` of transformers; None for the one that was saved.
        revision: of a name on the hub.
        kwargs: for ``from_pretrained`` of transformers, such as ``attn_implementation`` or ``trust_remote_code``.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        OSError: a hub name that cannot be had.
        RuntimeError: as ``dcext.nn.place``.
        TypeError: an argument is of another kind, such as a dtype in place of a device.
        ValueError: a budget is too small: by how much; or there is one that the device does not have.
        FileNotFoundError, NotADirectoryError: no such folder.
        FormatError: not a dcext checkpoint, or one that is damaged: file and tensor, expected and found.
    """
    check_type(
        "from_pretrained: directory", directory, (str, Path), "a folder or a name on the hub"
    )
    dtype = torch_dtype("from_pretrained: dtype", dtype)
    require("transformers", "hf")
    check_placement(device, plan, host_memory, device_memory, mode)
    has_budget = host_memory is not None or device_memory is not None
    reader = CheckpointReader(_local_folder(directory, revision))
    report = progress or (lambda nbytes: None)
    model = _load(reader, model_class, dtype, has_budget or plan is not None, report, kwargs)
    if plan is not None:
        apply(model, plan, device=device)
    elif has_budget:
        offload(
            model,
            host_memory=host_memory,
            device_memory=device_memory,
            device=device,
            mode=mode,
            page_cache=page_cache,
            progress=progress,
        )
    else:
        place(model, device)
    return model


def _local_folder(directory: str | Path, revision: str | None) -> Path:
    """A folder as it is; a name on the hub as the folder that it was downloaded to."""
    path = Path(directory).expanduser()
    name = str(directory)
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return path
    if name.count("/") == 0 and revision is None:
        return path  # more likely a folder that is missing
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name}: expected a folder or a name on the hub, found no folder, and no such name that can be had: {reason}"
        ) from error


def _load(
    reader: CheckpointReader,
    model_class: Any,
    dtype: torch.dtype | None,
    in_files: bool,
    progress: Callable[[int], None],
    kwargs: dict[str, Any],
) -> nn.Module:
    if "config.json" not in reader.file_names:
        raise FormatError(
            f"{reader.directory}: expected config.json in the manifest, found {reader.file_names}"
        )
    config = parse_json_object(reader.read_file("config.json"), "config.json")
    if "generation_config.json" in reader.file_names:
        # transformers reads it too, and knows no checksums.
        reader.read_file("generation_config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{reader.directory}: config.json: quantization_config: expected quant_method {QUANT_METHOD!r}"
        )
    chosen = model_class or _saved_class(reader.directory, config, kwargs)
    with _LOADING, load_options(LoadOptions(in_files, progress, reader)):
        model, loading = chosen.from_pretrained(
            str(reader.directory),
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **kwargs,
        )
    if model_class is None:
        _check_complete(reader, loading)
    return model


def _check_complete(reader: CheckpointReader, loading: Mapping[str, Any]) -> None:
    """Raises ``FormatError`` where the checkpoint and the model do not have the same tensors."""
    for key, found in (
        ("missing_keys", "expected in the checkpoint, found none"),
        ("unexpected_keys", "the model has no place for it"),
        ("mismatched_keys", "expected another shape"),
    ):
        names = sorted(str(name) for name in loading.get(key) or ())
        if names:
            raise FormatError(f"{reader.directory}: tensor {names[0]!r}: {found}")


def _saved_class(directory: Path, config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """The class of the model that was saved; of remote code the automatic class that finds it."""
    import transformers

    architectures = config.get("architectures") or [None]
    found = getattr(transformers, str(architectures[0]), None)
    if found is not None:
        return found
    automatic = [key for key in config.get("auto_map") or () if key.startswith("AutoModel")]
    if automatic and kwargs.get("trust_remote_code"):
        return getattr(transformers, automatic[0])
    hint = "pass trust_remote_code=True" if automatic else "pass its class as model_class"
    raise FormatError(
        f"{directory}: config.json: architectures: expected one of transformers', found {architectures}; {hint}"
    )


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
        if getattr(model, "is_remote_code", bool)():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=model.config)
            model.config.save_pretrained(folder)  # with the auto_map that this sets
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        found = sorted(Path(folder).iterdir())
        left = [path.name for path in found if not path.is_file()]
        if left:
            warnings.warn(f"save_pretrained: expected files, found folders: {left}", stacklevel=3)
        return {path.name: path.read_bytes() for path in found if path.is_file()}
