"""GGUF files for llama.cpp, and the environment that it lives in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from environments import Environment, run_job

from whole.drawn import SHAPES, WEIGHT_STD

# Built from source for the CPU at hand, as its users are told to: a quarter of an hour on two cores.
ENVIRONMENT = Environment(
    ".venv-llama",
    ("llama-cpp-python==0.3.36",),
    {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"},
)
WORKER = Path(__file__).with_name("llama_worker.py")
BLOCK = np.dtype([("scale", "<f2"), ("q", "i1", 32)])  # Q8_0
SIGMA = 42.0  # of its integers: the largest of 32 is then about 127
POOL_BLOCKS = 1 << 19


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What the worker makes of a job."""
    return run_job(ENVIRONMENT.python, WORKER, job)


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Lets llama.cpp quantize a file to a type such as ``"Q4_K_M"``; one that is quantized already loses twice."""
    files = {"source": str(source), "target": str(target)}
    run({"quantize": True, **files, "type": kind, "threads": threads})


def write_drawn(target: Path, shape: str) -> None:
    """Writes a Llama of drawn weights as Q8_0, tied and without a tokenizer; it appears complete or not at all."""
    from gguf import GGMLQuantizationType, GGUFWriter

    part = target.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    _add_settings(writer, SHAPES[shape])
    shapes = _shapes(SHAPES[shape])
    for name, (rows, cols) in shapes.items():
        if rows == 1:  # a norm
            writer.add_tensor_info(name, [cols], np.dtype(np.float32), 4 * cols)
        else:
            nbytes = rows * cols // 32 * BLOCK.itemsize
            stored = [rows, cols // 32 * BLOCK.itemsize]
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pool = _pool(rng)
    for rows, cols in shapes.values():
        data = np.ones(cols, np.float32) if rows == 1 else _take(pool, rows * cols // 32, rng)
        writer.write_tensor_data(data)
    writer.close()
    part.rename(target)


def _add_settings(writer: Any, shape: dict[str, Any]) -> None:
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _shapes(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each tensor by llama.cpp's name; norms have one row."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = (shape[f"num_{k}_heads"] * shape["head_dim"] for k in ("attention", "key_value"))
    block = {
        "attn_norm": (1, hidden),
        "attn_q": (heads, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, heads),
        "ffn_norm": (1, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    tensors = {
        "token_embd.weight": (shape["vocab_size"], hidden),
        "output_norm.weight": (1, hidden),
    }
    for i in range(shape["num_hidden_layers"]):
        tensors |= {f"blk.{i}.{name}.weight": size for name, size in block.items()}
    return tensors


def _pool(rng: np.random.Generator) -> np.ndarray:
    pool = np.empty(POOL_BLOCKS, BLOCK)
    pool["scale"] = WEIGHT_STD / SIGMA
    pool["q"] = np.clip(rng.normal(0, SIGMA, (POOL_BLOCKS, 32)).round(), -127, 127)
    return pool


def _take(pool: np.ndarray, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """So many blocks from the pool, in pieces at random offsets, as bytes."""
    out, piece = np.empty(blocks, BLOCK), POOL_BLOCKS // 2
    for begin in range(0, blocks, piece):
        size = min(piece, blocks - begin)
        offset = int(rng.integers(POOL_BLOCKS - size + 1))
        out[begin : begin + size] = pool[offset : offset + size]
    return out.view(np.uint8)
