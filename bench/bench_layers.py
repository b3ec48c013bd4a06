"""How fast is a layer whose weights rest compressed, against raw INT8 and the products of torch?

Layers rotate over at least 512 MiB of weights. G/s are weights; the first row of each case is our raw INT8 layer
(quantization of the activations, product, scales). `torch._int_mm` and oneDNN are given activations that are quantized
already, and `torch._int_mm` is the integer product alone, without scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packed_weights import packed_rate_weights
from torch.nn import functional

import dcext
from conftest import SMOKE, Figure, Tables, Timer, count_threads, gaussian, speed_ratio
from dcext import _C
from dcext.weights.origin import to_weight_memory

SHAPES = [(128, 256)] if SMOKE else [(4096, 4096), (11008, 4096)]  # out_features, in_features
TOKENS = [1, 16] if SMOKE else [1, 8, 32, 128, 512]
ROTATION = 2 * 128 * 256 if SMOKE else 512 * 2**20  # bytes of weights, at least
# 3.6 bits, as compression-aware recipes aim at; 7.2 bits, as INT8 per row has
SIGMAS = {"sigma 3": 3.0, "sigma 35": 35.0}
RATE = "rate"  # weights as that recipe makes them for codec packed
RATE_ROWS = 128 if SMOKE else 4096  # repeated for layers with more
CASE_FIXTURES = ("case", "tokens", "threads")
SCALE = 0.01

INT_MM = "torch._int_mm, product alone"
ONEDNN = "oneDNN qlinear, uint8 activations, prepacked"


def count(shape: tuple[int, int], itemsize: int = 1) -> int:
    """Layers in rotation."""
    return -(-ROTATION // (shape[0] * shape[1] * itemsize))


class Case:
    """The weights and activations of one shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.weights: dict[str, list[torch.Tensor]] = {}
        self.layers: dict[tuple[str, str], list[dcext.DCLinear]] = {}
        for name, sigma in SIGMAS.items():
            weights = [gaussian(*shape, sigma, seed) for seed in range(count(shape))]
            # The raw layer does not depend on the values.
            for codec in ("raw", "zstd") if name == "sigma 3" else ("zstd",):
                self.layers[codec, name] = [self.layer(weight, codec) for weight in weights]
            self.weights[name] = weights if name == "sigma 3" else weights[:1]
        self.weights[RATE] = [repeated_rate_weights(shape)]
        first = self.layer(self.weights[RATE][0], "packed")
        self.layers["packed", RATE] = [first]
        for _ in range(count(shape) - 1):  # the same weights in other memory
            payload = to_weight_memory(first.payload)
            self.layers["packed", RATE].append(dcext.DCLinear(payload, first.row_scale))
        self.packed: tuple[int, list[torch.Tensor]] = (0, [])

    def layer(self, weight: torch.Tensor, codec: str) -> dcext.DCLinear:
        scale = torch.full((self.shape[0],), SCALE)
        return dcext.DCLinear.from_qweight(weight, scale, codec=codec)

    def x(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, self.shape[1], generator=torch.Generator().manual_seed(tokens))

    def prepacked(self, tokens: int) -> list[torch.Tensor]:
        """For oneDNN; those of one number of tokens are kept."""
        if self.packed[0] != tokens:
            self.packed = (0, [])
            pack, shape = torch.ops.onednn.qlinear_prepack, [tokens, self.shape[1]]
            self.packed = (tokens, [pack(weight, shape) for weight in self.weights["sigma 3"]])
        return self.packed[1]


@functools.cache
def rate_weights(cols: int) -> torch.Tensor:
    return packed_rate_weights(RATE_ROWS, cols)


