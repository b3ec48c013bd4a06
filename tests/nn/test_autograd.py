"""Gradients, autocast, compilation and transforms of the operators: right, or an exception, and never silently missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dcext

ops = torch.ops.dcext
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (leading dims, in_features, out_features): tails, one and several panels, no token
SHAPES = [
    ((), 1, 1),
    ((3,), 65, 17),
    ((2, 3), 100, 40),
    ((2, 1, 5), 64, 300),
    ((0,), 64, 20),
    ((4, 0), 64, 20),
    ((33,), 576, 1200),
]


class Layer:
    """Arguments of the operators for a random layer."""

    def __init__(self, in_features: int, out_features: int, codec: str = "auto", slab_cols=None):
        generator = torch.Generator().manual_seed(in_features * 31 + out_features)
        noise = torch.randn(out_features, in_features, generator=generator) * 5
        self.qweight = noise.round().clamp(-128, 127).to(torch.int8)
        self.payload = dcext.encode(self.qweight, codec, slab_cols=slab_cols)
        self.row_scale = torch.rand(out_features, generator=generator) + 0.1
        self.col_scale = torch.rand(in_features, generator=generator) + 0.5
        self.bias = torch.randn(out_features, generator=generator)

    @property
    def weight(self) -> Tensor:
        """The float64 matrix that it stands for."""
        return self.qweight.double() * self.row_scale.double()[:, None] * self.col_scale.double()

    def __call__(self, x: Tensor, activations: str = "none") -> Tensor:
        return ops.linear(x, self.payload, self.row_scale, self.col_scale, self.bias, activations)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, exact: Tensor, terms: int) -> None:
    """Within what rounding to the dtype and ``terms`` float32 sums may add up to."""
    assert found.shape == exact.shape
    unit = torch.finfo(found.dtype).eps + 2 * terms**0.5 * torch.finfo(torch.float32).eps
    scale = exact.abs().max() if exact.numel() else 0.0
    assert ((found.double() - exact).abs() <= unit * (exact.abs() + scale)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dequantized_layer(isa, shape, activations, dtype):
    leading, in_features, out_features = shape
    for codec in ("raw", "zstd", "packed"):
        layer = Layer(in_features, out_features, codec)
        x = randn(*leading, in_features, dtype=dtype).requires_grad_()
        grad = randn(*leading, out_features, dtype=dtype, seed=1)
        y = layer(x, activations)
        assert y.requires_grad
        y.backward(grad)
        assert x.grad.dtype == dtype
        assert_near(x.grad, grad.double() @ layer.weight, out_features)


def test_column_slabs_and_no_col_scale():
    layer = Layer(300, 200, "zstd", slab_cols=70)
    grad = randn(7, 200)
    found = ops.linear_input_grad(grad, layer.payload, layer.row_scale, None, 300)
    exact = (grad.double() * layer.row_scale) @ layer.qweight.double()
    assert_near(found, exact, 200)


def test_more_rows_than_one_block_holds():
    layer = Layer(4096, 1500, "zstd")  # 24 MiB of float32
    grad = randn(5, 1500)
    found = ops.linear_input_grad(grad, layer.payload, layer.row_scale, layer.col_scale, 4096)
    assert_near(found, grad.double() @ layer.weight, 1500)


def test_gradients_that_are_not_contiguous():
    layer = Layer(64, 30)
    x = randn(30, 5, 64).transpose(0, 1).requires_grad_()
    grad = randn(30, 30, 5).permute(2, 1, 0)
    layer(x).backward(grad)
    assert_near(x.grad, grad.double() @ layer.weight, 30)
    x.grad = None
    layer(x).sum().backward()  # a gradient with strides of 0
    assert_near(x.grad, torch.ones(5, 30, 30).double() @ layer.weight, 30)


def test_all_branches_of_a_residual_are_counted():
    layer = Layer(64, 64)
    x = randn(3, 64).requires_grad_()
    (x + layer(x, "int8")).square().sum().backward()
    y = x.detach() + layer(x.detach(), "int8")
    assert_near(x.grad, 2 * (y.double() + y.double() @ layer.weight), 64)


def test_gradcheck_of_first_and_second_derivatives():
    """In float64 around the float32 operator, whose values are small integers: everything is exact."""
    layer = Layer(6, 5)
    layer.row_scale, layer.col_scale = torch.full((5,), 0.5), torch.full((6,), 2.0)
    layer.bias = torch.zeros(5)
    x = torch.randint(-4, 5, (3, 6)).double().requires_grad_()

    def call(x: Tensor) -> Tensor:
        return layer(x.float()).double()

    assert torch.autograd.gradcheck(call, x, eps=1.0)
    assert torch.autograd.gradgradcheck(
        call, x, torch.randint(-4, 5, (3, 5)).double().requires_grad_(), eps=1.0
    )


def test_bias_has_gradients_and_scales_refuse():
    layer = Layer(64, 30)
    x = randn(2, 3, 64).requires_grad_()
    layer.bias.requires_grad_()
    grad = randn(2, 3, 30)
    layer(x).backward(grad)
    assert_near(layer.bias.grad, grad.double().sum((0, 1)), 6)
    layer.bias.grad = None
    layer(x.detach()[0, 0]).backward(grad[0, 0])  # for bias alone, of one token
    assert torch.equal(layer.bias.grad, grad[0, 0])
    for scale in (layer.row_scale, layer.col_scale):
        scale.requires_grad_()
        with pytest.raises(NotImplementedError, match="expected tensors that do not require grad"):
            layer(x).sum().backward()
        scale.requires_grad_(False)


def test_no_graph_where_none_is_asked_for():
    layer = Layer(64, 30)
    x = randn(3, 64)
    assert not layer(x).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad


def test_other_operators_raise_in_backward():
    layer = Layer(64, 30)
    x, scale = randn(3, 64).requires_grad_(), layer.row_scale.clone().requires_grad_()
    acc = torch.ones(3, 30, dtype=torch.int32)
    for y in (
        ops.quantize_activations(x, None)[1],
        ops.dequantize(acc, scale, torch.ones(3), None, torch.float32),
        ops.dequantize_weight(layer.payload, scale, None, 64, torch.float32),
        ops.embedding(torch.tensor([1]), layer.payload, scale, None, 64, torch.float32),
    ):
        assert y.requires_grad
        with pytest.raises(RuntimeError, match=r"derivative for dcext::.* is not implemented"):
            y.sum().backward()


@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_compiles_as_one_graph(backend, activations):
    torch._dynamo.reset()
    layer = Layer(64, 64)

    def step(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(layer(x, activations)) + x

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (3, 8, 17):
        x = randn(2, tokens, 64).requires_grad_()
        same = x.detach().clone().requires_grad_()
        (compiled(x) * randn(64, seed=1)).sum().backward()
        (step(same) * randn(64, seed=1)).sum().backward()
        assert torch.allclose(x.grad, same.grad, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_autograd_traces_the_gradient():
    torch._dynamo.reset()
    layer = Layer(64, 64)
    x = randn(3, 64).requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x).sum().backward()
    assert_near(x.grad, torch.ones(3, 64).double() @ layer.weight, 64)


def test_opcheck():
    layer = Layer(64, 20)
    x = randn(2, 3, 64).requires_grad_()
    scales = (layer.row_scale, layer.col_scale)
    for activations in ("none", "int8"):
        arguments = (x, layer.payload, *scales, layer.bias, activations)
        torch.library.opcheck(ops.linear.default, arguments)
    grad = randn(2, 3, 20).requires_grad_()
    torch.library.opcheck(ops.linear_input_grad.default, (grad, layer.payload, *scales, 64))
    weight = (layer.payload, *scales, 64, torch.bfloat16)
    torch.library.opcheck(ops.dequantize_weight.default, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_a_float_layer_does(dtype):
    layer = Layer(64, 30)
    x = randn(3, 64).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x, "int8")
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.to(dtype), "int8"))
    y.backward(randn(3, 30, dtype=dtype))
    assert x.grad.dtype == torch.float32
    assert_near(x.grad.to(dtype), randn(3, 30, dtype=dtype).double() @ layer.weight, 30)


def test_autocast_compiles():
    torch._dynamo.reset()
    layer = Layer(64, 30)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, "int8")

    x = randn(3, 64)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))
    assert compiled(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["raw", "zstd", "packed"])
def test_dequantize_weight(isa, codec, dtype):
    for slab_cols in (None, 37):
        layer = Layer(100, 300, codec, slab_cols)
        arguments = (layer.payload, layer.row_scale, layer.col_scale, 100, dtype)
        found = ops.dequantize_weight(*arguments)
        exact = layer.qweight.float() * layer.row_scale[:, None] * layer.col_scale
        assert torch.equal(found, exact.to(dtype))
    with pytest.raises(ValueError, match="in_features: expected the payload's 100, got 99"):
        ops.dequantize_weight(layer.payload, layer.row_scale, None, 99, dtype)


def test_dequantize_weight_verifies():
    layer = Layer(100, 300, "zstd")
    layer.payload[-100] ^= 1
    with pytest.raises(dcext.FormatError, match="checksum mismatch in chunk"):
        ops.dequantize_weight(layer.payload, layer.row_scale, None, 100, torch.float32)


def test_a_weight_of_which_only_the_dtype_is_read_is_never_made():
    """The payload is damaged: whoever decoded it would raise."""
    torch._dynamo.reset()
    layer = Layer(64, 30)
    damaged = layer.payload.clone()
    damaged[-1] ^= 1

    def call(x: Tensor) -> Tensor:
        weight = ops.dequantize_weight(damaged, layer.row_scale, None, 64, torch.bfloat16)
        return layer(x.to(weight.dtype)) * weight.shape[0]

    x = randn(3, 64)
    with pytest.raises(dcext.FormatError):
        call(x)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x.bfloat16()) * 30)


def test_vmap_maps_activations():
    layer = Layer(64, 30)
    x = randn(4, 64, 3)
    mapped = torch.vmap(layer, in_dims=2, out_dims=1)(x)
    assert torch.equal(mapped, layer(x.movedim(2, 0)).movedim(0, 1))
    rows = torch.vmap(
        lambda i: ops.embedding(i, layer.payload, layer.row_scale, None, 64, torch.float32)
    )
    indices = torch.tensor([[1, 2], [3, 29]])
    assert torch.equal(
        rows(indices),
        ops.embedding(indices, layer.payload, layer.row_scale, None, 64, torch.float32),
    )
    x = randn(4, 3, 64).requires_grad_()
    torch.vmap(layer)(x).sum().backward()
    assert_near(x.grad, torch.ones(4, 3, 30).double() @ layer.weight, 30)
    with pytest.raises(NotImplementedError, match="expected the first argument alone to be mapped"):
        torch.vmap(lambda scale: ops.linear(x[0], layer.payload, scale, None, None, "none"))(
            torch.stack([layer.row_scale] * 2)
        )


def test_functional_transforms_refuse():
    layer = Layer(64, 30)
    x, tangent = randn(3, 64), randn(3, 64, seed=1)
    for transform in (
        lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda: torch.func.vjp(layer, x)[1](torch.ones(3, 30)),
        lambda: torch.func.jvp(layer, (x,), (tangent,)),
        lambda: torch.func.jacrev(layer)(x),
    ):
        with pytest.raises(RuntimeError):
            transform()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(dual)
