"""How fast a GPU decodes weights that rest as zstd frames, beside nvCOMP and a copy on the device.

    python bench/gpu/decode.py [--output FILE.json] [--seconds S] [--smoke]

Drawn integers, over the size of a matrix, over its entropy, and the seven matrices of a decoder block in one launch and
in seven. GB/s are of decoded weights, by CUDA events, L2 cache cold. nvCOMP decodes the same frames (what they hold:
dcext also undoes its filter), and in its ANS format the same contents. Everything is compared with the known weights
before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    DEVICE,
    Clock,
    Report,
    Settings,
    gbps,
    not_measured,
    numbers_table,
    start,
    was_measured,
)
from frames import content_nbytes, has_frame, weights_of
from nvcomp_peer import (
    Buffers,
    Decompression,
    Library,
    UnavailableError,
    compress_ans,
    find_library,
)
from rich.table import Table
from torch import Tensor
from whole.drawn import Pool, normal

import dcext
from dcext.codec import seek_index

MIB = 1 << 20
COLS = 4096
SIZES_MIB = (1, 4, 16, 64, 256)
BITS = 3.64  # of a layer at a ratio of 2.2
OTHER_BITS = (2.0, 3.0, 4.5, 5.5, 6.5)
OTHER_BITS_MIB = 64
# hidden, intermediate and key-value widths of Llama 3.2 1B and 3B, and Llama 3 8B
BLOCKS = {"1B": (2048, 8192, 512), "3B": (3072, 8192, 1024), "8B": (4096, 14336, 1024)}
COPY_NBYTES = 1 << 30
PEERS = {"nvcomp_zstd": "nvCOMP zstd", "nvcomp_ans": "nvCOMP ANS"}


@dataclass(frozen=True)
class Case:
    """Matrices that are decoded together: their shapes, and the entropy of their integers, about."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    bits: float

    @property
    def nbytes(self) -> int:
        """Of the decoded weights."""
        return sum(rows * cols for rows, cols in self.shapes)


def block_shapes(hidden: int, intermediate: int, key_value: int) -> tuple[tuple[int, int], ...]:
    """The linear layers of a decoder block: attention, then the MLP."""
    attention = ((hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden))
    return (*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate))


def cases(smoke: bool) -> list[Case]:
    """The rows; the most telling first."""
    if smoke:
        small = ((40, 96), (100, 64))
        return [Case("64 x 256, 3.64 bits", ((64, 256),), BITS), Case("block", small, 2.0)]
    found = [matrix_case(size, BITS) for size in sorted(SIZES_MIB, reverse=True)[1:]]
    found += [
        Case(f"block of Llama {name}", block_shapes(*widths), BITS)
        for name, widths in BLOCKS.items()
    ]
    found += [matrix_case(OTHER_BITS_MIB, bits) for bits in OTHER_BITS]
    return [*found, matrix_case(max(SIZES_MIB), BITS)]


def matrix_case(size_mib: int, bits: float) -> Case:
    """One matrix."""
    rows = size_mib * MIB // COLS
    return Case(f"{size_mib} MiB, {bits} bits", ((rows, COLS),), bits)


class Coded:
    """The payloads of a case, on the host and on the device, and their seek indices."""

    def __init__(self, case: Case) -> None:
        """Draws the weights and encodes them."""
        generator = torch.Generator().manual_seed(0)
        sigma = 2 ** (case.bits - 2.047)
        pool = Pool(normal(min(case.nbytes, 16 * MIB), sigma, generator), seed=1)
        self.case = case
        self.qweights = [pool.take(*shape) for shape in case.shapes]
        self.payloads_host = [dcext.encode(qweight, "zstd") for qweight in self.qweights]
        seek_index(self.payloads_host[0], verify=False)  # warms up
        begin = time.perf_counter()
        indices = [seek_index(payload, verify=False) for payload in self.payloads_host]
        self.index_s = time.perf_counter() - begin
        begin = time.perf_counter()
        self.payloads = [payload.to(DEVICE) for payload in self.payloads_host]
        self.indices = [index.to(DEVICE) for index in indices if index is not None]
        self.copy_s = time.perf_counter() - begin
        self.infos = [dcext.payload_info(payload) for payload in self.payloads_host]
        self.failures = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def outs(self) -> list[Tensor]:
        """Where to decode to, filled with what no weight is likely to be."""
        return [
            torch.full(shape, -99, dtype=torch.int8, device=DEVICE) for shape in self.case.shapes
        ]

    def described(self) -> dict[str, Any]:
        """Sizes, and what loading costs on the host."""
        payload_nbytes = sum(payload.numel() for payload in self.payloads)
        index_nbytes = sum(index.numel() for index in self.indices)
        chunks = [chunk for info in self.infos for chunk in info["chunks"]]
        filters = sorted({(c["pairs"], c["low_bits"]) for c in chunks if has_frame(c)})
        return {
            "shapes": self.case.shapes,
            "nbytes": self.case.nbytes,
            "entropy_bits": dcext.entropy(torch.cat([q.view(-1) for q in self.qweights])),
            "stored_bits": 8 * payload_nbytes / self.case.nbytes,
            "ratio": self.case.nbytes / payload_nbytes,
            "payload_nbytes": payload_nbytes,
            "index_nbytes": index_nbytes,
            "index_host_ms": 1e3 * self.index_s,
            "index_host_gbps": self.case.nbytes / self.index_s / 1e9,
            "host_threads": dcext.get_num_threads(),
            "copy_to_device_ms": 1e3 * self.copy_s,
            "filters_pairs_low_bits": filters,
            "raw_chunks": sum(not has_frame(chunk) for chunk in chunks),
        }


