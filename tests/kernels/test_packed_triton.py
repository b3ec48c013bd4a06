"""Products with packed weights: the bits of the CPU's formulas, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packed_reference import RAW, WIDTHS, encode_packed

triton = pytest.importorskip("triton")

import dcext  # noqa: E402
from dcext.kernels.packed import PackedWeight, packed_linear  # noqa: E402
from triton_modes import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    on_device,
    on_gpu,
    requires_interpreter,
    run_in_interpreter,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@requires_interpreter
def test_this_file_in_the_interpreter():
    assert run_in_interpreter(__file__) > 0


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussian(rows: int, cols: int, sigma: float) -> np.ndarray:
    noise = seeded(rows + cols).normal(0, sigma, (rows, cols))
    return noise.round().clip(-128, 127).astype(np.int8)


def as_tensor(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


class Layer:
    """A matrix, its payload on the device, random scales and bias, and what they should compute."""

    def __init__(self, qweight: np.ndarray, widths=None, panel_rows: int = 64, plain: bool = False):
        rows, cols = qweight.shape
        generator = torch.Generator().manual_seed(rows * cols)
        self.qweight = torch.from_numpy(qweight)
        payload = as_tensor(encode_packed(qweight, widths, panel_rows))
        self.weight = PackedWeight.from_payload(payload, DEVICE)
        self.row_scale = torch.rand(rows, generator=generator) + 0.01
        self.col_scale = None if plain else torch.rand(cols, generator=generator) + 0.5
        self.bias = None if plain else torch.randn(rows, generator=generator)

    def __call__(self, x: torch.Tensor, activations: str = "int8") -> torch.Tensor:
        vectors = (self.row_scale, self.col_scale, self.bias)
        vectors = [None if vector is None else vector.to(DEVICE) for vector in vectors]
        return packed_linear(x.to(DEVICE), self.weight, *vectors, activations).cpu()

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() if self.col_scale is None else x.float() * self.col_scale

    def expected_int8(self, x: torch.Tensor) -> torch.Tensor:
        """The formulas of the header, integer sums in int64, floats one operation at a time."""
        v = self.scaled(x)
        absmax = v.abs().amax(dim=-1, keepdim=True)
        q = (v * (torch.full_like(absmax, 127) / absmax)).round().nan_to_num()
        sums = q.long().numpy() @ self.qweight.long().numpy().T
        y = torch.from_numpy(sums).float() * self.row_scale * (absmax / 127)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def check_int8(self, x: torch.Tensor) -> None:
        y, expected = self(x), self.expected_int8(x)
        assert y.dtype == x.dtype
        if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter truncates
            assert ((y.view(torch.int16) - expected.view(torch.int16)).abs() <= 1).all()
        else:
            assert torch.equal(y, expected)


def tokens(count: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 7919 + cols)
    return (torch.randn(count, cols, generator=generator) * 3).to(dtype)


@on_device
@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("width", [*WIDTHS, RAW])
def test_w8a8_is_exact_at_every_width(width, count):
    """Odd sizes; panels that end within a block of rows; from no exceptions to three of four weights."""
    layer = Layer(gaussian(53, 75, 9.0), [width] * 3, panel_rows=20)
    assert (layer.weight.exceptions is None) == (width in (6, RAW))
    layer.check_int8(tokens(count, 75))


@on_device
@pytest.mark.parametrize("count", [2, 20])
def test_panels_of_all_widths_and_more_than_one_step(count):
    layer = Layer(gaussian(180, 1100, 4.0), [2, RAW, 4, 5, 6, 3], panel_rows=32)
    layer.check_int8(tokens(count, 1100))


@on_device
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (64, 64), (3, 128)])
def test_shapes(shape):
    Layer(gaussian(*shape, 30.0), [3], plain=True).check_int8(tokens(5, shape[1]))


@on_device
def test_more_tokens_than_one_program_takes():
    Layer(gaussian(20, 40, 20.0), [4]).check_int8(tokens(131, 40))


@on_device
def test_a_tile_full_of_exceptions():
    """All weights but four values out of 256, both ends of int8 among them."""
    layer = Layer(seeded(0).integers(-128, 128, (16, 300)).astype(np.int8), [2])
    assert len(layer.weight.exceptions.column) > 0.95 * 16 * 300
    layer.check_int8(tokens(3, 300))


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("plain", [False, True])
def test_dtypes_with_and_without_scales_and_bias(dtype, plain):
    layer = Layer(gaussian(33, 70, 3.0), plain=plain)
    layer.check_int8(tokens(4, 70, dtype).reshape(2, 2, 70))


@on_device
def test_tokens_that_are_zero_tiny_or_not_finite():
    layer = Layer(gaussian(33, 70, 3.0), [3])
    x = tokens(6, 70)
    x[0] = 0
    x[1] = 1e-39
    for token, value in ((2, float("nan")), (3, float("inf")), (4, -float("inf"))):
        x[token, 50] = value
    y = layer(x)
    assert torch.equal(y[:2], layer.bias.expand(2, 33))
    assert y[2:5].isnan().all()
    assert torch.equal(y[5:], layer(x[5:]))
    assert layer(x[:0]).shape == (0, 33)


@on_device
@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_w8a16(dtype, count):
    """As accurate as float32 on inputs that are rounded once; the same bits every time."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("requires a GPU: the interpreter multiplies the bits of bfloat16")
    layer = Layer(gaussian(90, 300, 6.0), [2, RAW, 4], panel_rows=32)
    x = tokens(count, 300, dtype)
    y = layer(x, "none")
    v = layer.scaled(x).to(dtype)
    weight = layer.qweight * layer.row_scale.double()[:, None]
    exact = v.double() @ weight.T + layer.bias
    plain = (v.float() @ weight.float().T + layer.bias).double()
    error = (y.double() - exact).abs()
    tolerance = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (error <= tolerance + torch.finfo(dtype).eps / 2 * exact.abs()).all()
    assert torch.equal(y, layer(x, "none"))


