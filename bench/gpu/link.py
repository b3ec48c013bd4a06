"""Is decompression faster than the link? Weights in host memory, brought to the device in every way.

    python bench/gpu/link.py [--output FILE.json] [--seconds S] [--smoke]

Copies from pinned and from ordinary memory by size; decoding on the host by threads; then a stack of layers brought to
the device ahead of use (``DeviceStream``): copied raw, copied compressed and decoded there, decoded by the host on the
way, and a plain loop of copies. GB/s are of decoded weights, but for the copies' own. A figure beside the JSON shows
where the ways cross: what each gives over the bandwidth of the link.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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
from rich.table import Table
from torch import Tensor
from whole.drawn import LAYER_SIGMA, normal

import dcext
from dcext.codec import decode, encode, seek_index
from dcext.weights.device_stream import DeviceStream, HostDecoded

COPY_NBYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
COPIED_NBYTES = 256 << 20  # in all, for one time
REPEATS = 7
SHAPE, LAYERS = (4096, 8192), 24  # 805 MB of INT8, more than any cache


def median_s(function: Callable[[], Any], repeats: int) -> float:
    """Seconds until the device is done, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2] if repeats > 1 else times[-1]


def copies(nbytes: int, total: int, pinned: bool, repeats: int) -> dict[str, Any]:
    """Copies of ``nbytes`` bytes to the device, one after the other."""
    count = max(1, total // nbytes)
    source = torch.ones(count, nbytes, dtype=torch.uint8)
    if pinned and DEVICE.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)

    def run() -> None:
        for part in source:
            target.copy_(part, non_blocking=pinned)

    seconds = median_s(run, repeats)
    return {"seconds": seconds, "gbps": count * nbytes / seconds / 1e9}


def host_decode(payloads: list[Tensor], threads: int, repeats: int) -> dict[str, Any]:
    """Decoding on the host, verified, into memory that is there."""
    rows, cols = dcext.payload_info(payloads[0])["shape"]
    out = torch.empty(rows, cols, dtype=torch.int8)

    def run() -> None:
        for payload in payloads:
            decode(payload, threads, out)

    seconds = median_s(run, repeats)
    return {"seconds": seconds, "gbps": len(payloads) * out.nbytes / seconds / 1e9}


class Stack:
    """Layers in host memory, and what brings each of them as int8 to the device."""

    def __init__(self, qweights: list[Tensor], payloads: list[Tensor], way: str) -> None:
        """Args: way: of ``WAYS``."""
        self.qweights, self.way = qweights, way
        self.failures = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.out = torch.empty(qweights[0].shape, dtype=torch.int8, device=DEVICE)
        self.stream: DeviceStream | None = None
        parts: list[Any] = [[qweight] for qweight in qweights]
        if way == "device":
            indices = [seek_index(payload) for payload in payloads]
            assert all(index is not None for index in indices)
            parts = [list(pair) for pair in zip(payloads, indices, strict=True)]
        if way == "host":
            parts = [[HostDecoded(payload)] for payload in payloads]
        if way == "loop":
            pinned = DEVICE.type == "cuda"
            self.host = [q.pin_memory() if pinned else q for q in qweights]
            return
        self.stream = DeviceStream(parts, DEVICE)

    def bring(self, check: bool = False) -> None:
        """All layers, in order; each is read once on the device where nothing decodes it."""
        for unit, qweight in enumerate(self.qweights):
            if self.stream is None:
                self.out.copy_(self.host[unit])
                synchronize()
            else:
                with self.stream.using(unit) as parts:
                    if self.way == "device":
                        torch.ops.dcext.decode_indexed_(
                            [parts[0]], [parts[1]], [self.out], self.failures
                        )
                    else:
                        self.out.copy_(parts[0])
            if check and not torch.equal(self.out.cpu(), qweight):
                raise RuntimeError(f"{self.way}: layer {unit} arrived as another one")


WAYS = {
    "raw": "raw, ahead",
    "device": "compressed, decoded on the device",
    "host": "decoded on the host, ahead",
    "loop": "raw, a plain loop",
}


def timed_way(
    qweights: list[Tensor], payloads: list[Tensor], way: str, repeats: int
) -> dict[str, Any]:
    """Compares, then times."""
    stack = Stack(qweights, payloads, way)
    stack.bring(check=True)
    seconds = median_s(stack.bring, repeats)
    if int(stack.failures):
        raise RuntimeError(f"{way}: failures {int(stack.failures)}")
    statistics = None if stack.stream is None else stack.stream.statistics()
    nbytes = sum(qweight.nbytes for qweight in qweights)
    return {"seconds": seconds, "gbps": nbytes / seconds / 1e9, "statistics": statistics}