def decoder(coded: Coded, outs: list[Tensor], *, together: bool) -> Callable[[], None]:
    """Decodes the case in one launch, or each matrix in one of its own."""
    decode = torch.ops.dcext.decode_indexed_

    def in_one() -> None:
        decode(coded.payloads, coded.indices, outs, coded.failures)

    def one_by_one() -> None:
        for payload, index, out in zip(coded.payloads, coded.indices, outs, strict=True):
            decode([payload], [index], [out], coded.failures)

    return in_one if together else one_by_one


def timed_decode(coded: Coded, clock: Clock, *, together: bool) -> dict[str, Any]:
    """Compares, then times."""
    outs = coded.outs()
    run = decoder(coded, outs, together=together)
    run()
    expected = [qweight.to(DEVICE) for qweight in coded.qweights]
    if int(coded.failures) or not all(map(torch.equal, outs, expected)):
        raise RuntimeError(f"decoded other weights, failures {int(coded.failures)}")
    times = clock.measure(run)
    for out in outs:
        out.fill_(-99)
    run()
    if int(coded.failures) or not all(map(torch.equal, outs, expected)):
        raise RuntimeError(f"decoded other weights later, failures {int(coded.failures)}")
    return {**times, "gbps": gbps(coded.case.nbytes, times)}


def timed_copy(coded: Coded, clock: Clock) -> dict[str, Any]:
    """A copy of the decoded weights on the device."""
    source = torch.cat([qweight.view(-1) for qweight in coded.qweights]).to(DEVICE)
    target = torch.empty_like(source)
    times = clock.measure(lambda: target.copy_(source))
    return {**times, "gbps": gbps(coded.case.nbytes, times)}


def frames_for_nvcomp(coded: Coded) -> tuple[list[tuple[int, dict[str, Any]]], Buffers, Tensor]:
    """Payload number and chunk of each frame, and where the frames lie."""
    found = [
        (number, chunk)
        for number, info in enumerate(coded.infos)
        for chunk in info["chunks"]
        if has_frame(chunk)
    ]
    if not found:
        raise RuntimeError("no frames: all tiles are raw")
    base = coded.payloads[0].data_ptr()
    offsets = [
        coded.payloads[number].data_ptr() + chunk["offset"] - base for number, chunk in found
    ]
    sizes = torch.tensor([chunk["frame_nbytes"] for _, chunk in found], dtype=torch.int64)
    return found, Buffers(coded.payloads[0], offsets), sizes


def timed_zstd(coded: Coded, library: Library, clock: Clock) -> tuple[dict[str, Any], Tensor]:
    """NvCOMP on the same frames, and what they hold, joined."""
    chunks, source, source_sizes = frames_for_nvcomp(coded)
    sizes = [content_nbytes(chunk) for _, chunk in chunks]
    batch = Decompression(library, "Zstd", source, source_sizes, sizes)
    batch.run()
    contents = batch.results()
    for (number, chunk), content in zip(chunks, contents, strict=True):
        row, col = chunk["row"], chunk["col"]
        rows, cols = chunk["shape"]
        expected = coded.qweights[number][row : row + rows, col : col + cols].to(DEVICE)
        if not torch.equal(weights_of(content, coded.payloads[number], chunk), expected):
            raise RuntimeError("nvCOMP decoded other weights")
    joined = torch.cat(contents)
    times = clock.measure(batch.run)
    figures = {"frames": len(chunks), "content_nbytes": joined.numel(), "version": library.version}
    return {**times, "gbps": gbps(coded.case.nbytes, times), **figures}, joined


