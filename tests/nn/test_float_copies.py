"""The way back: float copies of compressed layers, and compressed layers that are given other values."""

import pytest
import torch
from torch import nn

import dcext
from dcext.nn.convert import encode_anew_, float_copy

W8A16 = dcext.CompressionConfig(recipe="int8", activations="none")


def float_layers() -> dict[str, nn.Module]:
    conv1d = pytest.importorskip(
        "transformers.pytorch_utils", reason="requires transformers"
    ).Conv1D
    return {
        "linear": nn.Linear(96, 64),
        "no_bias": nn.Linear(96, 64, bias=False),
        "conv1d": conv1d(64, 96),
        "embedding": nn.Embedding(64, 96, padding_idx=3),
        "conv": nn.Conv2d(8, 64, 3, padding=1),
        "transposed": nn.ConvTranspose2d(64, 8, 2, 2),
    }


@pytest.mark.parametrize("name", float_layers())
def test_float_copies_hold_the_values_that_a_layer_stands_for(name):
    layer = float_layers()[name]
    kind, shape = type(layer), layer.weight.shape
    x = torch.randint(0, 64, (2, 5)) if name == "embedding" else torch.randn(2, 96)
    x = torch.randn(2, shape[1] if name == "conv" else 64, 6, 6) if layer.weight.dim() == 4 else x
    calls = []
    layer.register_forward_hook(lambda *call: calls.append(call))
    model = nn.Sequential(layer)
    dcext.compress_(model, W8A16)
    copied = float_copy(model)[0]
    assert type(copied) is kind
    assert copied.weight.shape == shape
    assert torch.equal(copied.weight, layer.weight.decoded())
    assert {name for name, _ in copied.named_parameters()} <= {"weight", "bias"}
    assert not copied.state_dict().keys() - {"weight", "bias"}
    assert str(copied) == str(float_layers()[name])
    torch.testing.assert_close(copied(x), layer(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("codec", ["raw", "zstd", "packed"])
def test_values_that_are_encoded_anew(codec):
    layer = dcext.DCLinear.from_qweight(
        torch.randint(-127, 128, (64, 96), dtype=torch.int8),
        torch.rand(64),
        torch.rand(96),
        codec=codec,
    )
    wanted = nn.Linear(96, 64)
    encode_anew_(layer, wanted)
    assert layer.codec == codec
    assert layer.col_scale is None
    step = wanted.weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.dequantize() - wanted.weight).abs() <= 0.501 * step).all()
    assert torch.equal(layer.bias, wanted.bias)
    broken = nn.Linear(96, 64).requires_grad_(False)
    broken.weight[3, 4] = float("nan")
    payload = layer.payload
    with pytest.raises(ValueError, match="NaN"):
        encode_anew_(layer, broken)
    assert layer.payload is payload
