"""Compressed modules are what they were before: names, hooks, classes, flags; and their weight can be read."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import dcext
from dcext.find import ROUTER
from dcext.nn.compressed import CompressedModule, compressed_modules
from dcext.nn.views import MatrixView, StackView

W8A16 = dcext.CompressionConfig(recipe="int8", activations="none")
CODECS = ["raw", "zstd", "packed"]


class ScaledLinear(nn.Linear):
    """Behaviour on top of a linear layer, as Gemma's embeddings or Llama 4's router have it."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        super().__init__(inputs, outputs)
        self.factor = factor
        self.register_buffer("offset", torch.full((outputs,), 0.5))

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        return super().forward(x) * self.factor + self.offset + shift


class ScaledEmbedding(nn.Embedding):
    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices + 2) * 3.0


def seeded(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def close(a: torch.Tensor, b: torch.Tensor, share: float = 0.02) -> bool:
    return float((a - b).detach().norm() / b.detach().norm()) < share


def with_dequantized(module: nn.Module, compressed: nn.Module) -> nn.Module:
    """A float module with the weights that a compressed one stands for."""
    for name, layer in compressed_modules(compressed).items():
        float_layer = module.get_submodule(name)
        with torch.no_grad():
            float_layer.weight.copy_(layer.weight.decoded())
    return module


@pytest.mark.parametrize("codec", CODECS)
def test_weight_reads_as_a_tensor(codec):
    layer = seeded(nn.Linear(96, 64)).bfloat16()
    compressed = dcext.DCLinear.from_float(layer, codec=codec)
    weight = compressed.weight
    assert isinstance(weight, MatrixView)
    assert weight.shape == layer.weight.shape
    assert weight.dtype == torch.bfloat16
    assert weight.device.type == "cpu"
    assert weight.numel() == 96 * 64
    assert not weight.requires_grad
    assert torch.equal(weight + 0, compressed.dequantize())
    assert torch.equal(weight[3:5], compressed.dequantize()[3:5])
    assert torch.equal(weight.to(torch.float32), compressed.dequantize().float())
    assert type(weight.float()) is torch.Tensor
    assert "decoded where it is used" in repr(weight)
    assert torch.equal(copy.deepcopy(weight), compressed.dequantize())
    assert torch.equal(pickle.loads(pickle.dumps(weight)), compressed.dequantize())
    assert weight.detach().shape == weight.data.shape == weight.shape


def test_products_with_the_weight_are_the_layers_own():
    layer = seeded(nn.Linear(96, 64))
    compressed = dcext.DCLinear.from_float(layer, codec="zstd", activations="none")
    x = torch.randn(3, 96)
    expected = compressed(x) - compressed.bias
    for product in (
        functional.linear(x, compressed.weight),
        x @ compressed.weight.T,
        x.matmul(compressed.weight.t()),
        torch.matmul(x, compressed.weight.transpose(0, 1)),
    ):
        torch.testing.assert_close(product, expected)
    assert compressed.weight.T.T.shape == layer.weight.shape
    with_bias = functional.linear(x, compressed.weight, compressed.bias)
    torch.testing.assert_close(with_bias, compressed(x))


def test_the_weight_is_read_only():
    compressed = dcext.DCLinear.from_float(seeded(nn.Linear(32, 16)))
    before = compressed.dequantize()
    for write in (
        lambda: compressed.weight.zero_(),
        lambda: compressed.weight.copy_(torch.zeros(16, 32)),
        lambda: compressed.weight.add_(1),
        lambda: nn.init.zeros_(compressed.weight),
        lambda: compressed.weight.requires_grad_(True),
        lambda: compressed.weight.requires_grad_(),
        lambda: torch.add(before, 1, out=compressed.weight),
    ):
        with pytest.raises(RuntimeError, match=r"read-only"):
            write()
    for value in (nn.Parameter(torch.zeros(16, 32)), torch.zeros(16, 32)):
        with pytest.raises(AttributeError, match="compressed and read-only"):
            compressed.weight = value
    compressed.weight = compressed.weight  # what ties weights does this
    assert compressed.weight.requires_grad_(False).shape == (16, 32)
    assert torch.equal(compressed.dequantize(), before)


def test_weights_can_be_scaled_in_place():
    """RWKV does so when it is first run."""
    compressed = dcext.DCLinear.from_float(seeded(nn.Linear(32, 16)))
    before = compressed.dequantize()
    compressed.weight.div_(4)
    torch.testing.assert_close(compressed.dequantize(), before / 4)
    compressed.weight.mul_(4)
    torch.testing.assert_close(compressed.dequantize(), before)


def test_subclasses_keep_what_they_add():
    model = seeded(
        nn.ModuleDict({"linear": ScaledLinear(64, 48, 2.0), "table": ScaledEmbedding(32, 64)})
    )
    x, ids = torch.randn(4, 64), torch.arange(8)
    expected = model["linear"](x, shift=1.0), model["table"](ids)
    dcext.compress_(model, W8A16)
    assert isinstance(model["linear"], ScaledLinear)
    assert isinstance(model["linear"], dcext.DCLinear)
    assert isinstance(model["table"], ScaledEmbedding)
    assert type(model["linear"]).__name__ == "DCScaledLinear"
    assert close(model["linear"](x, shift=1.0), expected[0])
    assert close(model["table"](ids), expected[1])


def test_a_model_that_is_a_layer():
    layer = seeded(nn.Linear(64, 32))
    result = dcext.compress_(layer, W8A16)
    assert result is layer
    assert isinstance(layer, dcext.DCLinear)


def test_modules_stay_the_same_objects_with_hooks_and_flags():
    model = seeded(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)))
    first = model[0]
    calls = []
    first.register_forward_hook(lambda module, args, y: calls.append("after"))
    first.register_forward_pre_hook(lambda module, args: calls.append("before"))
    first.marked = "mine"
    first.train()
    dcext.compress_(model, W8A16)
    model(torch.randn(2, 64))
    assert model[0] is first
    assert calls == ["before", "after"]
    assert first.marked == "mine"
    assert first.training
    assert not model[1].training


