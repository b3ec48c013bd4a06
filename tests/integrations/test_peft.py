"""PEFT's adapters on compressed models: attached before or after, merged, saved and loaded."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dcext
from dcext.nn.compressed import compressed_modules
from dcext.nn.convert import float_copy
from zoo import FAMILIES

peft = pytest.importorskip("peft", reason="requires peft")
transformers = pytest.importorskip("transformers", reason="requires transformers")

W8A16 = dcext.CompressionConfig(recipe="int8", activations="none")
RANDOM = {"init_lora_weights": False, "r": 4}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}
CONFIGS = {
    "lora": lambda name: peft.LoraConfig(target_modules="all-linear", **RANDOM),
    "regex": lambda name: peft.LoraConfig(target_modules=r".*\.(q_proj|c_proj)", **RANDOM),
    "dora": lambda name: peft.LoraConfig(target_modules="all-linear", use_dora=True, **RANDOM),
    "embedding": lambda name: peft.LoraConfig(target_modules=[EMBEDDINGS[name]], **RANDOM),
    "saved": lambda name: peft.LoraConfig(modules_to_save=["lm_head"], **RANDOM),
    "ia3": lambda name: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "vera": lambda name: peft.VeraConfig(target_modules=["k_proj", "c_attn"]),
}


def compressed(name: str = "llama", config: dcext.CompressionConfig = W8A16) -> nn.Module:
    return dcext.compress_(FAMILIES[name].model(), config)


def adapted(model: nn.Module, config: object) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


def inputs(name: str = "llama") -> dict[str, Tensor]:
    return FAMILIES[name].inputs(None)


@torch.no_grad()
def logits(model: nn.Module, name: str = "llama") -> Tensor:
    return model(**inputs(name)).logits


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def trained_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and p.numel()]


def losses(model: nn.Module, name: str, steps: int = 8) -> list[float]:
    ids = inputs(name)["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_compute_as_on_float_layers(kind, name):
    model = compressed(name)
    reference = adapted(float_copy(model), CONFIGS[kind](name))
    found = adapted(model, CONFIGS[kind](name))
    assert trained_names(found) == trained_names(reference)
    assert error(logits(found, name), logits(reference, name)) < 1e-5
    assert error(logits(found, name), logits(model, name)) == 0  # the same modules
    values = losses(found, name)
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_and_unload_encodes_anew_and_says_what_that_costs(kind, name):
    model = adapted(compressed(name), CONFIGS[kind](name))
    before, plain = logits(model, name), {n: m.codec for n, m in compressed_modules(model).items()}
    with pytest.warns(
        UserWarning, match="encoded anew, as INT8 per row: relative error .* at most"
    ):
        merged = model.merge_and_unload()
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    assert len(compressed_modules(merged)) >= len(plain) - 1
    assert error(logits(merged, name), before) < 0.03
    for module in compressed_modules(merged).values():
        if module.shape[0] > 1:
            assert module.codec in plain.values()


def test_merging_keeps_the_kind_of_activations_and_survives_saving(tmp_path):
    config = dcext.CompressionConfig(recipe="data-free", target_bits=5.0)
    model = adapted(
        compressed("gpt2", config), peft.LoraConfig(target_modules=["lm_head", "c_attn"], **RANDOM)
    )
    kinds = {m.activations for m in compressed_modules(model).values()}
    with pytest.warns(UserWarning, match=r"[5-7]\.\d\d bits/weight before, 8\.\d\d now"):
        merged = model.merge_and_unload()
    assert {m.activations for m in compressed_modules(merged).values()} == kinds
    assert not merged.config.tie_word_embeddings  # lm_head is another matrix than the embedding now
    dcext.save_pretrained(merged, tmp_path)
    for load in (dcext.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path), "gpt2"), logits(merged, "gpt2"))


def test_an_adapter_that_cannot_be_merged_leaves_the_model_as_it_was():
    model = adapted(compressed(), peft.LoraConfig(target_modules=["q_proj"], **RANDOM))
    broken = next(p for n, p in model.named_parameters() if "lora_B" in n)
    kept = {n: m.payload for n, m in compressed_modules(model).items()}
    with torch.no_grad():
        broken.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert all(m.payload is kept[n] for n, m in compressed_modules(model).items())


def test_merging_that_promises_to_be_undone_is_refused_before_anything_is_merged():
    model = adapted(compressed(), peft.LoraConfig(target_modules="all-linear", **RANDOM))
    before = logits(model)
    with pytest.raises(ValueError, match=r"merge_adapter: .*merge_and_unload\(\).*unload\(\)"):
        model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for safe in (True, False):
        with pytest.raises(RuntimeError, match=r"read-only.*merge_and_unload"):
            layer.merge(safe_merge=safe)
    assert not layer.merged
    assert torch.equal(logits(model), before)


def test_unload_gives_back_the_model():
    model = compressed()
    before = logits(model)
    unloaded = adapted(model, peft.LoraConfig(target_modules="all-linear", **RANDOM)).unload()
    assert torch.equal(logits(unloaded), before)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules="all-linear", r=4),
        peft.LoraConfig(target_modules="all-linear", r=4, use_dora=True),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.IA3Config(task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=16, encoder_hidden_size=64
        ),
    ],
    ids=["lora", "dora", "modules_to_save", "ia3", "prompt", "prefix", "prompt_encoder"],
)
def test_compressing_after_adapters_were_attached_leaves_them_alone(config):
    model = adapted(FAMILIES["llama"].model(), copy.deepcopy(config))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    dcext.compress_(model, W8A16)
    assert len(compressed_modules(model)) >= 15
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained.keys()
    ids = inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in trained.items():
        assert model.get_parameter(name) is parameter
        assert parameter.grad is not None, name
    assert sum(p.grad.norm() for p in trained.values()) > 0
    values = losses(model, "llama")
    assert values[-1] < values[0]


def test_experts_have_adapters_of_their_own():
    model = compressed("mixtral")
    before = logits(model, "mixtral")
    found = adapted(model, peft.LoraConfig(target_modules=r".*gate_up_proj_items\.\d+", **RANDOM))
    assert error(logits(found, "mixtral"), before) > 1e-3
    found(**inputs("mixtral")).logits.square().mean().backward()
    norms = [p.grad.norm() for _, p in found.named_parameters() if p.grad is not None]
    assert len(norms) >= 8
    assert min(norms) > 0
    for targets in (
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},  # the names of transformers 4
    ):
        with pytest.raises(ValueError, match=r"target_parameters: .*(gate_up|down)_proj_items"):
            adapted(compressed("mixtral"), peft.LoraConfig(**targets))


def test_adapters_of_experts_are_saved_and_loaded(tmp_path):
    dcext.save_pretrained(compressed("mixtral"), tmp_path / "model")
    config = peft.LoraConfig(target_modules="all-linear", **RANDOM)
    model = adapted(dcext.from_pretrained(tmp_path / "model"), config)
    model.save_pretrained(tmp_path / "adapter")
    fresh = dcext.from_pretrained(tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, "mixtral"), logits(model, "mixtral"))


def test_values_of_a_parameter_with_an_adapter_are_refused_rather_than_lacking_it():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix.exp()

    model = dcext.compress_(nn.Sequential(Scores()), W8A16)
    found = adapted(model, peft.LoraConfig(target_modules=r".*matrix_items\.0", **RANDOM))
    with pytest.raises(RuntimeError, match="adds an adapter"):
        found(torch.randn(2, 64))


def test_frozen_biases_are_refused():
    for bias in ("all", "lora_only"):
        with pytest.raises(ValueError, match=f"bias: expected 'none', got '{bias}'"):
            adapted(compressed("gpt2"), peft.LoraConfig(target_modules=["c_attn"], bias=bias))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "embedding", "saved"])
def test_saved_adapters_give_the_same_outputs_on_a_loaded_model(kind, tmp_path):
    base = compressed()
    dcext.save_pretrained(base, tmp_path / "model")
    model = adapted(dcext.from_pretrained(tmp_path / "model"), CONFIGS[kind]("llama"))
    losses(model, "llama", 2)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an embedding is saved with its adapter
        model.save_pretrained(tmp_path / "adapter")
    if kind in ("lora", "dora", "ia3"):
        stored = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
        assert stored < 300_000
    fresh = dcext.from_pretrained(tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)


def test_transformers_own_adapters(tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that is not released yet; what it calls is there in 0.21.
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")
    dcext.save_pretrained(compressed(), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"], **RANDOM))
    assert len(trained_names(model)) == 8
    losses(model, "llama", 2)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "own")  # transformers saves the adapter alone

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(again.eval()), expected)


def test_auto_peft_model_loads_model_and_adapter(tmp_path):
    dcext.save_pretrained(compressed(), tmp_path / "model")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **RANDOM)
    model = adapted(dcext.from_pretrained(tmp_path / "model"), config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert len(compressed_modules(loaded)) == len(compressed_modules(model))
    assert torch.equal(logits(loaded), logits(model))


def test_prepare_for_kbit_training_computes_in_float32():
    model = compressed().to(torch.bfloat16)
    expected = logits(copy.deepcopy(model).float())
    prepared = peft.prepare_model_for_kbit_training(model)
    assert logits(prepared).dtype == torch.float32
    assert {m.dtype for m in compressed_modules(prepared).values()} == {torch.float32}
    assert torch.equal(logits(prepared), expected)


def test_registered_whichever_is_imported_first():
    script = (
        "import {}, {}; from peft.tuners.tuners_utils import BaseTuner as T; "
        "from peft.utils.other import ModulesToSaveWrapper as M; "
        "assert all(hasattr(f, '_dcext_replacement') for f in (T.merge_adapter, T.inject_adapter, M.update))"
    )
    root = Path(dcext.__file__).parent.parent
    for order in (("dcext", "peft"), ("peft", "dcext")):
        subprocess.run([sys.executable, "-c", script.format(*order)], check=True, cwd=root)
