"""How fast is a model that does not fit on the GPU, for each way of bringing its weights there?

    python bench/gpu/offload.py [--output FILE.json] [--seconds S] [--smoke]

A Llama of drawn weights whose decoder blocks all wait in host memory: copied raw, copied compressed and decoded on the
device, decoded by the host on the way, all ahead of use (``dcext.offload``), and accelerate's ``cpu_offload`` of the
bfloat16 model. One forward pass of 1, 16 and 512 tokens, as a user waits for it; one token also as a replayed CUDA
graph where the way can be captured. Rows of equal integers must predict equal tokens. A trace of one pass beside the
JSON shows copies, decoding and products side by side (open it in Perfetto).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Report,
    Settings,
    numbers_table,
    start,
    synchronize,
    was_measured,
)
from passes import SMOKE, begin, disagreements, ids_of, one_pass, save, timed
from rich.table import Table
from torch import Tensor
from whole.drawn import POOL_SIZE, SHAPES, drawn_model

import dcext
from dcext.offloading.device_budget import plan_device

LENGTHS = (1, 16, 512)
REPEATS = 9
# Row -> codec, mode.
WAYS = {
    "raw": ("raw", "device"),
    "compressed, decoded on the device": ("zstd", "device"),
    "decoded by the host": ("zstd", "host"),
}
ACCELERATE = "accelerate cpu_offload, bfloat16"
GRAPH = "graph of 1"


def least_device_bytes(model: Any, mode: str) -> int:
    """The smallest budget: no block rests on the device."""
    try:
        plan_device(model, mode, 0, None)
    except ValueError as error:
        return int(str(error).split("at least ")[1].split(" ")[0])
    raise AssertionError("a model needs no memory")


def load(codec: str, mode: str, shape: str, folder: Path) -> Any:
    """The model, all blocks in host memory."""
    model = dcext.from_pretrained(save(codec, shape, folder))
    budget = least_device_bytes(model, mode)
    dcext.offload(model, device_memory=budget, device=DEVICE, mode=mode)
    return model


def one_graph(model: Any, ids: Tensor, repeats: int) -> dict[str, Any]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(ids, use_cache=False, logits_to_keep=1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(ids, use_cache=False, logits_to_keep=1).logits
        model.dcext_offload.device_stream.join()
    times = timed(graph.replay, repeats)
    return {**times, "tokens_per_s": 1e3 / times["median_ms"], "token": int(output.argmax())}


def trace(model: Any, ids: Tensor, path: Path) -> str:
    """A profiler trace of two passes."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for _ in range(2):
            model(ids, use_cache=False, logits_to_keep=1)
        synchronize()
    found.export_chrome_trace(str(path))
    return path.name


def measure_model(report: Report, name: str, model: Any, shape: str, settings: Settings) -> None:
    """The passes of a row."""
    vocabulary = SHAPES[shape]["vocab_size"]
    lengths = (1, 2) if settings.smoke else LENGTHS
    repeats = 1 if settings.smoke else REPEATS
    for length in lengths:
        ids = ids_of(length, vocabulary)
        passed = lambda ids=ids: one_pass(model, ids, repeats)  # noqa: E731
        report.attempt(name, str(length), passed, peer=name == ACCELERATE)
    offload = getattr(model, "dcext_offload", None)
    if offload is None:
        return
    report.add(
        name,
        traveling_nbytes=offload.streamed_nbytes,
        device_nbytes=offload.device_nbytes,
        host_nbytes=offload.memory_nbytes,
        statistics=offload.statistics().to_dict(),
    )
    ids = ids_of(lengths[1], vocabulary)
    path = settings.output.with_name(f"offload-{name.split(',')[0].replace(' ', '-')}.trace.json")
    report.attempt(name, "trace", lambda: trace(model, ids, path))
    if DEVICE.type == "cuda" and WAYS[name][1] != "host":  # last: later passes copy nothing ahead
        report.attempt(name, GRAPH, lambda: one_graph(model, ids_of(1, vocabulary), repeats))


def accelerate_model(shape: str) -> Any:
    """The bfloat16 model, every module copied when it is called."""
    from accelerate import cpu_offload

    model = drawn_model(shape, "normal", None, 1 << 16 if shape == SMOKE else POOL_SIZE)
    return cpu_offload(model, execution_device=DEVICE)


def table(report: Report, shape: str, lengths: tuple[int, ...]) -> Table:
    """One line a way."""
    keys = [*map(str, lengths), GRAPH]
    headings = ["all blocks in host memory", "travels, GB", "device, GB"]
    headings += [f"{key}, tok/s" for key in keys] + ["x raw at 1", "x accelerate at 1"]
    shown = numbers_table(shape, headings)
    rows = report.rows.rows

    def over(row: dict[str, Any], baseline: str) -> str:
        mine, other = row.get("1"), rows.get(baseline, {}).get("1")
        if not was_measured(mine) or not was_measured(other):
            return "-"
        return f"{other['median_ms'] / mine['median_ms']:.2f}"

    for row in rows.values():
        speeds = [
            f"{row[key]['tokens_per_s']:.2f}" if was_measured(row.get(key)) else "-" for key in keys
        ]
        nbytes = [
            f"{row[key] / 1e9:.2f}" if key in row else "-"
            for key in ("traveling_nbytes", "device_nbytes")
        ]
        shown.add_row(row["name"], *nbytes, *speeds, over(row, "raw"), over(row, ACCELERATE))
    return shown


@torch.inference_mode()
def run(settings: Settings) -> None:
    """Measures and prints."""
    report, shape = begin(settings)
    with tempfile.TemporaryDirectory(prefix="dcext-offload-") as folder:
        for name, (codec, mode) in WAYS.items():
            if settings.is_over():
                report.failed.append(f"{name}: out of time")
                continue
            try:
                model = load(codec, mode, shape, Path(folder))
                measure_model(report, name, model, shape, settings)
            except Exception as error:  # one way must not hide the others
                report.failed.append(f"{name}: {type(error).__name__}: {error}")
            model = None
    if not settings.is_over():
        try:
            measure_model(report, ACCELERATE, accelerate_model(shape), shape, settings)
        except Exception as error:  # a peer
            print(f"{ACCELERATE}: {type(error).__name__}: {error}")
    report.failed += disagreements(report, {GRAPH: "1"}, ACCELERATE)
    lengths = (1, 2) if settings.smoke else LENGTHS
    report.finish([table(report, shape, lengths)], ["a pass has no cache of past tokens"])


if __name__ == "__main__":
    run(start(__doc__, "offload"))