def thread_counts() -> list[int]:
    """1, 2, 4 .. and all."""
    most = len(os.sched_getaffinity(0))
    return sorted({count for count in (1, 2, 4, 8, 16, 32, most) if count <= most})


def measure(report: Report, settings: Settings) -> float:
    """All rows; returns the ratio of the layers."""
    smoke = settings.smoke
    repeats = 1 if smoke else REPEATS
    shape, layers = ((64, 256), 3) if smoke else (SHAPE, LAYERS)
    generator = torch.Generator().manual_seed(0)
    qweights = [
        normal(shape[0] * shape[1], LAYER_SIGMA, generator).view(shape) for _ in range(layers)
    ]
    payloads = [encode(qweight, "zstd") for qweight in qweights]
    ratio = sum(q.nbytes for q in qweights) / sum(p.nbytes for p in payloads)
    report.figures.update(ratio=ratio, shape=list(shape), layers=layers)
    for nbytes in COPY_NBYTES[:2] if smoke else COPY_NBYTES:
        total = nbytes if smoke else COPIED_NBYTES
        name = f"copy of {nbytes >> 10} KiB"
        for pinned in (True, False):
            key = "pinned" if pinned else "pageable"
            measured = lambda n=nbytes, t=total, p=pinned: copies(n, t, p, repeats)  # noqa: E731
            report.attempt(name, key, measured)
    for threads in thread_counts():
        decoded = lambda t=threads: host_decode(payloads[:4], t, repeats)  # noqa: E731
        report.attempt(f"host decode, {threads} threads", "decode", decoded)
    for way, title in WAYS.items():
        brought = lambda w=way: timed_way(qweights, payloads, w, repeats)  # noqa: E731
        report.attempt(title, "way", brought)
    return ratio


def tables(report: Report, ratio: float) -> list[Table]:
    """Copies; decoding and ways."""
    copied = numbers_table(
        "host to device", ["", "pinned, GB/s", f"x {ratio:.2f} decoded", "pageable, GB/s"]
    )
    ways = numbers_table(f"weights of ratio {ratio:.2f}, GB/s decoded", ["", "GB/s", "x raw"])
    raw = report.rows.rows.get(WAYS["raw"], {}).get("way")
    for row in report.rows.rows.values():
        if "pinned" in row:
            pinned, pageable = row["pinned"], row.get("pageable")
            has = was_measured(pinned)
            copied.add_row(
                row["name"],
                f"{pinned['gbps']:.2f}" if has else "-",
                f"{ratio * pinned['gbps']:.2f}" if has else "-",
                f"{pageable['gbps']:.2f}" if was_measured(pageable) else "-",
            )
            continue
        value = row.get("decode", row.get("way"))
        over = "-"
        if was_measured(value) and was_measured(raw) and "way" in row:
            over = f"{value['gbps'] / raw['gbps']:.2f}"
        ways.add_row(row["name"], f"{value['gbps']:.2f}" if was_measured(value) else "-", over)
    return [copied, ways]


def draw(report: Report, ratio: float, path: Path) -> None:
    """What each way gives over the bandwidth of a link, with what was measured on this one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows.rows
    decodes = [row["decode"]["gbps"] for row in rows.values() if was_measured(row.get("decode"))]
    links = [row["pinned"]["gbps"] for row in rows.values() if was_measured(row.get("pinned"))]
    if not decodes or not links:
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    link = [2.0**exponent for exponent in range(-1, 9)]
    axis.plot(link, link, label="raw")
    axis.plot(link, [ratio * gbps for gbps in link], label="compressed, decoded on the device")
    best = max(decodes)
    axis.plot(link, [min(gbps, best) for gbps in link], "--", label="decoded on the host")
    for way, title in WAYS.items():
        found = rows.get(title, {}).get("way")
        if was_measured(found):
            axis.plot([max(links)], [found["gbps"]], "o", label=f"measured: {WAYS[way]}")
    axis.set(xscale="log", yscale="log", xlabel="link, GB/s", ylabel="weights, GB/s decoded")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def run(settings: Settings) -> None:
    """Measures, prints and draws."""
    report = Report(settings)
    ratio = measure(report, settings)
    draw(report, ratio, settings.output.with_suffix(".png"))
    report.finish(tables(report, ratio), ["pageable copies are staged by the driver"])


if __name__ == "__main__":
    run(start(__doc__, "link"))