def test_a_module_under_two_names():
    shared = nn.Linear(64, 64)
    model = seeded(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(64, 64)}))
    dcext.compress_(model, W8A16)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], dcext.DCLinear)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(32, 48, 1),
        nn.Conv1d(16, 32, 5, padding=2),
        nn.Conv2d(3, 64, 8, stride=8),
        nn.Conv2d(32, 32, 3, padding="same", groups=2),
        nn.Conv2d(32, 32, 1, stride=2),
        nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4)),
        nn.ConvTranspose1d(32, 16, 4, stride=2),
    ],
    ids=str,
)
def test_convolutions(module):
    model = seeded(nn.Sequential(module))
    reference = seeded(copy.deepcopy(model))
    sizes = {1: (33,), 2: (33, 32), 3: (5, 9, 8)}[len(module.kernel_size)]
    x = torch.randn(2, module.in_channels, *sizes)
    dcext.compress_(model, W8A16)
    assert isinstance(model[0], CompressedModule)
    assert isinstance(model[0], type(module))
    assert model[0].weight.shape == module.weight.shape
    expected = with_dequantized(reference, model)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x[:1]), expected[:1], rtol=1e-3, atol=1e-4)


def test_pruned_and_normed_layers():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv1d(16, 32, 3), nn.Linear(64, 64)
    )
    seeded(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    parametrizations.weight_norm(model[1])
    nn.utils.weight_norm(model[2])
    parametrizations.orthogonal(model[3])
    weights = [layer.weight.detach().clone() for layer in model]
    dcext.compress_(model, W8A16)
    for layer, weight in zip(model, weights, strict=True):
        assert isinstance(layer, CompressedModule)
        assert close(layer.weight.decoded(), weight)
    assert float((model[0].decode_qweight() == 0).float().mean()) >= 0.5
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied[2].weight.decoded(), model[2].weight.decoded())