@on_device
def test_inputs_that_are_not_contiguous():
    layer = Layer(gaussian(33, 70, 3.0))
    x = tokens(70, 9)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


@on_gpu
@pytest.mark.parametrize("count", [1, 16, 100, 300])
def test_a_real_layer_gives_the_bits_of_the_cpu(count):
    layer = Layer(gaussian(1000, 2048, 4.0), [3, 4, 5, 6] * 4)
    raw = dcext.DCLinear.from_qweight(
        layer.qweight, layer.row_scale, layer.col_scale, layer.bias, "raw"
    )
    x = tokens(count, 2048, torch.bfloat16)
    assert torch.equal(layer(x), raw(x))


def small_layer() -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    payload = as_tensor(encode_packed(gaussian(20, 64, 3.0), [4]))
    return torch.zeros(3, 64), PackedWeight.from_payload(payload, "cpu"), torch.ones(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 63)}, r"x: expected \(\.\.\., 64\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "got .* torch.float64"),
        ({"activations": "none"}, "torch.bfloat16, torch.float16 for activations='none'"),
        ({"activations": "int4"}, "activations: expected one of"),
        ({"row_scale": torch.ones(19)}, r"row_scale: expected contiguous \(20,\)"),
        ({"col_scale": torch.ones(64).double()}, "col_scale: expected .* got .* torch.float64"),
        ({"bias": torch.ones(40)[::2]}, "bias: expected contiguous"),
        ({"bias": torch.ones(20, device="meta")}, "bias: expected on cpu, got on meta"),
    ],
)
@pytest.mark.skipif(not INTERPRETED, reason="requires TRITON_INTERPRET=1: weights on the CPU")
def test_wrong_arguments(change, message):
    x, weight, row_scale = small_layer()
    arguments = {"x": x, "weight": weight, "row_scale": row_scale} | change
    with pytest.raises(ValueError, match=message):
        packed_linear(**arguments)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes weights on the CPU")
def test_weights_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="weight: expected on a GPU, got on cpu"):
        packed_linear(*small_layer())


def test_index_of_a_weight():
    qweight = gaussian(40, 64, 3.0)
    weight = PackedWeight.from_payload(as_tensor(encode_packed(qweight, [2, RAW], 30)), "cpu")
    codes, table = 128 + 64, 128
    raw = 128 + (64 + 2 * 2 * 128 + 2 * 32 + 3 * len(weight.exceptions.column) + 63) // 64 * 64
    assert weight.shape == (40, 64)
    assert weight.tiles[1].tolist() == [
        [codes, table, 0, 16, 2],
        [codes + 256, table, 16, 14, 2],
        [raw, raw, 30, 10, RAW],
    ]
    assert weight.tiles[4].tolist() == [[codes, table, 0, 30, 2], [raw, raw, 30, 10, RAW]]
    assert weight.exceptions.row_ptr[30:].eq(len(weight.exceptions.column)).all()
    assert weight.nbytes > weight.payload.numel()


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        (torch.zeros(64, dtype=torch.int8), ValueError, "1-D torch.uint8"),
        (torch.zeros(64, dtype=torch.uint8), dcext.FormatError, "bad magic"),
        (dcext.encode(torch.ones(4, 4, dtype=torch.int8), "raw"), ValueError, "codec packed"),
        (
            as_tensor(encode_packed(gaussian(8, 64, 3.0), [4], slab_cols=32)),
            ValueError,
            "one slab of 64 columns, got packed and slabs of 32",
        ),
    ],
)
def test_payloads_that_are_refused(payload, error, message):
    with pytest.raises(error, match=message):
        PackedWeight.from_payload(payload, "cpu")


def test_a_flipped_bit_is_found():
    payload = as_tensor(encode_packed(gaussian(20, 64, 3.0), [2]))
    payload[-70] ^= 1
    with pytest.raises(dcext.FormatError, match="checksum mismatch"):
        PackedWeight.from_payload(payload, "cpu")


@on_device
def test_gradients_are_refused_and_autocast_casts():
    layer = Layer(gaussian(32, 64, 3.0))
    x = torch.randn(3, 64, device=DEVICE).requires_grad_()
    with pytest.raises(NotImplementedError, match="packed_linear: expected arguments that do not"):
        layer(x).sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert layer(x).dtype == torch.bfloat16