def repeated_rate_weights(shape: tuple[int, int]) -> torch.Tensor:
    weights = rate_weights(shape[1])
    return weights.repeat(-(-shape[0] // len(weights)), 1)[: shape[0]].contiguous()


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


def check(y: torch.Tensor, q: torch.Tensor, weight: torch.Tensor, scale: Any) -> None:
    """Compares some tokens with the exact integer product, scaled: `scale * (q @ weight.T)`."""
    some = sorted({0, len(q) // 2, len(q) - 1})
    expected = (q[some].double() @ weight.double().T) * scale
    torch.testing.assert_close(y[some].double(), expected, rtol=1e-5, atol=1e-5)


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
    title = f"{rows} x {cols}, M = {tokens}, {count_threads(threads)}"
    with torch.inference_mode():
        timer.run("layer forward", title, row, functions, rows * cols, **extra)


@pytest.mark.parametrize(
    ("codec", "weights"),
    [("raw", "sigma 3"), ("zstd", "sigma 3"), ("zstd", "sigma 35"), ("packed", RATE)],
)
def test_dcext(
    case: Case, tokens: int, threads: int, timer: Timer, isa: str, codec: str, weights: str
) -> None:
    x, layers = case.x(tokens), case.layers[codec, weights]
    y = layers[0](x)
    q, scale = torch.ops.dcext.quantize_activations(x, None)
    some = sorted({0, tokens // 2, tokens - 1})
    check(y, q, case.weights[weights][0], scale.double().reshape(-1, 1)[some] * SCALE)
    if weights == "sigma 3":
        assert torch.equal(y, case.layers["raw", "sigma 3"][0](x))
    bits = sum(layer.bits_per_weight for layer in layers) / len(layers)
    row = dcext_row(codec, weights, isa)
    record(timer, case, tokens, threads, row, [lambda m=m: m(x) for m in layers], bits=bits)


def dcext_row(codec: str, weights: str, isa: str) -> str:
    return f"dcext {codec} ({isa})" if codec == "raw" else f"dcext {codec}, {weights} ({isa})"


def test_int_mm(case: Case, tokens: int, threads: int, timer: Timer) -> None:
    q, _ = torch.ops.dcext.quantize_activations(case.x(tokens), None)
    weights = case.weights["sigma 3"]
    check(torch._int_mm(q, weights[0].t()), q, weights[0], 1)
    functions = [lambda w=w: torch._int_mm(q, w.t()) for w in weights]
    record(timer, case, tokens, threads, INT_MM, functions, bits=8.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_float(case: Case, tokens: int, threads: int, timer: Timer, dtype: torch.dtype) -> None:
    chosen = case.weights["sigma 3"][: count(case.shape, dtype.itemsize)]
    weights = [weight.to(dtype) for weight in chosen]
    x = case.x(tokens).to(dtype)
    some, weight = x[:3].double(), chosen[0].double()
    expected = some @ weight.T
    # Rounding of the result, and of the sums, which are in float32.
    sums = (some.abs() @ weight.abs().T) * weight.shape[1] ** 0.5
    bound = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * sums
    assert ((functional.linear(x, weights[0])[:3].double() - expected).abs() <= bound).all()
    functions = [lambda w=w: functional.linear(x, w) for w in weights]
    row = f"torch linear, {str(dtype).removeprefix('torch.')}"
    record(timer, case, tokens, threads, row, functions, bits=8.0 * dtype.itemsize)


def test_onednn(case: Case, tokens: int, threads: int, timer: Timer) -> None:
    """Unsigned activations with a zero point of 128; weights prepacked, which takes far longer than the product."""
    q, _ = torch.ops.dcext.quantize_activations(case.x(tokens), None)
    unsigned = (q.int() + 128).to(torch.uint8)
    scales = torch.ones(case.shape[0])
    zero_points = torch.zeros(case.shape[0], dtype=torch.int64)
    output = (1.0, 0, torch.float32)

    def multiply(weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, weight, scales, zero_points, None, *output, "none", [], ""
        )

    packed = case.prepacked(tokens)
    check(multiply(packed[0]), q, case.weights["sigma 3"][0], 1)
    functions = [lambda w=w: multiply(w) for w in packed]
    record(timer, case, tokens, threads, ONEDNN, functions, bits=8.0)


def test_memory(case: Case, tokens: int, threads: int, timer: Timer) -> None:
    """Reading INT8 weights and doing next to nothing with them: what no layer that rests in memory can beat."""
    if tokens != 1:
        pytest.skip("the same for any number of tokens")
    views = [weight.view(torch.int32) for weight in case.weights["sigma 3"]]
    record(timer, case, 1, threads, "torch max, a plain read", [v.max for v in views], bits=8.0)


def figures(tables: Tables) -> list[Figure]:
    """The ratios that the project promises."""
    result: list[Figure] = []
    isas = _C.supported_isas()[:-3:-1]
    for case, rows in tables.get("layer forward", {}).items():
        single, many = "M = 1," in case, "M = 512," in case
        packed_wanted = 1.3 if single else 1.0 if "M = 8," in case else 0.9 * many
        ratios = [("raw / torch._int_mm", dcext_row("raw", "", isas[0]), INT_MM, 1.0 * single)]
        for isa in isas:
            row, raw = dcext_row("zstd", "sigma 3", isa), dcext_row("raw", "", isa)
            ratios.append((f"zstd, sigma 3 / raw ({isa})", row, raw, 0.8 * many))
        int8 = [dcext_row("raw", "", isas[0]), INT_MM, ONEDNN]
        fastest = min((r for r in rows if r["row"] in int8), key=lambda r: r["median_s"])["row"]
        packed = dcext_row("packed", RATE, isas[0])
        what = f"packed / fastest INT8, which is {fastest}"
        ratios.append((what, packed, fastest, packed_wanted))
        for what, row, baseline, wanted in ratios:
            ratio = speed_ratio(rows, row, baseline)
            if ratio is not None:
                result.append((what, case, ratio, wanted))
    return result
