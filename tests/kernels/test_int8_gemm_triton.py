"""Products with plain int8 weights: the bits of the CPU's operator, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import dcext  # noqa: E402
from dcext.kernels import int8_gemm_tuning as tuning  # noqa: E402
from dcext.kernels.activations import quantize_tile  # noqa: E402
from dcext.kernels.int8_gemm import int8_linear  # noqa: E402
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


class Layer:
    """Random weights, scales and bias, and what they should compute."""

    def __init__(self, rows: int, cols: int, plain: bool = False, num_outliers: int = 0):
        generator = torch.Generator().manual_seed(rows * 7919 + cols)
        self.qweight = torch.randint(-128, 128, (rows, cols), generator=generator).to(torch.int8)
        self.row_scale = torch.rand(rows, generator=generator) + 0.01
        self.col_scale = None if plain else torch.rand(cols, generator=generator) + 0.5
        self.bias = None if plain else torch.randn(rows, generator=generator) * 100
        self.outliers = None
        if num_outliers:
            index = torch.randperm(cols, generator=generator)[:num_outliers].sort()[0].int()
            weight = torch.randn(rows, num_outliers, generator=generator) * 500
            self.outliers = (index, weight.bfloat16())
            self.qweight[:, index.long()] = 0
            if self.col_scale is not None:
                self.col_scale[index.long()] = 2.0**-40

    def arguments(self) -> tuple:
        vectors = (self.row_scale, self.col_scale, self.bias)
        moved = [None if vector is None else vector.to(DEVICE) for vector in vectors]
        outliers = self.outliers and tuple(tensor.to(DEVICE) for tensor in self.outliers)
        return self.qweight.to(DEVICE), *moved, outliers

    def __call__(self, x: torch.Tensor, activations: str = "int8") -> torch.Tensor:
        return int8_linear(x.to(DEVICE), *self.arguments(), activations).cpu()

    def expected_int8(self, x: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """What the CPU computes without the outlier columns."""
        payload = dcext.encode(self.qweight, "raw")
        vectors = (self.row_scale, self.col_scale, self.bias if bias else None)
        return torch.ops.dcext.linear(x, payload, *vectors, "int8")

    def check_int8(self, x: torch.Tensor) -> None:
        assert_same_bits(self(x), self.expected_int8(x))


def assert_same_bits(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert y.dtype == expected.dtype
    if INTERPRETED and y.dtype == torch.bfloat16:  # the interpreter truncates
        assert ((y.view(torch.int16) - expected.view(torch.int16)).abs() <= 1).all()
    else:
        assert torch.equal(y, expected)


def tokens(count: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count * 7919 + cols)
    return (torch.randn(count, cols, generator=generator) * 3).to(dtype)


@on_device
@pytest.mark.parametrize("count", [1, 9, 20, 40, 65])
@pytest.mark.parametrize("shape", [(53, 75), (16, 1040)])
def test_w8a8_is_exact_in_every_class(shape, count):
    """Tiles that end within rows, tokens and columns, aligned and not; one step and several."""
    Layer(*shape).check_int8(tokens(count, shape[1]))


@on_device
def test_w8a8_is_exact_in_the_class_of_most_tokens():
    Layer(130, 140).check_int8(tokens(260, 140))


@on_device
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (300, 64), (3, 2)])
def test_shapes(shape):
    """More tiles of rows than a group, too."""
    Layer(*shape, plain=True).check_int8(tokens(5, shape[1]))


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("plain", [False, True])
def test_dtypes_with_and_without_scales_and_bias(dtype, plain):
    layer = Layer(33, 70, plain)
    layer.check_int8(tokens(4, 70, dtype).reshape(2, 2, 70))
    layer.check_int8(tokens(1, 70, dtype)[0])


@on_device
def test_the_largest_products():
    layer = Layer(3, 1000, plain=True)
    layer.qweight.fill_(-128)
    layer.check_int8(torch.full((1, 1000), -3.0))


@on_device
def test_columns_that_do_not_fit_in_registers():
    cols = 40000
    assert not quantize_tile(2, cols)["WHOLE"]
    Layer(2, cols).check_int8(tokens(2, cols))


@on_device
def test_every_choice_gives_the_same_bits():
    layer = Layer(70, 300)
    x = tokens(7, 300)
    expected = layer.expected_int8(x)
    for most in (8, 16, 32, 64):
        for config in tuning.choices(most, 1):
            assert torch.equal(run_choice(config, layer, x), expected), str(config)


def run_choice(config: triton.Config, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    qweight, row_scale, _, bias, _ = layer.arguments()
    quantized, act_scale = torch.ops.dcext.quantize_activations(x, layer.col_scale)
    (count, cols), rows = x.shape, len(qweight)
    y = x.new_empty((count, rows), device=DEVICE)
    tiles = triton.cdiv(rows, config.kwargs["ROWS"]) * triton.cdiv(count, config.kwargs["TOKENS"])
    tensors = (qweight, quantized.to(DEVICE), row_scale, act_scale.to(DEVICE), bias)
    sizes = (count, rows, cols, cols, cols, 0, 8)
    tuning.multiply[(tiles,)](*tensors, None, None, None, y, *sizes, **config.all_kwargs())
    return y.cpu()


@on_device
def test_tokens_that_are_zero_tiny_or_not_finite():
    layer = Layer(33, 70)
    x = tokens(6, 70)
    x[0] = 0
    x[1] = 1e-39
    for token, value in ((2, float("nan")), (3, float("inf")), (4, -float("inf"))):
        x[token, 50] = value
    y = layer(x)
    assert torch.equal(y[:2], layer.bias.expand(2, 33))
    assert y[2:5].isnan().all()
    assert torch.equal(y[5:], layer(x[5:]))
    assert torch.equal(y[:2], layer.expected_int8(x[:2]))


@on_device
def test_no_tokens():
    layer = Layer(33, 70, num_outliers=2)
    assert layer(torch.zeros(0, 70)).shape == (0, 33)
    assert layer(torch.zeros(2, 0, 70, dtype=torch.float16), "none").shape == (2, 0, 33)


@on_device
@pytest.mark.parametrize("stride", [75, 96])
def test_rows_of_weights_at_any_distance(stride):
    """The weights are part of a larger matrix, not its first rows."""
    layer = Layer(40, 70)
    expected = layer.expected_int8(tokens(3, 70))
    larger = torch.full((45, stride), 99, dtype=torch.int8)
    larger[5:, :70] = layer.qweight
    _, *others = layer.arguments()
    y = int8_linear(tokens(3, 70).to(DEVICE), larger.to(DEVICE)[5:, :70], *others)
    assert torch.equal(y.cpu(), expected)


@on_device
def test_inputs_that_are_not_contiguous():
    layer = Layer(33, 70)
    x = tokens(70, 9)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


@on_device
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("num_outliers", [1, 16, 19])
def test_outlier_columns(num_outliers, count):
    """As accurate as the same sums in float32."""
    layer = Layer(53, 75, num_outliers=num_outliers)
    x = tokens(count, 75)
    y = layer(x)
    index, weight = layer.outliers
    inside = layer.expected_int8(x, bias=False).double()
    columns = x[:, index.long()]
    exact = inside + columns.double() @ weight.double().T + layer.bias
    plain = (inside.float() + columns @ weight.float().T + layer.bias).double()
    bound = 2 * (plain - exact).abs().max() + 2.0**-23 * exact.abs().max()
    assert ((y.double() - exact).abs() <= bound).all()
    assert torch.equal(y, layer(x))


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outlier_columns_of_16_bits_are_rounded_once(dtype):
    layer = Layer(53, 75, num_outliers=3)
    layer.row_scale *= 0.1
    layer.outliers = (layer.outliers[0], (layer.outliers[1] / 100).bfloat16())
    x = tokens(5, 75, dtype)
    index, weight = layer.outliers
    inside = layer.expected_int8(x.float(), bias=False).double()
    exact = inside + x[:, index.long()].double() @ weight.double().T + layer.bias
    # A truncating interpreter is off by one unit in the last place of bfloat16 instead of by half.
    unit = torch.finfo(dtype).eps * (1 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
    assert ((layer(x).double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-3).all()


@on_device
def test_outlier_columns_outside_count_as_zeros():
    layer = Layer(20, 64, num_outliers=3)
    index, weight = layer.outliers
    x = tokens(2, 64)
    changed, masked = index.clone(), weight.clone()
    changed[1], masked[:, 1] = 64, 0
    layer.outliers = (index, masked)
    expected = layer(x)
    layer.outliers = (changed, weight)
    assert torch.equal(layer(x), expected)
    changed[1] = -1
    assert torch.equal(layer(x), expected)


@on_device
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cols", [300, 64])
@pytest.mark.parametrize("plain", [False, True])
def test_w8a16(dtype, count, cols, plain):
    """As accurate as float32 on inputs that are rounded once; the same bits every time."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("requires a GPU: the interpreter multiplies the bits of bfloat16")
    layer = Layer(50, cols, plain, num_outliers=0 if plain else 2)
    layer.row_scale *= 0.01
    x = tokens(count, cols, dtype)
    y = layer(x, "none")
    v = (x.float() if plain else x.float() * layer.col_scale).to(dtype)
    weight = layer.qweight * layer.row_scale.double()[:, None]
    exact = v.double() @ weight.T
    plain_sum = v.float() @ weight.float().T
    if not plain:
        index, outlier_weight = layer.outliers
        columns = x[:, index.long()]
        exact += columns.double() @ outlier_weight.double().T + layer.bias
        plain_sum += columns.float() @ outlier_weight.float().T + layer.bias
    error = (y.double() - exact).abs()
    tolerance = 2 * (plain_sum.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (error <= tolerance + torch.finfo(dtype).eps / 2 * exact.abs()).all()
    assert torch.equal(y, layer(x, "none"))


@on_gpu
@pytest.mark.parametrize("count", [1, 16, 100, 300])
def test_a_real_layer_gives_the_bits_of_the_cpu(count):
    Layer(1000, 2048).check_int8(tokens(count, 2048, torch.bfloat16))


@on_gpu
def test_in_a_cuda_graph():
    layer = Layer(256, 512)
    arguments = layer.arguments()
    x = tokens(4, 512, torch.float16).to(DEVICE)
    expected = int8_linear(x, *arguments)  # tunes and compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int8_linear(x, *arguments)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@on_gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    layer = Layer(256, 512)
    arguments = layer.arguments()
    compiled = torch.compile(
        lambda x: int8_linear(x, *arguments) * 2, fullgraph=True, dynamic=dynamic
    )
    for count in (3, 70):
        x = tokens(count, 512, torch.float16).to(DEVICE)
        assert torch.equal(compiled(x), int8_linear(x, *arguments) * 2)


def operator_arguments(activations: str, num_outliers: int) -> tuple:
    layer = Layer(20, 64, num_outliers=num_outliers)
    *others, outliers = layer.arguments()
    x = tokens(3, 64, torch.float16).to(DEVICE)
    return x, *others, *(outliers or (None, None)), activations


@on_device
@pytest.mark.parametrize(("activations", "num_outliers"), [("int8", 0), ("int8", 3), ("none", 0)])
def test_opcheck(activations, num_outliers):
    """Tracing what is inside needs a compiler."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not INTERPRETED:
        checks.append("test_aot_dispatch_dynamic")
    operator = torch.ops.dcext.int8_linear.default
    torch.library.opcheck(
        operator, operator_arguments(activations, num_outliers), test_utils=checks
    )


@on_device
@pytest.mark.skipif(not INTERPRETED, reason="requires TRITON_INTERPRET=1")
def test_the_interpreter_does_not_tune():
    assert all(len(tuner.configs) == 1 for tuner in tuning._tuners(tuning.multiply).values())


def small_layer() -> dict[str, object]:
    return {
        "x": torch.zeros(3, 64),
        "qweight": torch.zeros(20, 64, dtype=torch.int8),
        "row_scale": torch.ones(20),
    }


INDEX, WEIGHT = torch.zeros(2, dtype=torch.int32), torch.zeros(20, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 63)}, r"x: expected \(\.\.\., 64\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "got .* torch.float64"),
        ({"activations": "none"}, "torch.bfloat16, torch.float16 for activations='none'"),
        ({"activations": "int4"}, "activations: expected one of"),
        ({"qweight": torch.zeros(20, 64)}, "qweight: expected 2-D torch.int8, .* torch.float32"),
        ({"qweight": torch.zeros(64, dtype=torch.int8)}, r"qweight: .* got \(64,\)"),
        ({"qweight": torch.zeros(0, 64, dtype=torch.int8)}, "qweight: .* not empty"),
        ({"qweight": torch.zeros(64, 20, dtype=torch.int8).T}, r"contiguous rows, .* \(1, 20\)"),
        (
            {"qweight": torch.zeros(1, 2**17 + 1, dtype=torch.int8)},
            "at most 131072 columns, got 131073",
        ),
        (
            {"qweight": torch.zeros(2, 2**22 + 1, dtype=torch.int8)[:, :64]},
            r"no farther apart, got 2 and strides \(4194305, 1\)",
        ),
        ({"row_scale": torch.ones(19)}, r"row_scale: expected contiguous \(20,\)"),
        ({"col_scale": torch.ones(64).double()}, "col_scale: expected .* got .* torch.float64"),
        ({"bias": torch.ones(40)[::2]}, "bias: expected contiguous"),
        ({"bias": torch.ones(20, device="meta")}, "bias: expected on cpu, got on meta"),
        ({"outliers": (INDEX.long(), WEIGHT)}, r"outlier_index: .* \(2,\) torch.int32"),
        ({"outliers": (INDEX, WEIGHT[:19])}, r"outlier_weight: .* \(20, 2\) torch.bfloat16"),
        ({"outliers": (INDEX, WEIGHT.float())}, "outlier_weight: .* got .* torch.float32"),
        ({"outliers": (INDEX, None)}, "outliers: expected both of index and weight"),
    ],
)
@pytest.mark.skipif(not INTERPRETED, reason="requires TRITON_INTERPRET=1: weights on the CPU")
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        int8_linear(**(small_layer() | change))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes weights on the CPU")
def test_weights_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="qweight: expected on a GPU, got on cpu"):
        int8_linear(**small_layer())


@on_device
def test_gradients_are_refused_and_autocast_casts():
    layer = Layer(32, 64)
    x = torch.randn(3, 64, device=DEVICE).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        layer(x).sum().backward()
    x = x.detach()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
