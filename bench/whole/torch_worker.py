"""Measures one model of dcext or torch in this process; prints the figures as JSON.

    python torch_worker.py JOB.json

A job has ``source``: ``{"shape", "integers", "codec", "dtype"}`` for a drawn model, ``{"folder"}`` for one of dcext,
``{"gguf", "dtype"}`` for a float one; what ``timing.speeds`` reads; ``compiled``: whether torch.compile makes the steps;
``evaluation``: token ids for perplexity, maybe none, in windows of ``context``; ``split``: whether to tell where the
time of a token goes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import unique_tensors
from watch import peak_rss_bytes, reset_peak_rss

import dcext
from dcext.compress import compressed_modules
from dcext.evaluate import perplexity
from whole.drawn import drawn_model
from whole.split import split_token
from whole.timing import speeds


class TorchEngine:
    """A transformers model with the cache that ``generate`` would give it.

    Steps that are compiled write into a cache of fixed length, so that every step has the same shapes.
    """

    def __init__(self, model: Any, static_length: int | None = None) -> None:
        """Args: static_length: tokens in the cache; compiles the steps. None for a cache that grows, uncompiled."""
        self.model = model
        self.static_length = static_length
        self.forward = model if static_length is None else torch.compile(model, fullgraph=True)
        self.cache: Any = None

    def set_threads(self, threads: int) -> None:
        """See ``timing.Engine``."""
        torch.set_num_threads(threads)
        dcext.set_num_threads(threads)

    def prefill(self, tokens: list[int]) -> int:
        """See ``timing.Engine``."""
        from transformers import DynamicCache, StaticCache

        self.cache = DynamicCache(config=self.model.config)
        if self.static_length is not None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.static_length)
        return self._next(self.model, torch.tensor([tokens]))

    def step(self, token: int) -> int:
        """See ``timing.Engine``."""
        return self._next(self.forward, torch.tensor([[token]]))

    def logits(self, forward: Any, ids: Tensor) -> Tensor:
        """Those of the last token, after ids (1, length) are appended to the sequence."""
        output = forward(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]

    def _next(self, forward: Any, ids: Tensor) -> int:
        return int(self.logits(forward, ids).argmax())


def load(source: dict[str, Any]) -> Any:
    """The model that a job names."""
    if "shape" in source:
        model = drawn_model(source["shape"], source["integers"], source["codec"])
        return model.to(getattr(torch, source["dtype"]))
    if "folder" in source:
        return dcext.from_pretrained(source["folder"])
    from dcext.hub import load_float_model

    return load_float_model(source["gguf"], source["dtype"])[0]


def num_weights(model: Any) -> int:
    """Weights of all layers and embeddings, those that modules share counted once."""
    compressed = {m.payload.data_ptr(): m.num_weights for m in compressed_modules(model).values()}
    floats = {p.data_ptr(): p.numel() for p in model.parameters()}
    return sum(compressed.values()) + sum(floats.values())


def digest(model: Any) -> str | None:
    """A hash of integers, scales and dtypes, the same whatever codec holds them; None for a float model."""
    hashed = xxhash.xxh3_64()
    modules = compressed_modules(model)
    for name, module in modules.items():
        hashed.update(f"{name} {module.dtype}".encode())
        hashed.update(module.decode_qweight().numpy().data)
        for key, buffer in module.named_buffers():
            if key != "payload":
                hashed.update(buffer.contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest() if modules else None


@torch.inference_mode()
def measure(job: dict[str, Any]) -> dict[str, Any]:
    """All figures of one row."""
    model = load(job["source"])
    length = len(job["prompt"]) + job["new_tokens"] + 1
    engine = TorchEngine(model, length if job["compiled"] else None)
    since_load = reset_peak_rss()
    row: dict[str, Any] = {"speeds": speeds(engine, job)}
    row["peak_rss_bytes"] = peak_rss_bytes()
    row["peak_rss_includes_loading"] = not since_load
    row["weights_nbytes"] = sum(t.nbytes for t in unique_tensors(model))
    row["num_weights"] = num_weights(model)
    row["digest"] = digest(model)
    if job["split"]:
        row["split"] = split_token(TorchEngine(model), TorchEngine, job)
    if job["evaluation"]:
        ids = torch.tensor(job["evaluation"])
        row["perplexity"] = perplexity(model, ids, context=job["context"]).perplexity
    return row


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({**measure(job), "patience_s": job["patience_s"]}))