def timed_ans(coded: Coded, content: Tensor, library: Library, clock: Clock) -> dict[str, Any]:
    """NvCOMP's ANS on what the frames hold."""
    source, source_sizes, sizes = compress_ans(library, content)
    batch = Decompression(library, "ANS", source, source_sizes, sizes)
    batch.run()
    if not torch.equal(torch.cat(batch.results()), content):
        raise RuntimeError("nvCOMP ANS decoded other bytes")
    times = clock.measure(batch.run)
    stored = int(source_sizes.sum())
    ratio = content.numel() / stored
    return {
        **times,
        "gbps": gbps(coded.case.nbytes, times),
        "nbytes": stored,
        "content_ratio": ratio,
    }


def measure_ours(report: Report, coded: Coded, clock: Clock) -> None:
    """A case's row, without peers."""
    name = coded.case.name
    report.add(name, **coded.described())
    report.attempt(name, "copy", lambda: timed_copy(coded, clock))
    report.attempt(name, "decode", lambda: timed_decode(coded, clock, together=True))
    if len(coded.payloads) > 1:
        report.attempt(
            name, "decode_one_by_one", lambda: timed_decode(coded, clock, together=False)
        )
    row = report.rows.rows[name]
    if was_measured(row["copy"]) and was_measured(row["decode"]):
        moved = row["payload_nbytes"] + row["index_nbytes"] + row["nbytes"]
        share = moved / (2 * row["nbytes"]) * row["copy"]["median_ms"] / row["decode"]["median_ms"]
        report.add(name, bandwidth_share=share)


def measure_peers(report: Report, coded: Coded, library: Library, clock: Clock) -> None:
    """NvCOMP's columns of a case's row."""
    name = coded.case.name
    contents: list[Tensor] = []

    def zstd() -> dict[str, Any]:
        figures, content = timed_zstd(coded, library, clock)
        contents.append(content)
        return figures

    report.attempt(name, "nvcomp_zstd", zstd, peer=True)
    if contents:
        ans = lambda: timed_ans(coded, contents[0], library, clock)  # noqa: E731
        report.attempt(name, "nvcomp_ans", ans, peer=True)
    else:
        report.add(name, nvcomp_ans=not_measured("its input is what nvCOMP zstd decodes"))


def table(report: Report) -> Table:
    """One line a case."""
    headings = ["decoded GB/s, cold L2", "entropy", "stored", "MB", "dcext", "one by one", "copy"]
    headings += [*PEERS.values(), "x zstd", "ms", "p20", "p80", "bandwidth", "index, host"]
    shown = numbers_table("decoding on the GPU", headings)

    def speed(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return f"{value['gbps']:.1f}" if was_measured(value) else "-"

    for row in report.rows.rows.values():
        decode, peer = row["decode"], row.get("nvcomp_zstd")
        times = [""] * 3
        if was_measured(decode):
            times = [f"{decode[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
        both = was_measured(decode) and was_measured(peer)
        shown.add_row(
            row["name"],
            f"{row['entropy_bits']:.2f}",
            f"{row['stored_bits']:.2f}",
            f"{row['nbytes'] / 1e6:.0f}",
            *(speed(row, key) for key in ("decode", "decode_one_by_one", "copy", *PEERS)),
            f"{peer['median_ms'] / decode['median_ms']:.1f}" if both else "",
            *times,
            f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else "",
            f"{row['index_host_ms']:.1f} ms",
        )
    return shown


def run(settings: Settings) -> None:
    """Measures and prints."""
    report, clock = Report(settings), Clock(settings.smoke)
    copy_gbps = clock.copy_gbps(MIB if settings.smoke else COPY_NBYTES)
    report.figures["copy_gbps_read_and_written"] = copy_gbps
    wanted = cases(settings.smoke)
    for case in wanted:
        if settings.is_over():
            report.failed.append(f"{case.name}: out of time")
            continue
        measure_ours(report, Coded(case), clock)
    # Peers last: code that is not ours could take the device along with it.
    try:
        if DEVICE.type != "cuda":
            raise UnavailableError("requires a GPU")
        library = Library(find_library())
    except UnavailableError as error:
        for name in list(report.rows.rows):
            report.add(name, **{key: not_measured(str(error)) for key in PEERS})
    else:
        for case in wanted:
            if case.name not in report.rows.rows:
                continue
            if settings.is_over():
                report.add(case.name, **{key: not_measured("out of time") for key in PEERS})
            else:
                measure_peers(report, Coded(case), library, clock)
    threads = dcext.get_num_threads()
    remarks = [
        f"copy of {COPY_NBYTES >> 20} MiB: {copy_gbps:.0f} GB/s, bytes read and written",
        "bandwidth: bytes of payload, index and weights in that time, as a share of the rate of the copy beside it",
        f"index, host: making the seek index with {threads} threads",
    ]
    report.finish([table(report)], remarks)


if __name__ == "__main__":
    run(start(__doc__, "decode"))
