"""How fast does a model whose weights rest on a GPU write and read, in how much memory, for each tier?

    python bench/gpu/model.py [--output FILE.json] [--seconds S] [--smoke]

A Llama of drawn weights, at batch 1: one token at a time after a prompt of 512, with a cache of fixed length, launch by
launch and as a CUDA graph; and reading that prompt. Times are those of a user who waits for each token. Resident memory
is what the model takes, peak what it takes at most while it reads and writes, cache and activations included. Rows of
equal integers must write equal tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    DEVICE,
    Report,
    Settings,
    not_measured,
    numbers_table,
    start,
    synchronize,
    was_measured,
)
from rich.table import Table
from torch import Tensor
from whole.drawn import POOL_SIZE, SHAPES, drawn_model

from dcext.nn.compressed import CompressedModule
from dcext.nn.placement import batch_decodes, raise_if_damaged

BIG, SMALL, SMOKE = "Llama 3B", "Llama 1B", "tiniest"
BIG_NEEDS_BYTES = 12 << 30  # of the device: its bfloat16 weights, cache and room
WARM_UP_TOKENS = 3  # before a graph is captured
PREFILLS = 5


@dataclass(frozen=True)
class Tier:
    """How weights rest.

    Attributes:
        name: of the row.
        codec: None for plain bfloat16.
        integers: as for ``drawn_model``.
        together: whether a block's matrices are decoded in one launch.
    """

    name: str
    codec: str | None
    integers: str = "normal"
    together: bool = False


TIERS = (
    Tier("bfloat16", None),
    Tier("device/raw", "raw"),
    Tier("device/zstd", "zstd"),
    Tier("device/zstd, blocks together", "zstd", together=True),
    Tier("device/packed", "packed", "levels"),
    Tier("device/raw, integers of packed", "raw", "levels"),
)


@dataclass(frozen=True)
class Sizes:
    """Tokens."""

    prompt: int = 512
    new: int = 64


def load(tier: Tier, shape: str) -> Any:
    """The model on the device."""
    pool_size = 1 << 16 if shape == SMOKE else POOL_SIZE
    model = drawn_model(shape, tier.integers, tier.codec, pool_size)
    if DEVICE.type == "cuda":
        model = model.to(DEVICE)
    else:  # as on a GPU, in Triton's interpreter, which truncates to bfloat16
        model = model.float()
        for module in model.modules():
            if isinstance(module, CompressedModule):
                module._move_to(DEVICE)
    if tier.together:
        for block in model.model.layers:
            batch_decodes(block)
    return model


class Writer:
    """Greedy generation with a cache of fixed length; the token stays on the device.

    Attributes:
        token: ``(1, 1)`` int64, the last one.
    """

    def __init__(self, model: Any, prompt: Tensor, length: int) -> None:
        """Args: prompt: ``(1, n)`` int64. length: tokens that the cache holds."""
        from transformers import StaticCache

        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)

    def read(self) -> None:
        """Begins anew with the prompt."""
        if self.cache.is_initialized:
            self.cache.reset()
        self._next(self.prompt)

    def step(self) -> None:
        """Writes a token."""
        self._next(self.token)

    def _next(self, ids: Tensor) -> None:
        output = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.token.copy_(output.logits[:, -1:].argmax(-1))


def waited_ms(function: Callable[[], None]) -> float:
    """Milliseconds until the device is done."""
    begin = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


def summary(times_ms: list[float], tokens: int) -> dict[str, Any]:
    """Median, percentiles and tokens/s."""
    cut = statistics.quantiles(times_ms, n=5) if len(times_ms) > 1 else [times_ms[0]] * 4
    median_ms = statistics.median(times_ms)
    return {
        "median_ms": median_ms,
        "p20_ms": cut[0],
        "p80_ms": cut[-1],
        "tokens_per_s": 1e3 * tokens / median_ms,
    }


def written(writer: Writer, step: Callable[[], None], count: int) -> dict[str, Any]:
    """Tokens after the prompt, and the time that each but the first took."""
    writer.read()
    synchronize()
    tokens, times_ms = [int(writer.token)], []
    for _ in range(count):
        times_ms.append(waited_ms(step))
        tokens.append(int(writer.token))
    return {**summary(times_ms, 1), "tokens": tokens}


def captured_step(writer: Writer) -> Callable[[], None]:
    """``writer.step`` as a CUDA graph, to be replayed after ``writer.read``."""
    writer.read()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_TOKENS):
            writer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        writer.step()
    return graph.replay


def allocated() -> int:
    """Bytes of tensors on the device; 0 on the CPU."""
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def reset_peak() -> None:
    """Lets the peak begin anew."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def release() -> None:
    """Gives the memory of dropped models back."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def measure(report: Report, tier: Tier, shape: str, sizes: Sizes) -> None:
    """One row."""
    release()
    before = allocated()
    begin = time.perf_counter()
    model = load(tier, shape)
    synchronize()
    report.add(
        tier.name,
        codec=tier.codec,
        integers=tier.integers,
        together=tier.together,
        load_s=time.perf_counter() - begin,
        resident_bytes=allocated() - before,
    )
    vocabulary = SHAPES[shape]["vocab_size"]
    ids = [(7 * i) % min(1000, vocabulary) for i in range(sizes.prompt)]
    length = sizes.prompt + sizes.new + WARM_UP_TOKENS + 1
    writer = Writer(model, torch.tensor([ids], device=DEVICE), length)
    prefills = 1 if report.settings.smoke else PREFILLS

    def read() -> dict[str, Any]:
        if not report.settings.smoke:
            writer.read()  # tunes
            written(writer, writer.step, WARM_UP_TOKENS)
        release()
        reset_peak()
        return summary([waited_ms(writer.read) for _ in range(prefills)], sizes.prompt)

    report.attempt(tier.name, "prefill", read)
    report.attempt(tier.name, "eager", lambda: written(writer, writer.step, sizes.new))
    peak = torch.cuda.max_memory_allocated() - before if DEVICE.type == "cuda" else 0
    report.add(tier.name, peak_bytes=peak)
    if DEVICE.type == "cuda":
        graph = lambda: written(writer, captured_step(writer), sizes.new)  # noqa: E731
        report.attempt(tier.name, "graph", graph, peer=True)
    else:
        report.add(tier.name, graph=not_measured("requires a GPU"))
    raise_if_damaged(model)


def disagreements(report: Report) -> list[str]:
    """Rows of equal integers that write other tokens, launch by launch or as a graph."""
    first: dict[str, tuple[str, list[int]]] = {}
    found = []
    for row in report.rows.rows.values():
        if row["codec"] is None:  # cuBLAS may choose other sums in a graph
            continue
        for way in ("eager", "graph"):
            if not was_measured(row.get(way)):
                continue
            title = f"{row['name']}, {way}"
            name, tokens = first.setdefault(row["integers"], (title, row[way]["tokens"]))
            if row[way]["tokens"] != tokens:
                found.append(f"{title}: writes other tokens than {name}")
    return found


def table(report: Report, shape: str, sizes: Sizes) -> Table:
    """One line a tier."""
    headings = [
        "tier",
        "resident, GB",
        "peak, GB",
        "prefill, tok/s",
        "eager, tok/s",
        "graph, tok/s",
    ]
    headings += ["graph, ms", "p20", "p80", "x bfloat16", "x raw", "load, s"]
    shown = numbers_table(f"{shape}: {sizes.prompt} tokens read, {sizes.new} written", headings)
    rows = report.rows.rows

    def speed(row: dict[str, Any], key: str) -> str:
        return f"{row[key]['tokens_per_s']:.1f}" if was_measured(row.get(key)) else "-"

    def over(row: dict[str, Any], baseline: str) -> str:
        """In the way that both were measured."""
        other = rows.get(baseline, {})
        for way in ("graph", "eager"):
            if was_measured(row.get(way)) and was_measured(other.get(way)):
                return f"{other[way]['median_ms'] / row[way]['median_ms']:.2f}"
        return "-"

    for row in rows.values():
        graph = row.get("graph")
        times = ["-"] * 3
        if was_measured(graph):
            times = [f"{graph[key]:.2f}" for key in ("median_ms", "p20_ms", "p80_ms")]
        shown.add_row(
            row["name"],
            f"{row['resident_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-",
            *(speed(row, key) for key in ("prefill", "eager", "graph")),
            *times,
            over(row, "bfloat16"),
            over(row, "device/raw"),
            f"{row['load_s']:.1f}",
        )
    return shown


def chosen_shape(smoke: bool) -> str:
    """The biggest that fits."""
    if smoke:
        return SMOKE
    free, _ = torch.cuda.mem_get_info()
    return BIG if free >= BIG_NEEDS_BYTES else SMALL


@torch.inference_mode()
def run(settings: Settings) -> None:
    """Measures and prints."""
    report = Report(settings)
    shape = chosen_shape(settings.smoke)
    sizes = Sizes(prompt=2, new=1) if settings.smoke else Sizes()
    report.figures.update(shape=SHAPES[shape], model=shape, prompt=sizes.prompt, new=sizes.new)
    for tier in TIERS:
        if settings.is_over():
            report.failed.append(f"{tier.name}: out of time")
            continue
        try:
            measure(report, tier, shape, sizes)
        except Exception as error:  # one tier must not hide the others
            report.failed.append(f"{tier.name}: {type(error).__name__}: {error}")
    report.failed += disagreements(report)
    remarks = ["load: drawing and encoding the weights, moving them, and their seek indices"]
    report.finish([table(report, shape, sizes)], remarks)


if __name__ == "__main__":
    run(start(__doc__, "model"))
