"""The CUDA operators give the CPU's bits."""

from __future__ import annotations

import pytest
import torch

import dcext

pytestmark = pytest.mark.skipif(
    not (dcext.build_info()["cuda"] and torch.cuda.is_available()),
    reason="requires a CUDA build and a GPU",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.dcext


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 3, 1000), (4, 4096), (2, 11008)])
def test_quantize_activations(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    x[..., 0, :] = 0
    for col_scale in (None, torch.rand(shape[-1]) + 0.5):
        expected = ops.quantize_activations(x, col_scale)
        found = ops.quantize_activations(x.cuda(), None if col_scale is None else col_scale.cuda())
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite(value):
    x = torch.randn(3, 100)
    x[1, 50] = value
    q, scale = ops.quantize_activations(x.cuda(), None)
    assert q[1].eq(0).all()
    assert scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 1000), (4, 4096)])
def test_dequantize(shape, dtype):
    acc = torch.randint(-(2**30), 2**30, shape, dtype=torch.int32)
    row_scale, act_scale = torch.rand(shape[-1]) * 1e-6, torch.rand(shape[:-1])
    for bias in (None, torch.randn(shape[-1])):
        expected = ops.dequantize(acc, row_scale, act_scale, bias, dtype)
        arguments = [acc, row_scale, act_scale, bias]
        arguments = [None if argument is None else argument.cuda() for argument in arguments]
        assert torch.equal(ops.dequantize(*arguments, dtype).cpu(), expected)
