"""How fast are products with int8 and packed weights on a GPU, beside torch._int_mm and bfloat16?

    python bench/gpu/gemm.py [--output FILE.json] [--seconds S] [--smoke]

Llama's layers, from one token to 4,096, by CUDA events, L2 cache cold. W8A8 rows include the quantization of the
activations and the scales, but for ``_int_mm``, which is given int8 activations and returns int32; ``whole`` is the same
between our operators that quantize and scale. The limit of a row is the larger of two times: its operations at the rate of a large product of the same type, and its bytes (weights
as they rest, activations, outputs, each once) at the rate of a large copy, both measured here. Results are compared
before anything is timed: W8A8 with exact sums bit by bit, the others with float32 products.
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
    numbers_table,
    relative_error,
    start,
    synchronize,
    was_measured,
)
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from whole.drawn import Pool, levels

import dcext
from dcext.kernels.int8_gemm import int8_linear
from dcext.kernels.packed import PackedWeight, packed_linear

ops = torch.ops.dcext
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (1024, 8192))  # out, in
TOKENS = (1, 16, 256, 4096)
INT_MM_TOKENS = 32  # torch._int_mm refuses 16 and fewer on a GPU; those are padded to so many
# Of a norm. One rounding to bfloat16 is 2^-9 at most; weights times scales that are rounded add as much.
MOST_ERROR = 2**-7
POOL_SIZE = 1 << 24
COPY_NBYTES = 1 << 30
PEAK_SIZE = 8192
# Column, what it is.
COLUMNS = {
    "w8a8": "W8A8",
    "w8a16": "W8A16",
    "packed_w8a8": "packed A8",
    "packed_w8a16": "packed A16",
    "int_mm": "_int_mm",
    "int_mm_whole": "whole",
    "bfloat16": "bf16",
}


@dataclass
class Weights:
    """One layer in all forms, on the device."""

    qweight: Tensor
    packed: PackedWeight
    row_scale: Tensor
    dense: Tensor


@dataclass
class Method:
    """A way to compute a layer.

    Attributes:
        run: queues one product.
        expected: what it must give.
        exact: bit by bit, or within ``MOST_ERROR``.
        weight_nbytes: as they rest.
        rate: which peak bounds it, ``"int8"`` or ``"bfloat16"``.
    """

    run: Callable[[], Tensor]
    expected: Tensor
    exact: bool
    weight_nbytes: int
    rate: str


def draw(pool: Pool, shape: tuple[int, int], dtype: torch.dtype) -> Weights:
    """Integers of codec packed, which all rows multiply, and their scales."""
    qweight = pool.take(*shape)
    generator = torch.Generator().manual_seed(3)
    row_scale = pool.scale * (0.5 + torch.rand(shape[0], generator=generator))
    packed = PackedWeight.from_payload(dcext.encode(qweight, "packed"), DEVICE)
    qweight, row_scale = qweight.to(DEVICE), row_scale.to(DEVICE)
    dense = (qweight.float() * row_scale[:, None]).to(dtype)
    return Weights(qweight, packed, row_scale, dense)


def methods(weights: Weights, x: Tensor) -> dict[str, Method]:
    """All of ``COLUMNS`` for these activations."""
    q, row_scale = weights.qweight, weights.row_scale
    tokens = x.shape[0]
    acts, act_scale = ops.quantize_activations(x, None)
    padded = acts
    if DEVICE.type == "cuda" and tokens < INT_MM_TOKENS:
        padded = acts.new_zeros((INT_MM_TOKENS, acts.shape[1]))
        padded[:tokens] = acts
    padded_x = x
    if len(padded) != tokens:
        padded_x = x.new_zeros((len(padded), x.shape[1]))
        padded_x[:tokens] = x
    # Sums of a few products of small integers: exact in float64, by another library.
    sums = (acts.double() @ q.double().t()).to(torch.int32)
    whole = ops.dequantize(sums, row_scale, act_scale, None, x.dtype)
    product = x.float() @ (q.float() * row_scale[:, None]).t()

    def int_mm_whole() -> Tensor:
        quantized, scale = ops.quantize_activations(padded_x, None)
        acc = torch._int_mm(quantized, q.t())
        return ops.dequantize(acc, row_scale, scale, None, x.dtype)[:tokens]

    int8, packed = q.numel(), weights.packed.nbytes
    return {
        "w8a8": Method(lambda: int8_linear(x, q, row_scale), whole, True, int8, "int8"),
        "w8a16": Method(
            lambda: int8_linear(x, q, row_scale, activations="none"),
            product,
            False,
            int8,
            "bfloat16",
        ),
        "packed_w8a8": Method(
            lambda: packed_linear(x, weights.packed, row_scale), whole, True, packed, "int8"
        ),
        "packed_w8a16": Method(
            lambda: packed_linear(x, weights.packed, row_scale, activations="none"),
            product,
            False,
            packed,
            "bfloat16",
        ),
        "int_mm": Method(lambda: torch._int_mm(padded, q.t())[:tokens], sums, True, int8, "int8"),
        "int_mm_whole": Method(int_mm_whole, whole, True, int8, "int8"),
        "bfloat16": Method(
            lambda: functional.linear(x, weights.dense),
            product,
            False,
            weights.dense.nbytes,
            "bfloat16",
        ),
    }


class Bench:
    """Measures rows against limits of this device."""

    def __init__(self, settings: Settings) -> None:
        """Measures the limits."""
        self.settings = settings
        self.report, self.clock = Report(settings), Clock(settings.smoke)
        # Triton's interpreter multiplies the bits of bfloat16.
        self.dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
        size = 64 if settings.smoke else PEAK_SIZE
        self.bytes_per_ms = self.clock.copy_gbps(1 << 16 if settings.smoke else COPY_NBYTES) * 1e6
        a, b = (torch.randn(size, size, device=DEVICE).to(self.dtype) for _ in range(2))
        ia, ib = (
            torch.randint(-127, 128, (size, size), dtype=torch.int8, device=DEVICE)
            for _ in range(2)
        )
        operations = 2 * size**3
        self.operations_per_ms = {
            "bfloat16": operations / self.clock.measure(lambda: a @ b.t())["median_ms"],
            "int8": operations / self.clock.measure(lambda: torch._int_mm(ia, ib.t()))["median_ms"],
        }
        self.report.figures["limits"] = {
            "copy_gbps_read_and_written": self.bytes_per_ms / 1e6,
            "tera_operations_per_s": {k: v / 1e9 for k, v in self.operations_per_ms.items()},
            "product_of": size,
        }

    def measure(self, shape: tuple[int, int], tokens: int, weights: Weights) -> None:
        """One row."""
        name = f"{shape[0]} x {shape[1]}, M = {tokens}"
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=generator).to(self.dtype).to(DEVICE)
        self.report.add(name, shape=shape, tokens=tokens, dtype=str(self.dtype))
        for column, method in methods(weights, x).items():
            self.report.attempt(name, column, lambda method=method: self.timed(method, x))

    def timed(self, method: Method, x: Tensor) -> dict[str, Any]:
        """Compares, then times; the first call, which may compile and tune, apart."""
        synchronize()
        begin = time.perf_counter()
        found = method.run()
        synchronize()
        first_s = time.perf_counter() - begin
        if method.exact:
            if not torch.equal(found, method.expected):
                wrong = int((found != method.expected).sum())
                raise RuntimeError(f"{wrong} of {found.numel()} outputs are others")
            error = 0.0
        else:
            error = relative_error(found, method.expected)
            if not error <= MOST_ERROR:
                raise RuntimeError(f"relative error: expected at most {MOST_ERROR}, got {error}")
        times = self.clock.measure(method.run)
        operations = 2 * x.numel() * found.shape[1]
        moved = method.weight_nbytes + x.nbytes + found.nbytes
        limit_ms = max(operations / self.operations_per_ms[method.rate], moved / self.bytes_per_ms)
        return {
            **times,
            "first_call_s": first_s,
            "relative_error": error,
            "tera_operations_per_s": operations / times["median_ms"] / 1e9,
            "gbps": moved / times["median_ms"] / 1e6,
            "limit_ms": limit_ms,
            "limit_share": limit_ms / times["median_ms"],
        }


def tables(report: Report) -> list[Table]:
    """Times, then what they come to."""
    rows = list(report.rows.rows.values())
    times = numbers_table(
        "products: microseconds, cold L2", ["out x in, tokens", *COLUMNS.values()]
    )
    shares = numbers_table(
        "share of the limit; times as fast",
        [
            "out x in, tokens",
            *COLUMNS.values(),
            "W8A8:_int_mm",
            "W8A8:whole",
            "W8A8:bf16",
            "packed A8:bf16",
        ],
    )

    def cell(row: dict[str, Any], column: str, form: Callable[[dict[str, Any]], str]) -> str:
        value = row.get(column)
        return form(value) if value is not None and was_measured(value) else "-"

    def ratio(row: dict[str, Any], column: str, baseline: str) -> str:
        if not (was_measured(row.get(column)) and was_measured(row.get(baseline))):
            return "-"
        return f"{row[baseline]['median_ms'] / row[column]['median_ms']:.2f}"

    for row in rows:
        times.add_row(
            row["name"], *(cell(row, c, lambda v: f"{1e3 * v['median_ms']:.1f}") for c in COLUMNS)
        )
        shares.add_row(
            row["name"],
            *(cell(row, c, lambda v: f"{v['limit_share']:.0%}") for c in COLUMNS),
            *(ratio(row, "w8a8", baseline) for baseline in ("int_mm", "int_mm_whole", "bfloat16")),
            ratio(row, "packed_w8a8", "bfloat16"),
        )
    return [times, shares]


def first_calls(report: Report) -> str:
    """Seconds that first calls took."""
    sums = dict.fromkeys(COLUMNS, 0.0)
    for row in report.rows.rows.values():
        for column in COLUMNS:
            if was_measured(row.get(column)):
                sums[column] += row[column]["first_call_s"]
    parts = ", ".join(f"{COLUMNS[column]} {seconds:.1f} s" for column, seconds in sums.items())
    return f"first calls, which compile and tune, together: {parts}"


def run(settings: Settings) -> None:
    """Measures and prints; few tokens first, where compressed weights matter most."""
    shapes = ((33, 96),) if settings.smoke else SHAPES
    tokens = (1, 5) if settings.smoke else TOKENS
    bench = Bench(settings)
    generator = torch.Generator().manual_seed(0)
    pool = Pool(levels(1 << 16 if settings.smoke else POOL_SIZE, generator), seed=1)
    for shape in shapes:
        weights = draw(pool, shape, bench.dtype)
        for count in tokens:
            if settings.is_over():
                bench.report.failed.append(f"{shape}, M = {count}: out of time")
            else:
                bench.measure(shape, count, weights)
    limits = bench.report.figures["limits"]
    rates = limits["tera_operations_per_s"]
    remarks = [
        f"limits: {rates['int8']:.0f} int8 and {rates['bfloat16']:.0f} bfloat16 tera-operations/s, "
        f"{limits['copy_gbps_read_and_written']:.0f} GB/s read and written",
        f"_int_mm takes at least {INT_MM_TOKENS} tokens here: fewer are padded, outside the time but in `whole`",
        first_calls(bench.report),
    ]
    bench.report.finish(tables(bench.report), remarks)


if __name__ == "__main__":
    run(start(__doc__, "gemm"))
