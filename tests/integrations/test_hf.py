"""At home in transformers: its loader, its savers, its threads, its hub, its classes."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import dcext
from dcext.nn.compressed import compressed_modules
from models import tiny_llama

transformers = pytest.importorskip("transformers")

INT8 = dcext.CompressionConfig(recipe="int8", codec="zstd")
IDS = torch.arange(40).reshape(2, 20) % 256


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "out"
    dcext.save_pretrained(dcext.compress_(tiny_llama(), INT8), path)
    return path


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float") / "llama"
    tiny_llama().save_pretrained(path)
    return path


def test_automatic_classes_load_and_save_the_same_bytes(folder, tmp_path):
    ours = dcext.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(ours), logits(theirs))
    assert type(theirs) is type(ours)
    assert theirs.dcext_report == ours.dcext_report
    theirs.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    _, different, errors = filecmp.cmpfiles(folder, tmp_path / "again", names, shallow=False)
    assert different == errors == []


def test_compressed_models_are_saved_by_their_own_method(folder, tmp_path):
    model = dcext.compress_(tiny_llama(), INT8)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("dcext-*.safetensors"))) > 1
    for loaded in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        dcext.from_pretrained(tmp_path / "m"),
    ):
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.dcext_report == model.dcext_report
    with pytest.raises(ValueError, match="variant: expected none"):
        model.save_pretrained(tmp_path / "v", variant="fp16")
    float_model = tiny_llama()
    float_model.save_pretrained(tmp_path / "float")
    assert (tmp_path / "float" / "model.safetensors").is_file()


def test_other_heads_and_base_models(folder):
    whole = dcext.from_pretrained(folder)
    base = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert set(compressed_modules(classifier)) < set(compressed_modules(whole))
    assert type(classifier.score) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_as_before_saving(dtype, tmp_path):
    model = tiny_llama().to(dtype)
    dcext.compress_(model, INT8)
    dcext.save_pretrained(model, tmp_path / "m")
    expected = {name: b.dtype for name, b in model.named_buffers()}
    for loaded in (
        dcext.from_pretrained(tmp_path / "m"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
    ):
        assert loaded.dtype == dtype
        assert loaded.lm_head.weight.dtype == dtype
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        found = {name: b.dtype for name, b in loaded.named_buffers() if "inv_freq" not in name}
        assert found == {name: d for name, d in expected.items() if "inv_freq" not in name}
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        cache = loaded(IDS, use_cache=True).past_key_values
        assert cache.layers[0].keys.dtype == dtype
    wide = dcext.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert wide.lm_head.dtype == torch.float32


def test_half_of_a_loaded_model(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    assert model.lm_head.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    assert model.float()(IDS).logits.dtype == torch.float32


WITHOUT_DCEXT = """
import sys, transformers
assert "dcext" not in sys.modules
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print("OSError", error)
"""


def test_a_folder_that_is_opened_without_dcext_fails(folder):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_DCEXT, str(folder)], capture_output=True, text=True
    )
    assert "OSError" in run.stdout, run.stdout + run.stderr
    assert "model.safetensors" in run.stdout
    assert "dcext" in run.stderr  # the method that transformers does not know


REGISTERS = """
import sys
{imports}
assert not {light} or "transformers" not in sys.modules
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "dcext" in AUTO_QUANTIZER_MAPPING
assert transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head.payload is not None
"""


@pytest.mark.parametrize(
    ("imports", "light"),
    [
        ("import dcext", True),
        ("import transformers, dcext", False),
        ("import transformers.modeling_utils, dcext", False),
        ("import dcext.integrations.hf", False),
    ],
)
def test_import_order_does_not_matter(folder, imports, light):
    code = REGISTERS.format(imports=imports, light=light)
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_many_threads_load_at_once(folder):
    expected = logits(dcext.from_pretrained(folder))
    results: list[object] = []

    def load() -> None:
        try:
            results.append(logits(dcext.from_pretrained(folder)))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(isinstance(r, torch.Tensor) and torch.equal(r, expected) for r in results), results
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # no context was left behind
    assert torch.get_default_dtype() == torch.float32


class MyLlama(transformers.LlamaForCausalLM):
    """A user's own."""


def test_subclasses_of_transformers_models(tmp_path):
    model = dcext.compress_(MyLlama(tiny_llama().config).eval(), INT8)
    dcext.save_pretrained(model, tmp_path / "m")
    with pytest.raises(
        dcext.FormatError, match=r"found \['MyLlama'\]; pass its class as model_class"
    ):
        dcext.from_pretrained(tmp_path / "m")
    for loaded in (
        dcext.from_pretrained(tmp_path / "m", model_class=MyLlama),
        MyLlama.from_pretrained(tmp_path / "m"),
    ):
        assert type(loaded) is MyLlama
        assert torch.equal(logits(loaded), logits(model))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"

