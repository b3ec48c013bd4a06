"""Float models by the names that people have for them: a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dcext.calibrate.source import BlockSource, ShardSource
from dcext.calibrate.stacks import find_blocks
from dcext.format import CheckpointReader
from dcext.format.manifest import MANIFEST_NAME

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_float_model(model: str | Path, dtype: str = "auto") -> tuple[nn.Module, Any]:
    """Loads a causal language model and its tokenizer with the ordinary transformers loader, on the CPU.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file, a folder with one such file, or a name on the hub.
        dtype: of its weights; ``"auto"`` for the one they are stored in (float32 for GGUF).

    Returns:
        Model in evaluation mode, and tokenizer.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a model.
        ValueError: a folder that dcext wrote: it is compressed already.
        OSError: a hub name that cannot be had; the message is transformers' own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, arguments = _locate(str(model))
    tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    if dtype != "auto" or "gguf_file" not in arguments:
        arguments["dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(source, **arguments).eval(), tokenizer


def load_lazy_model(folder: str | Path) -> tuple[nn.Module, Any, BlockSource]:
    """A model whose weights stay in its safetensors files until they are needed, for models larger than memory.

    Args:
        folder: a Hugging Face folder with safetensors files whose tensors have the names of the model's parameters.

    Returns:
        The model on the meta device, its tokenizer, and the source of its weights for ``compress_``.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors file in it.
        ValueError: a parameter that no file holds.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected config.json and safetensors files, found none")
    config = AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()  # meta parameters are made one by one and lose their ties
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    source = ShardSource(model, path, find_blocks(model))
    return model.eval(), AutoTokenizer.from_pretrained(path), source


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
