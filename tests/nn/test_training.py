"""Gradients through compressed layers: those of the same model with the float weights that they stand for."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dcext
from dcext.nn.compressed import compressed_modules
from dcext.nn.convert import float_copy
from dcext.offloading.state import LEAST_SLOTS_NBYTES
from zoo import FAMILIES

TIGHT = 1e-5  # relative; float32 sums in another order
NAMES = ("llama", "gpt2", "t5", "mixtral")
Gradients = dict[str, Tensor]


@cache
def compressed_once(name: str, activations: str) -> nn.Module:
    config = dcext.CompressionConfig(recipe="int8", activations=activations)
    return dcext.compress_(FAMILIES[name].model(), config).eval()


def compressed(name: str = "llama", activations: str = "none") -> nn.Module:
    return copy.deepcopy(compressed_once(name, activations))


def adapted(model: nn.Module, **options) -> nn.Module:
    """The model with LoRA on all of its linear layers, random and the same every time."""
    peft = pytest.importorskip("peft", reason="requires peft")
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def inputs_of(name: str) -> dict[str, Tensor]:
    return FAMILIES[name].inputs(None)


def gradients(
    model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., object] | None = None
) -> Gradients:
    """Of all trainable parameters, and of what embeddings return (``embedded.0``, ..), for a loss on the logits."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.retain_grad()
        embedded.append(output)
        return output

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_hook(keep) for table in tables]
    try:
        logits = (model if call is None else call)(**inputs).logits.float()
        (logits * torch.linspace(-1, 1, logits.shape[-1])).square().mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    found |= {f"embedded.{i}": tensor.grad for i, tensor in enumerate(embedded)}
    model.zero_grad()
    return found


def assert_near(found: Gradients, expected: Gradients, tolerance: float = TIGHT) -> None:
    """Each gradient is there, is not zero where the other is not, and is near it, relative to its norm."""
    assert found.keys() == expected.keys()
    assert any(name.startswith("embedded") for name in found)
    for name, wanted in expected.items():
        if wanted is None:  # of an expert that no token went to
            assert found[name] is None, name
            continue
        assert found[name] is not None, name
        error = (found[name] - wanted).norm()
        assert error <= tolerance * wanted.norm(), f"{name}: {error / wanted.norm():.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dequantized_model(name):
    model = compressed(name)
    float_model = adapted(float_copy(model))
    expected = gradients(float_model, inputs_of(name))
    assert_near(gradients(adapted(model), inputs_of(name)), expected)
    assert sum(gradient is not None for gradient in expected.values()) > 8


def test_no_branch_of_a_residual_is_missing():
    layer = dcext.DCLinear.from_float(nn.Linear(64, 64), activations="none")
    x = torch.randn(8, 64, requires_grad=True)
    (x + layer(x)).square().sum().backward()
    y = x.detach() @ layer.dequantize().T + layer.bias + x.detach()
    expected = 2 * y + 2 * y @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected, rtol=TIGHT, atol=TIGHT * expected.abs().max())