class RemoteLlama(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def test_remote_code(tmp_path, monkeypatch):
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    source = tmp_path / "remote"
    source.mkdir()
    (source / "modeling_remote.py").write_text(REMOTE)
    config = tiny_llama().config.to_dict() | {
        "model_type": "remote_llama",
        "architectures": ["RemoteLlama"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteLlama",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    dcext.compress_(model, INT8)
    dcext.save_pretrained(model, tmp_path / "m")
    assert (tmp_path / "m" / "modeling_remote.py").is_file()
    with pytest.raises(dcext.FormatError, match="trust_remote_code=True"):
        dcext.from_pretrained(tmp_path / "m")
    for loaded in (
        dcext.from_pretrained(tmp_path / "m", trust_remote_code=True),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "RemoteLlama"
        assert torch.equal(logits(loaded), logits(model))


def test_names_on_the_hub(folder, tmp_path, monkeypatch):
    """From the hub's cache, as a download leaves it: links in a snapshot, small files only where they were asked for."""
    import huggingface_hub.constants

    repo = tmp_path / "models--someone--small"
    snapshot = repo / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(folder, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    expected = logits(dcext.from_pretrained(folder))
    arguments = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained("someone/small", **arguments)
    assert torch.equal(logits(loaded), expected)
    (snapshot / "compression_report.json").unlink()
    loaded = transformers.AutoModelForCausalLM.from_pretrained("someone/small", **arguments)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("recipe", ["int8", "data-free", "rate"])
def test_compression_while_loading(float_folder, tmp_path, recipe):
    calibration = torch.randint(256, (8, 32)) if recipe == "rate" else None
    target = {} if recipe == "int8" else {"target_bits": 5.5}
    config = dcext.DCConfig(
        recipe=recipe, calibration=calibration, exclude="lm_head|embed", **target
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        float_folder, quantization_config=config
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, dcext.DCLinear)
    assert type(model.lm_head) is nn.Linear
    assert model.dcext_report.config["recipe"] == recipe
    model.save_pretrained(tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_wrong_configurations():
    with pytest.raises(ValueError, match="recipe: expected"):
        dcext.DCConfig(recipe="zip")
    with pytest.raises(TypeError):
        dcext.DCConfig(bits=3)
    config = dcext.DCConfig(recipe="int8")
    again = dcext.DCConfig.from_dict(config.to_dict())
    assert again.compression == config.compression


def test_pipelines(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    assert torch.equal(
        dcext.from_pretrained(folder, attn_implementation="eager")(IDS).logits, model(IDS).logits
    )


def test_device_maps(folder):
    expected = logits(dcext.from_pretrained(folder))
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="host_memory"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"})


def test_saving_again_keeps_what_is_there(folder, tmp_path):
    target = tmp_path / "m"
    shutil.copytree(folder, target)
    (target / "README.md").write_text("mine")
    (target / "plots").mkdir()
    (target / "plots" / "a.txt").write_text("mine too")
    model = dcext.from_pretrained(target)
    with pytest.raises(FileExistsError, match="pass overwrite"):
        dcext.save_pretrained(model, target)
    model.save_pretrained(target)
    assert (target / "README.md").read_text() == "mine"
    assert (target / "plots" / "a.txt").read_text() == "mine too"
    again = dcext.from_pretrained(target)
    assert torch.equal(logits(again), logits(model))
    assert again.dcext_report == model.dcext_report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_saving_beside_other_files(tmp_path, monkeypatch):
    """The tokenizer first, then the model, as many do; a trainer's folder has more."""
    target = tmp_path / "m"
    target.mkdir()
    (target / "tokenizer.json").write_text("{}")
    (target / "checkpoint-1").mkdir()
    (target / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    model = dcext.compress_(tiny_llama(), INT8)
    model.save_pretrained(target)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "checkpoint-1" / "optimizer.pt").read_bytes() == b"state"
    assert torch.equal(logits(dcext.from_pretrained(target)), logits(model))
    with pytest.raises(FileExistsError, match="not dcext's"):
        dcext.save_pretrained(model, tmp_path)
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(FileExistsError, match=r"found 'model.safetensors': remove it"):
        model.save_pretrained(tmp_path / "float")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="found the current one"):
        model.save_pretrained(".")
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"


PEAK = """
import os, sys, torch, transformers, dcext
{load}
def rss(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
tiny = load(sys.argv[1])
del tiny
torch.ones(1)
before = rss("VmRSS")
model = load(sys.argv[2])
print(rss("VmHWM") - before, sum(f.stat().st_size for f in os.scandir(sys.argv[2])))
"""


@pytest.mark.parametrize(
    "load",
    ["load = dcext.from_pretrained", "load = transformers.AutoModelForCausalLM.from_pretrained"],
)
def test_loading_takes_the_memory_of_the_compressed_model(folder, tmp_path, load):
    model = tiny_llama(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=4096
    )
    dcext.save_pretrained(dcext.compress_(model, INT8), tmp_path / "large")
    del model
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(load=load), str(folder), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, run.stdout.split()[-2:])
    assert size > 50e6
    assert peak < 1.15 * size


def test_what_is_no_model_of_transformers_is_told_apart(tmp_path):
    """diffusers' models have a configuration too."""
    layer = dcext.compress_(nn.Sequential(nn.Linear(64, 64)), INT8)
    layer.config = {"_class_name": "Transformer2DModel"}
    with pytest.raises(
        ValueError, match="expected a compressed transformers model, got Sequential"
    ):
        dcext.save_pretrained(layer, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_without_anything_compressed_is_saved_as_ever(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_llama().save_pretrained(tmp_path / "m")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m") is not None
