"""What transformers asks of each of its quantizers, asked of ours, with a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import dcext
from dcext.nn.compressed import compressed_modules

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.real_model
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def float_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(float_folder):
    return transformers.AutoTokenizer.from_pretrained(float_folder)


@pytest.fixture(scope="module")
def model(float_folder):
    config = dcext.DCConfig(recipe="int8")
    return transformers.AutoModelForCausalLM.from_pretrained(
        float_folder, quantization_config=config
    )


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="50MB")
    return folder


def written(model: nn.Module, tokenizer: object) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def test_configuration(model):
    config = model.config.quantization_config
    assert config.to_dict()["quant_method"] == "dcext"
    assert json.loads(config.to_json_string())["quant_method"] == "dcext"
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable


def test_conversion(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 211
    assert all(isinstance(m, dcext.DCLinear) for m in layers)
    assert model.get_memory_footprint() < 0.56 * 2 * 134_515_008
    assert model.dtype == torch.bfloat16


def test_generation(model, tokenizer):
    assert written(model, tokenizer).startswith(f"{PROMPT} Paris")


def test_serialization(model, saved, tokenizer):
    assert len(list(saved.glob("dcext-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    for name, module in compressed_modules(model).items():
        other = loaded.get_submodule(name)
        assert torch.equal(other.payload, module.payload)
        assert torch.equal(other.row_scale, module.row_scale)
        assert other.dtype == module.dtype
    assert written(loaded, tokenizer) == written(model, tokenizer)
    assert loaded.lm_head.payload is loaded.model.embed_tokens.payload


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, model, tokenizer, device_map):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    assert written(loaded, tokenizer) == written(model, tokenizer)


def test_dtype(saved):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.float32


def test_a_pipeline(saved, tokenizer):
    pipeline = transformers.pipeline("text-generation", model=str(saved), tokenizer=tokenizer)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert "Paris" in pipeline(PROMPT, **settings)[0]["generated_text"]


def test_dequantize(saved, tokenizer):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for module in compressed_modules(loaded).values():
        module.activations = "none"
    with torch.no_grad():
        expected = loaded(**inputs).logits
        plain = loaded.dequantize()
        found = plain(**inputs).logits
    assert not compressed_modules(plain)
    assert not hasattr(plain.config, "quantization_config")
    assert type(plain.lm_head) is nn.Linear
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert float((found - expected).norm() / expected.norm()) < 1e-3
