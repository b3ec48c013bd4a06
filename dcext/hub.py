"""Float models by the names that people have for them: a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from dcext.calibrate.source import BlockSource, ShardSource
from dcext.calibrate.stacks import find_blocks
from dcext.checks import require
from dcext.format import CheckpointReader
from dcext.format.manifest import MANIFEST_NAME

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_TIMEOUT_S = 10.0


def load_float_model(
    model: str | Path, dtype: str = "auto", *, needs_tokenizer: bool = True
) -> tuple[nn.Module, Any]:
    """Loads a model and its tokenizer with the ordinary transformers loader, on the CPU.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file, a folder with one such file, or a name on the hub.
        dtype: of its weights; ``"auto"`` for the one they are stored in (float32 for GGUF).
        needs_tokenizer: whether a tokenizer that cannot be loaded is an error; else ``StoredFiles`` or None stands for it.

    Returns:
        Model in evaluation mode, of the class that was saved (``architectures``), and tokenizer or processor.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a model.
        ImportError: the tokenizer needs a package that is not installed.
        ValueError: a folder that dcext wrote: it is compressed already; or weights that are damaged.
        OSError: a hub name that cannot be had: name and reason.
    """
    require("transformers", "hf")
    from safetensors import SafetensorError
    from transformers import AutoConfig

    source, arguments = _locate(str(model))
    if not Path(source).exists():
        _check_name(source)
    config = AutoConfig.from_pretrained(source, **arguments)
    tokenizer = load_processor(source, needed=needs_tokenizer, **arguments)
    if dtype != "auto" or "gguf_file" not in arguments:
        arguments["dtype"] = dtype
    try:
        loaded = _class_of(config).from_pretrained(source, **arguments)
    except SafetensorError as error:  # a plain Exception that names no file
        raise ValueError(
            f"{source}: weights: expected whole safetensors files, got one that cannot be read: {error}"
        ) from None
    return loaded.eval(), tokenizer


def _check_name(name: str) -> None:
    """Asks the hub once whether it has a model, unless it is in the cache: transformers asks for half a minute.

    Raises:
        OSError: the hub has none, or cannot be reached: name and reason.
    """
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        if try_to_load_from_cache(name, "config.json") is None:
            model_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # of the HTTP library, which depends on the hub library's version
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name}: expected a model folder, a .gguf file or a name on the hub, found no such file, and no such name "
            f"that can be had: {reason}"
        ) from error


def _class_of(config: Any) -> Any:
    """The class that a model was saved as; a causal language model where transformers does not have it."""
    import transformers

    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM


class StoredFiles:
    """Files of a tokenizer or processor that could not be loaded, to be stored as they are."""

    def __init__(self, folder: Path, reason: str) -> None:
        """Args: reason: why it could not be loaded, for people."""
        self.reason = reason
        self._paths = [
            path
            for pattern in _TOKENIZER_FILES
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the files."""
        for path in self._paths:
            shutil.copyfile(path, Path(folder) / path.name)


_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)


def load_processor(source: str, *, needed: bool, **arguments: Any) -> Any:
    """The processor of a model, or its tokenizer, or what else prepares its inputs.

    Args:
        source: as for ``from_pretrained`` of transformers.
        needed: whether there has to be one.
        arguments: for ``from_pretrained``.

    Returns:
        What transformers loads; ``StoredFiles`` of a folder, or None, where it is not needed and cannot be loaded.

    Raises:
        ImportError: needed, and a package that it takes is not installed: which.
        ValueError: needed, and there is none that can be loaded: the first line of why.
    """
    from transformers import AutoProcessor, AutoTokenizer

    kinds = (AutoTokenizer,) if "gguf_file" in arguments else (AutoProcessor, AutoTokenizer)
    reason = ""
    for kind in kinds:
        try:
            return kind.from_pretrained(source, **arguments)
        except (ImportError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
    missing = [name for name in ("sentencepiece", "tiktoken") if _is_missing(name)]
    folder = Path(source)
    uses = any(folder.glob("*.model")) or any(folder.glob("*.spm")) or "sentencepiece" in reason
    if uses and "sentencepiece" in missing:
        reason = "it needs a package that is not installed: pip install sentencepiece"
        if needed:
            raise ImportError(f"{source}: tokenizer: expected one that can be loaded, but {reason}")
    if needed:
        raise ValueError(
            f"{source}: tokenizer: expected one that can be loaded, found none: {reason}"
        )
    return StoredFiles(folder, reason) if folder.is_dir() else None


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def load_lazy_model(
    folder: str | Path, *, needs_tokenizer: bool = True
) -> tuple[nn.Module, Any, BlockSource]:
    """A model whose weights stay in its safetensors files until they are needed, for models larger than memory.

    Args:
        folder: a Hugging Face folder with safetensors files whose tensors have the names of the model's parameters.
        needs_tokenizer: as for ``load_float_model``.

    Returns:
        The model on the meta device, its tokenizer, and the source of its weights for ``compress_``.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors file in it.
        ValueError: a parameter that no file holds.
    """
    for package in ("transformers", "accelerate"):
        require(package, "hf")
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected config.json and safetensors files, found none")
    config = AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = _class_of(config)._from_config(config, dtype=config.dtype)
    model.tie_weights()  # meta parameters are made one by one and lose their ties
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    source = ShardSource(model, path, find_blocks(model))
    return model.eval(), load_processor(str(path), needed=needs_tokenizer), source


def weights_nbytes(folder: str | Path) -> int:
    """Bytes of the safetensors files of a folder; 0 where there are none."""
    path = Path(folder).expanduser()
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer stored in a checkpoint, its files verified.

    Raises:
        FileNotFoundError: the checkpoint has none.
        FormatError: one of its files is not what was written.
    """
    from transformers import AutoTokenizer

    if "tokenizer_config.json" not in CheckpointReader(folder).read_files():
        raise FileNotFoundError(
            f"{folder}: expected a tokenizer (tokenizer_config.json), found none"
        )
    return AutoTokenizer.from_pretrained(str(folder))


def _locate(model: str) -> tuple[str, dict[str, Any]]:
    """The first argument of ``from_pretrained``, and the others."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / MANIFEST_NAME).is_file():
            raise ValueError(
                f"{path}: expected a float model, found one that dcext compressed already"
            )
        if (path / "config.json").is_file():
            return str(path), {}
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), {"gguf_file": files[0].name}
        found = f"{len(files)} .gguf files" if files else "neither"
        raise FileNotFoundError(f"{path}: expected config.json or one .gguf file, found {found}")
    if (
        path.exists()
        or model.count("/") > 1
        or model.startswith((".", "/", "~"))
        or model.endswith(".gguf")
    ):
        found = "a file of another kind" if path.exists() else "nothing there"
        raise FileNotFoundError(f"{model}: expected a model folder or a .gguf file, found {found}")
    return model, {}
