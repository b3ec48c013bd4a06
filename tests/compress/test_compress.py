"""Whole models: compressed in place, stored, loaded, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import dcext
from dcext.compress import compressed_modules
from models import logits, tiny_llama

transformers = pytest.importorskip("transformers")


INT8 = dcext.CompressionConfig(recipe="int8")
INT8_ZSTD = dcext.CompressionConfig(recipe="int8", codec="zstd")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "out"
    model = dcext.compress_(tiny_llama(), INT8_ZSTD)
    dcext.save_pretrained(model, folder)
    return folder, logits(model)


@pytest.fixture
def copied(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint[0], folder)
    return folder


def test_every_linear_layer_and_embedding_is_replaced():
    model = tiny_llama()
    reference = logits(model)
    shares = {}
    result = dcext.compress_(model, INT8, progress=shares.__setitem__)
    assert result is model
    assert not any(type(m) in (nn.Linear, nn.Embedding) for m in model.modules())
    assert set(shares) == set(compressed_modules(model))
    assert sum(shares.values()) == pytest.approx(1)
    assert model.lm_head.payload is model.model.embed_tokens.payload
    assert (logits(model) - reference).abs().max() < 0.05 * reference.abs().max() + 0.02


def test_codec_does_not_change_a_bit():
    outputs = [
        logits(dcext.compress_(tiny_llama(), dcext.CompressionConfig(recipe="int8", codec=codec)))
        for codec in ("raw", "zstd", "auto", "packed")
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_filter():
    model = dcext.compress_(tiny_llama(), INT8, filter_fn=lambda name, module: "mlp" in name)
    assert len(compressed_modules(model)) == 6
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("filter_fn", "message"),
    [
        (lambda name, module: False, "none that pass"),
        (lambda name, module: name != "lm_head", "tied to 'lm_head'.* expected both or neither"),
    ],
)
def test_filters_that_cannot_be(filter_fn, message):
    with pytest.raises(ValueError, match=message):
        dcext.compress_(tiny_llama(), INT8, filter_fn=filter_fn)


def test_weights_with_nan_name_their_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*NaN or inf"):
        dcext.compress_(model, INT8)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "none"},
        {"granularity": "column"},
        {"codec": "lz4"},
        {"activations": "int4"},
        {"level": 3},
    ],
)
def test_config_refuses_what_does_not_exist(changes):
    with pytest.raises(ValueError, match=r"expected .* got"):
        dcext.CompressionConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {"granularity": "tensor", "codec": "zstd"}),
        ({"attention_bias": False}, {"activations": "none", "codec": "raw"}),
    ],
)
def test_saved_and_loaded_models_agree_bit_for_bit(tmp_path, changes, config):
    model = dcext.compress_(tiny_llama(**changes), dcext.CompressionConfig(recipe="int8", **config))
    dcext.save_pretrained(model, tmp_path / "out", max_shard_nbytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = dcext.from_pretrained(tmp_path / "out")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert set(compressed_modules(loaded)) == set(compressed_modules(model))
    assert all(not buffer.is_meta for buffer in loaded.buffers())


def test_partly_compressed_models_keep_their_float_weights(tmp_path):
    model = dcext.compress_(tiny_llama(), INT8, filter_fn=lambda name, module: "mlp" in name)
    dcext.save_pretrained(model, tmp_path / "out")
    loaded = dcext.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_dtype_of_the_loaded_model(checkpoint):
    model = dcext.from_pretrained(checkpoint[0], dtype=torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert model.lm_head.row_scale.dtype == torch.float32


def test_loading_does_not_depend_on_the_files_afterwards(copied, checkpoint):
    model = dcext.from_pretrained(copied)
    shutil.rmtree(copied)
    assert torch.equal(logits(model), checkpoint[1])


def test_ties_are_no_longer_made(checkpoint):
    """Harnesses call it on every model that they are given."""
    for model in (dcext.compress_(tiny_llama(), INT8), dcext.from_pretrained(checkpoint[0])):
        before = logits(model)
        model.tie_weights()
        assert torch.equal(logits(model), before)


def test_generate(checkpoint):
    model = dcext.from_pretrained(checkpoint[0])
    tokens = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert tokens.shape == (1, 8)


def test_missing_and_foreign_folders(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dcext.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(dcext.FormatError, match="manifest"):
        dcext.from_pretrained(tmp_path / "empty")
    (copied / "dcext.safetensors").unlink()
    with pytest.raises(dcext.FormatError, match=r"dcext\.safetensors.*no such file"):
        dcext.from_pretrained(copied)


def test_a_flipped_bit_names_the_tensor(copied):
    path = copied / "dcext.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        dcext.FormatError, match=r"dcext\.safetensors: tensor '.*': checksum: expected"
    ):
        dcext.from_pretrained(copied)


def test_a_flipped_bit_in_a_side_file_names_it(copied):
    path = copied / "generation_config.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(dcext.FormatError, match=r"generation_config\.json: checksum"):
        dcext.from_pretrained(copied)


def test_an_edited_config_is_found(copied):
    config = json.loads((copied / "config.json").read_text())
    config["hidden_size"] = 32
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(dcext.FormatError, match=r"config\.json"):
        dcext.from_pretrained(copied)


def test_saving_needs_a_compressed_transformers_model(tmp_path):
    with pytest.raises(ValueError, match="compressed transformers model"):
        dcext.save_pretrained(tiny_llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_is_light():
    code = (
        "import sys, torch, time; begin = time.perf_counter(); import dcext; "
        "heavy = {'transformers', 'triton', 'accelerate', 'rich', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized(); print(time.perf_counter() - begin)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert float(output.stdout) > 0


@pytest.mark.parametrize(("value", "accepted"), [("scalar", True), ("", True), ("avx1024", False)])
def test_forced_instruction_set(value, accepted):
    code = "import dcext; print(dcext.build_info()['isa'])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"DCEXT_CPU": value}, capture_output=True, text=True
    )
    assert (result.returncode == 0) == accepted
    assert accepted or "DCEXT_CPU: expected" in result.stderr
    if value == "scalar":
        assert result.stdout.strip() == "scalar"
