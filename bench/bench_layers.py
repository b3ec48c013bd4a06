"""How fast is a layer whose weights rest compressed, against raw INT8 and the products of torch?

Layers rotate over more data than the caches hold. G/s are weights; the first row of each case is our raw INT8 layer
(quantization of the activations, product, scales). `torch._int_mm` is the integer product alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SMOKE, Timer, gaussian
from torch.nn import functional

import dcext
from dcext import _C

SHAPES = [(128, 256)] if SMOKE else [(4096, 4096), (11008, 4096)]  # out_features, in_features
TOKENS = [1, 16] if SMOKE else [1, 8, 32, 128, 512]
COUNT = 2 if SMOKE else 12  # layers in rotation: 192 MiB and more
SIGMA, WIDE_SIGMA = (
    3.0,
    35.0,
)  # 3.6 bits, as compression-aware recipes aim at; 7.2 bits, as INT8 per row has


class Case:
    """The weights and activations of one shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.weights = [gaussian(*shape, SIGMA, seed) for seed in range(COUNT)]
        self.scale = torch.full((shape[0],), 0.01)
        self.layers: dict[str, list[dcext.DCLinear]] = {
            codec: [dcext.DCLinear.from_qweight(w, self.scale, codec=codec) for w in self.weights]
            for codec in ("raw", "zstd")
        }
        wide = [gaussian(*shape, WIDE_SIGMA, seed) for seed in range(COUNT)]
        self.layers["wide"] = [
            dcext.DCLinear.from_qweight(w, self.scale, codec="zstd") for w in wide
        ]

    def x(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.shape[1], generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(params=TOKENS, ids=lambda tokens: f"M{tokens}")
def tokens(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=_C.supported_isas()[:-3:-1])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The best instruction set, and the one before it."""
    before = _C.selected_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def record(
    timer: Timer,
    case: Case,
    tokens: int,
    threads: int,
    row: str,
    functions: list[Callable[[], Any]],
    **extra: Any,
) -> None:
    rows, cols = case.shape
    title = f"{rows} x {cols}, M = {tokens}, {threads} threads"
    with torch.inference_mode():
        timer.run("layer forward", title, row, functions, rows * cols, **extra)


@pytest.mark.parametrize("codec", ["raw", "zstd", "wide"])
def test_dcext(case: Case, tokens: int, threads: int, timer: Timer, isa: str, codec: str) -> None:
    x, layers = case.x(tokens), case.layers[codec]
    if codec == "zstd":
        assert torch.equal(layers[0](x), case.layers["raw"][0](x))
    bits = sum(layer.bits_per_weight for layer in layers) / COUNT
    row = f"dcext {'zstd' if codec == 'wide' else codec} ({isa})"
    record(timer, case, tokens, threads, row, [lambda m=m: m(x) for m in layers], bits=bits)


def test_int_mm(case: Case, tokens: int, threads: int, timer: Timer) -> None:
    q, _ = torch.ops.dcext.quantize_activations(case.x(tokens), None)
    expected = q.long() @ case.weights[0].long().T
    assert torch.equal(torch._int_mm(q, case.weights[0].t()).long(), expected)
    functions = [lambda w=w: torch._int_mm(q, w.t()) for w in case.weights]
    record(timer, case, tokens, threads, "torch._int_mm, product alone", functions, bits=8.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_float(case: Case, tokens: int, threads: int, timer: Timer, dtype: torch.dtype) -> None:
    count = min(COUNT, 6)
    weights = [w.to(dtype) for w in case.weights[:count]]
    x = case.x(tokens).to(dtype)
    functions = [lambda w=w: functional.linear(x, w) for w in weights]
    row = f"torch linear, {str(dtype).removeprefix('torch.')}"
    record(timer, case, tokens, threads, row, functions, bits=8.0 * dtype.itemsize)


def test_onednn(case: Case, tokens: int, threads: int, timer: Timer) -> None:
    """Unsigned activations with a zero point of 128; weights prepacked, which takes far longer than the product."""
    q, _ = torch.ops.dcext.quantize_activations(case.x(tokens), None)
    unsigned = (q.int() + 128).to(torch.uint8)
    zero_points = torch.zeros(case.shape[0], dtype=torch.int64)
    packed = [torch.ops.onednn.qlinear_prepack(w, list(unsigned.shape)) for w in case.weights]

    def multiply(weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            unsigned,
            1.0,
            128,
            weight,
            torch.ones(case.shape[0]),
            zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )

    expected = (q.double() @ case.weights[0].double().T).float()
    assert torch.allclose(multiply(packed[0]), expected, rtol=1e-5)
    functions = [lambda w=w: multiply(w) for w in packed]
    record(
        timer,
        case,
        tokens,
        threads,
        "oneDNN qlinear, uint8 activations, prepacked",
        functions,
        bits=8.0,
    )