def test_w8a8_gradients_pass_straight_through():
    """The rounding of activations counts as the identity: the gradient is that of the float product at the same point."""
    layer = dcext.DCLinear.from_float(nn.Linear(64, 32), activations="int8")
    x, y_grad = torch.randn(8, 64, requires_grad=True), torch.randn(8, 32)
    (layer(x) * y_grad).sum().backward()
    expected = y_grad @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected, rtol=TIGHT, atol=TIGHT * expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_w8a8_models_have_gradients_near_the_float_ones(name):
    model = compressed(name, "int8")
    expected = gradients(adapted(float_copy(model)), inputs_of(name))
    found = gradients(adapted(model), inputs_of(name))
    for key, wanted in expected.items():
        if wanted is None or found[key] is None:  # tokens may go to other experts
            assert name == "mixtral"
            continue
        if name != "mixtral":
            assert functional.cosine_similarity(found[key].ravel(), wanted.ravel(), 0) > 0.9, key


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = adapted(compressed())
    expected = gradients(model, inputs_of("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_near(gradients(model, inputs_of("llama")), expected)


def test_autocast_computes_in_bfloat16_as_float_layers_do():
    model = compressed()
    float_model = adapted(float_copy(model))
    model = adapted(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs_of("llama"))
        cast = gradients(float_model, inputs_of("llama"))
    exact = gradients(float_model, inputs_of("llama"))
    for name, wanted in exact.items():
        assert found[name].dtype == wanted.dtype
        error, usual = ((g[name] - wanted).norm() / wanted.norm() for g in (found, cast))
        assert error <= 2 * usual + 1e-3, f"{name}: {error:.2e}, of float layers {usual:.2e}"


def test_compiled_models_have_the_gradients_of_eager_ones():
    model = adapted(compressed())
    expected = gradients(model, inputs_of("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_near(gradients(model, inputs_of("llama"), compiled), expected)


def test_gradients_accumulate():
    model = adapted(compressed())
    whole = inputs_of("llama")["input_ids"]

    def backward(ids: Tensor) -> None:
        model(input_ids=ids).logits.square().sum().backward()

    backward(whole)
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for row in whole:
        backward(row[None])
    for name, wanted in expected.items():
        assert (model.get_parameter(name).grad - wanted).norm() <= TIGHT * wanted.norm(), name


def test_functional_call_has_gradients_for_the_parameters_that_it_is_given():
    model = adapted(compressed())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    given = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    inputs = inputs_of("llama")
    torch.func.functional_call(model, given, (), inputs).logits.square().mean().backward()
    model(**inputs).logits.square().mean().backward()
    for name, parameter in trained.items():
        assert (given[name].grad - parameter.grad).norm() <= TIGHT * parameter.grad.norm(), name


class Mixed(nn.Module):
    """Layers whose weights are used in other ways than by ``nn.Linear``'s forward."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.up = nn.ConvTranspose2d(64, 64, 2, 2)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.recurrent = nn.GRU(64, 64, batch_first=True)
        self.bilinear = nn.Bilinear(64, 64, 64)
        self.table = nn.Embedding(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(self.patches(x))).flatten(2).mT
        x = self.layer(x + self.attention(x, x, x)[0])
        x = x + self.bilinear(x, self.recurrent(x)[0])
        return x @ self.table.weight.T + functional.linear(x, self.table.weight)


@pytest.mark.parametrize("is_training", [True, False])
def test_other_users_of_weights_have_gradients(is_training):
    torch.manual_seed(0)
    model = Mixed()
    expected_model = copy.deepcopy(model)
    dcext.compress_(model, dcext.CompressionConfig(recipe="int8", activations="none"))
    assert len(compressed_modules(model)) == 13
    with torch.no_grad():
        for name, parameter in expected_model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(owner), leaf))
    results = []
    for each in (model, expected_model):
        each.train(is_training)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = each(x)
        y.square().mean().backward()
        results.append((y.detach(), x.grad))
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= TIGHT * wanted.norm()


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> tuple[nn.Module, nn.Module, Path]:
    """A model whose layers are read from the disk, the same in memory, and its folder."""
    transformers = pytest.importorskip("transformers", reason="requires transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=384, num_hidden_layers=6, num_key_value_heads=2, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    dcext.compress_(model, dcext.CompressionConfig(recipe="int8", activations="none"))
    folder = tmp_path_factory.mktemp("streamed")
    dcext.save_pretrained(model, folder)
    on_disk = dcext.from_pretrained(folder, host_memory=LEAST_SLOTS_NBYTES + 500_000)
    assert sum(module.is_in_file for module in compressed_modules(on_disk).values()) > 10
    return on_disk, model, folder


def test_streamed_layers_have_gradients(streamed):
    on_disk, in_memory, _ = streamed
    inputs = inputs_of("llama")
    expected = gradients(adapted(float_copy(in_memory)), inputs)
    assert_near(gradients(adapted(on_disk), inputs), expected)


def test_a_gradient_that_cannot_be_read_is_an_error(streamed):
    """A file that is damaged between forward and backward raises: no gradient is None or made up."""
    _, _, folder = streamed
    model = dcext.from_pretrained(folder, host_memory=LEAST_SLOTS_NBYTES + 500_000)
    x = model.get_input_embeddings()(inputs_of("llama")["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=x).logits.square().mean()
    layer = next(m for m in compressed_modules(model).values() if m.is_in_file)
    stored = bytes(layer.origin.view().numpy())
    path = next(p for p in folder.glob("*.safetensors") if stored in p.read_bytes())
    middle = path.read_bytes().index(stored) + len(stored) // 2
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(bytes(64))
        file.flush()
        with pytest.raises(ValueError, match=r"linear_streamed_input_grad: .*file changed"):
            loss.backward()
