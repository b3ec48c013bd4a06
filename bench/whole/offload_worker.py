"""Measures one model that is larger than its memory, in this process; prints the figures as JSON.

    python offload_worker.py JOB.json

A job has ``folder``, a checkpoint; ``engine``: ``"memory"``, ``"stream"``, ``"synchronous"`` or ``"accelerate"``;
``host_nbytes``: bytes for weights, None with ``"memory"``; ``prompt``: as many token ids as the longest pass has;
``lengths``: tokens of a pass; ``prompt_length``: tokens read before one at a time are written; ``repeats``: passes of each
length; ``bandwidth_s``: seconds of each look at the disk; ``threads``; ``patience_s``, as for ``timing.speeds``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from watch import Watch, peak_rss_bytes, reset_peak_rss, wait_until_quiet

import dcext
from whole.disk import bytes_per_s, files_in, storage_nbytes
from whole.synchronous import make_synchronous
from whole.torch_worker import TorchEngine

LOOKS = 3  # at the disk, before and after
Statistics = dict[str, Any]


class HashingEngine(TorchEngine):
    """Remembers the logits of all passes as a hash of their bits."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.hash = xxhash.xxh3_64()

    def logits(self, forward: Any, ids: Tensor) -> Tensor:
        """See ``TorchEngine``."""
        logits = super().logits(forward, ids)
        self.hash.update(logits.float().numpy().data)
        return logits


def load(job: dict[str, Any]) -> tuple[Any, Callable[[], Statistics]]:
    """The model, and what it has streamed so far."""
    folder, engine = job["folder"], job["engine"]
    if engine == "accelerate":
        return offloaded_by_accelerate(folder, job["host_nbytes"]), dict
    if engine == "memory":
        return dcext.from_pretrained(folder), dict
    model = dcext.from_pretrained(folder, host_memory=job["host_nbytes"])
    if engine == "synchronous":
        return model, make_synchronous(model)
    return model, lambda: model.dcext_offload.statistics().to_dict()


def offloaded_by_accelerate(folder: str, host_nbytes: int) -> Any:
    """What its users get: modules that do not fit stay in the checkpoint's safetensors files, without a copy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": host_nbytes},
        offload_folder=str(Path(folder).with_suffix(".offload")),
    )
    if "disk" not in model.hf_device_map.values():
        raise RuntimeError(f"accelerate: expected modules on the disk, got {model.hf_device_map}")
    return model.eval()


def since(before: Statistics, after: Statistics) -> Statistics:
    """What was added between two; peaks, sizes and rates are not sums, and are those at the end."""
    sums = {
        key: after[key] - before[key]
        for key in after
        if key in before and not key.startswith(("peak", "slots", "overlap", "read_gbps"))
        and isinstance(after[key], (int, float))
    }  # fmt: skip
    return {**after, **sums}


@torch.inference_mode()
def passes(
    engine: HashingEngine, streamed: Callable[[], Statistics], job: dict[str, Any], length: int
) -> dict[str, Any]:
    """Figures of forward passes of ``length`` tokens: the first of a sequence, but where it is 1 those that follow."""

    def run(token: int) -> int:
        return engine.step(token) if length == 1 else engine.prefill(job["prompt"][:length])

    engine.hash.reset()
    token = engine.prefill(job["prompt"][: job["prompt_length"]]) if length == 1 else 0
    token = run(token)  # warm-up
    job["patience_s"] = wait_until_quiet(job["patience_s"])
    reset_peak_rss()
    machine, before, read = Watch(), streamed(), storage_nbytes()
    tokens, seconds = [token], []
    for _ in range(job["repeats"]):
        begin = time.perf_counter()
        tokens.append(run(tokens[-1]))
        seconds.append(time.perf_counter() - begin)
    return {
        "length": length,
        "tokens_per_s": length / statistics.median(seconds),
        "seconds": seconds,
        "storage_nbytes": (storage_nbytes() - read) // job["repeats"],
        "statistics": since(before, streamed()),
        "peak_rss_bytes": peak_rss_bytes(),
        "tokens": tokens,
        "logits_hash": engine.hash.hexdigest(),
        "others": machine.others(),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """All figures of one row."""
    torch.set_num_threads(job["threads"])
    dcext.set_num_threads(job["threads"])
    files = files_in(Path(job["folder"]))
    looks = [bytes_per_s(files, job["bandwidth_s"]) for _ in range(LOOKS)]
    begin = time.perf_counter()
    model, streamed = load(job)
    load_s = time.perf_counter() - begin
    engine = HashingEngine(model)
    # The same reads into the same memory without computing: where that lies is worth a third of a fast disk.
    same = [
        model.dcext_offload.stream.read_all() for _ in range(LOOKS * (job["engine"] == "stream"))
    ]
    measured = [passes(engine, streamed, job, length) for length in job["lengths"]]
    looks += [bytes_per_s(files, job["bandwidth_s"]) for _ in range(LOOKS)]
    return {
        "load_s": load_s,
        "disk_bytes_per_s": looks,
        "stream_bytes_per_s": same,
        "passes": measured,
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    measured = measure(job)
    print(json.dumps({**measured, "patience_s": job["patience_s"]}))
