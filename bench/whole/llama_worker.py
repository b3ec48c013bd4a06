"""Quantizes or measures one GGUF file with llama.cpp, in an environment of its own (see peers.py).

    python llama_worker.py JOB.json

Prints figures as JSON. A job with ``quantize`` has ``source``, ``target`` and the name of the ``type``; another one has
``source: {"gguf"}``, what ``timing.speeds`` reads, ``evaluation`` and ``context``, as in torch_worker.py. Everything
is llama.cpp's default but for one thing: weights are read into memory instead of mapped, so that resident memory is
what the model takes and not also what the system keeps of its file.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from watch import peak_rss_bytes, reset_peak_rss

from whole.timing import speeds

ERROR_LEVEL = 4


@llama.llama_log_callback
def log(level: int, text: bytes, data: Any) -> None:
    """Errors alone."""
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode())


class LlamaEngine:
    """A model and a context."""

    def __init__(self, path: str) -> None:
        """Args: path: a GGUF file."""
        parameters = llama.llama_model_default_params()
        parameters.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.context: Any = None

    def open(self, length: int) -> None:
        """Replaces the context by one for sequences of up to so many tokens, with buffers no larger than that needs."""
        if self.context is not None:
            llama.llama_free(self.context)
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        self.context = llama.llama_init_from_model(self.model, settings)

    def set_threads(self, threads: int) -> None:
        """See ``timing.Engine``."""
        llama.llama_set_n_threads(self.context, threads, threads)

    def prefill(self, tokens: list[int]) -> int:
        """See ``timing.Engine``."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        ids = (llama.llama_token * len(tokens))(*tokens)
        self._decode(llama.llama_batch_get_one(ids, len(tokens)))
        return int(self._logits(1).argmax())

    def step(self, token: int) -> int:
        """See ``timing.Engine``."""
        self._decode(llama.llama_batch_get_one((llama.llama_token * 1)(token), 1))
        return int(self._logits(1).argmax())

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        """Those after each token of a sequence, (tokens, vocabulary) float32."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        self._decode(batch)
        llama.llama_batch_free(batch)
        return self._logits(len(tokens))

    def _decode(self, batch: Any) -> None:
        code = llama.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: expected 0, got {code}")

    def _logits(self, rows: int) -> np.ndarray:
        data = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(data, (rows, self.vocabulary))


def perplexity(engine: LlamaEngine, ids: list[int], context: int) -> float:
    """As ``dcext.evaluate.perplexity``: windows that do not overlap, each token but the first predicted."""
    total, count = 0.0, 0
    for begin in range(0, len(ids) - 1, context):
        window = ids[begin : begin + context]
        logits = engine.all_logits(window)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        following = np.arange(len(logits)), window[1:]
        total += float((np.log(np.exp(logits).sum(axis=1)) - logits[following]).sum())
        count += len(logits)
    return float(np.exp(total / count))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """All figures of one row."""
    engine = LlamaEngine(job["source"]["gguf"])
    engine.open(len(job["prompt"]) + job["new_tokens"] + 1)
    since_load = reset_peak_rss()
    row = {
        "speeds": speeds(engine, job),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_includes_loading": not since_load,
        "weights_nbytes": llama.llama_model_size(engine.model),
        "num_weights": llama.llama_model_n_params(engine.model),
        "system": llama.llama_print_system_info().decode().strip(),
    }
    if job["evaluation"]:
        engine.open(job["context"])
        engine.set_threads(max(job["threads"]))
        row["perplexity"] = perplexity(engine, job["evaluation"], job["context"])
    return {**row, "patience_s": job["patience_s"]}


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Writes ``target``, which appears complete or not at all."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    parameters.allow_requantize = True
    parameters.nthread = job["threads"]
    part = f"{job['target']}.part"
    code = llama.llama_model_quantize(
        job["source"].encode(), part.encode(), ctypes.byref(parameters)
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize: expected 0, got {code}")
    os.replace(part, job["target"])
    return {}


def main() -> None:
    """Command line: see above."""
    llama.llama_log_set(log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(quantize(job) if job.get("quantize") else measure(job)))


if __name__ == "__main__":
    main()