def test_copies_of_a_normed_layer_stay_what_they_are():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)))
    copied = copy.deepcopy(model)  # the class of its layer is the same object
    x = torch.randn(2, 64)
    expected = copied(x)
    dcext.compress_(model, W8A16)
    assert torch.equal(copied(x), expected)
    dcext.compress_(copied, W8A16)
    assert torch.equal(copied(x), model(x))


def test_attention_transformers_and_recurrent_networks_of_torch():
    cases = [
        (nn.MultiheadAttention(64, 4, batch_first=True), (torch.randn(2, 5, 64),) * 3),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2), None),
        (nn.LSTM(64, 48, num_layers=2), (torch.randn(5, 2, 64),)),
        (nn.GRU(64, 48, bidirectional=True), (torch.randn(5, 2, 64),)),
    ]
    for module, inputs in cases:
        inputs = inputs or (torch.randn(2, 5, 64),)
        model = seeded(module)
        with torch.no_grad():  # where torch would take its fast path
            expected = model(*inputs)
            dcext.compress_(model, W8A16)
            found = model(*inputs)
        if isinstance(expected, tuple):
            expected, found = expected[0], found[0]
        assert close(found, expected), type(module).__name__
        assert model.dcext_report.matrix_coverage == 1
        assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs)[0], model(*inputs)[0])


def test_ties_survive_the_models_own_state_dict():
    model = nn.ModuleDict({"table": nn.Embedding(128, 64), "head": nn.Linear(64, 128, bias=False)})
    seeded(model)
    model["head"].weight = model["table"].weight
    dcext.compress_(model, W8A16)
    assert model["head"].payload is model["table"].payload
    state = copy.deepcopy(model.state_dict())
    for given in (model.state_dict(), state):
        model.load_state_dict(given)
        assert model["head"].payload is model["table"].payload
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"table": nn.Embedding(128, 64), "head": nn.Linear(64, 128, bias=False)})
    other["head"].weight = other["table"].weight
    dcext.compress_(other, W8A16)
    other.load_state_dict(torch.load(file))
    assert other["head"].payload is other["table"].payload
    assert torch.equal(other["head"].dequantize(), model["head"].dequantize())


def test_copies_pickles_and_saved_models():
    model = seeded(nn.Sequential(ScaledLinear(64, 64, 2.0), nn.Linear(64, 32)))
    dcext.compress_(model, W8A16)
    x = torch.randn(3, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), model(x))
        assert isinstance(other[0], ScaledLinear)
        assert type(other[0]) is type(model[0])


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts(cast):
    model = seeded(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    dcext.compress_(model, W8A16)
    getattr(model, cast)()
    dtype = model[1].weight.dtype
    assert model[0].weight.dtype == dtype
    assert next(model[0].parameters()).dtype == dtype
    assert model[0].row_scale.dtype == torch.float32
    if cast == "double":
        with pytest.raises(TypeError, match=r"float32, torch.bfloat16 or torch.float16|expected"):
            model(torch.randn(2, 64).double())
    else:
        assert model(torch.randn(2, 64).to(dtype)).dtype == dtype
    assert model.cpu()[0].payload.device.type == "cpu"
    assert model.to("cpu", torch.bfloat16)[0].dtype == torch.bfloat16


def test_parameters_tell_dtype_and_device_and_weigh_nothing():
    model = seeded(nn.Sequential(nn.Linear(64, 64))).bfloat16()
    dcext.compress_(model, W8A16)
    parameter = next(model.parameters())
    assert (parameter.dtype, parameter.device.type, parameter.numel()) == (torch.bfloat16, "cpu", 0)
    assert not any(p.requires_grad for p in model.parameters())
    assert all("_compute_dtype" not in key for key in model.state_dict())
    model.load_state_dict(model.state_dict())


class Experts(nn.Module):
    """A stack that is read expert by expert, in either orientation."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, 64, 96) if transposed else torch.randn(4, 96, 64))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        if self.is_transposed:
            return x @ self.up[expert]
        return functional.linear(x, self.up[expert])


@pytest.mark.parametrize("transposed", [False, True])
def test_only_the_experts_that_are_used_are_decoded(transposed):
    model = seeded(Experts(transposed))
    x = torch.randn(3, 64)
    expected = model(x, torch.tensor(2))
    dcext.compress_(model, W8A16)
    calls = []
    for i, item in enumerate(model.up_items):
        item.register_forward_hook(lambda module, args, y, i=i: calls.append(i))
    assert isinstance(model.up, StackView)
    assert close(model(x, torch.tensor(2)), expected)
    assert calls == [2]
    assert model.up.shape == (4, 64, 96) if transposed else (4, 96, 64)
    assert torch.bmm(torch.zeros(4, 1, model.up.shape[1]), model.up).abs().sum() == 0
    stacked = model.up + 0
    assert close(stacked[1], model.up[1] + 0, 1e-6)
    for item in model.up_items:
        item._forward_hooks.clear()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x, torch.tensor(1)), model(x, torch.tensor(1)))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))


def test_routers_stay_float_and_the_report_says_so():
    model = dcext.compress_(seeded(Routed()), W8A16)
    assert type(model.gate) is nn.Linear
    report = model.dcext_report
    assert report.left_by_reason()[ROUTER] == 256
    assert report.compressed_weights == 4 * 64 * 64
    assert f"256 {ROUTER}" in report.describe_coverage()


class NormHead(nn.Module):
    """A head of remote code: its name is that of a norm, its weight a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, functional.normalize(self.weight))


def test_parameters_are_told_from_norms_by_what_they_are():
    model = seeded(nn.Sequential(NormHead()))
    x = torch.randn(2, 64)
    expected = model(x)
    dcext.compress_(model, W8A16)
    assert model.dcext_report.matrix_coverage == 1
    assert close(model(x), expected)


def test_include_and_exclude():
    model = seeded(nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}))
    dcext.compress_(model, W8A16, exclude="^b$")
    assert isinstance(model["a"], dcext.DCLinear)
    assert type(model["b"]) is nn.Linear
    assert model.dcext_report.coverage < 0.6
    assert model.dcext_report.matrix_coverage == 1  # what the caller left out is not missed
    dcext.compress_(model, W8A16, include="b")
    assert isinstance(model["b"], dcext.DCLinear)
    with pytest.raises(ValueError, match="all are compressed"):
        dcext.compress_(model, W8A16)
    with pytest.raises(ValueError, match=r"exclude: expected a regular expression, got '\('"):
        dcext.compress_(model, W8A16, exclude="(")


class Renormalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 64, max_norm=1.0)
        self.linear = nn.Linear(64, 64)


def test_low_coverage_warns():
    with pytest.warns(UserWarning, match=r"renormalizes its rows"):
        model = dcext.compress_(seeded(Renormalized()), W8A16)
    assert type(model.table) is nn.Embedding


def test_next_to_a_weight_that_cannot_be_compressed_its_tied_one_stays():
    model = nn.ModuleDict({"table": nn.Embedding(64, 64, max_norm=1.0), "head": nn.Linear(64, 64)})
    seeded(model).requires_grad_(False)
    model["head"].weight = model["table"].weight
    model["other"] = nn.Linear(64, 64)
    with pytest.warns(UserWarning, match="renormalizes its rows"):
        dcext.compress_(model, W8A16)
    assert model["head"].weight is model["table"].weight
    assert isinstance(model["other"], dcext.DCLinear)
