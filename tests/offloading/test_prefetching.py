"""Models whose decoder blocks travel to a device when they are called: the bits of the model in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("transformers")

import dcext
from dcext.compress import compressed_modules
from dcext.offloading.device_budget import plan_device
from models import tiny_llama
from triton_modes import (
    DEVICE,
    on_device,
    on_gpu,
    requires_interpreter,
    run_in_interpreter,
)

CODECS = ("raw", "zstd", "packed")
MODES = ("auto", "device", "host", "raw")


@requires_interpreter
def test_this_file_in_the_interpreter():
    assert run_in_interpreter(__file__) > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    parent = tmp_path_factory.mktemp("models")
    for codec in CODECS:
        model = tiny_llama(**shape)
        dcext.compress_(model, dcext.CompressionConfig(recipe="int8", codec=codec))
        dcext.save_pretrained(model, parent / codec)
    return {codec: parent / codec for codec in CODECS}


def logits(model: nn.Module, count: int = 3) -> torch.Tensor:
    device = next(model.buffers()).device
    with torch.inference_mode():
        return model(torch.arange(count, device=device)[None]).logits.cpu()


def least(folder: Path, mode: str) -> int:
    """The smallest budget: every block travels."""
    model = dcext.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"device_memory: expected at least \d+ bytes") as raised:
        plan_device(model, mode, 0, None)
    return int(str(raised.value).split("at least ")[1].split(" ")[0])


def traveling(folder: Path, budget: int, mode: str) -> nn.Module:
    """As ``from_pretrained`` gives it on a GPU; in the interpreter the CPU is the device."""
    model = dcext.from_pretrained(folder)
    dcext.offload(model, device_memory=budget, device=DEVICE, mode=mode)
    return model


@on_device
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_the_model_in_memory(folders, codec, mode):
    folder = folders[codec]
    resident = dcext.from_pretrained(folder)
    expected = logits(resident.to("cuda") if DEVICE == "cuda" else resident)
    model = traveling(folder, least(folder, "device" if mode == "auto" else mode), mode)
    assert list(model.dcext_offload.tiers.values()) == ["host"] * 4
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    statistics = model.dcext_offload.statistics()
    assert statistics.blocks == 12
    assert statistics.hits >= 8


def run_often(model: nn.Module) -> None:
    for _ in range(20):
        logits(model)


@on_device
@pytest.mark.parametrize("codec", CODECS)
def test_blocks_from_disk(folders, codec, monkeypatch):
    monkeypatch.setattr("dcext.offloading.device_budget.LEAST_READS_NBYTES", 1 << 20)
    monkeypatch.setattr("dcext.offloading.device_budget.READS_NBYTES", 1 << 20)
    folder = folders[codec]
    resident = dcext.from_pretrained(folder)
    expected = logits(resident.to("cuda") if DEVICE == "cuda" else resident)
    model = dcext.from_pretrained(folder)
    everything = plan_device(model, "device", least(folder, "device"), None).host_nbytes
    budget = (1 << 20) + everything * 3 // 4  # all indices, and some payloads
    # So small a model fits where it can be read into.
    monkeypatch.setattr("dcext.offloading.device_budget._fits", lambda host, budget: False)
    dcext.offload(model, device_memory=least(folder, "device"), host_memory=budget, device=DEVICE)
    assert "disk" in model.dcext_offload.tiers.values()
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    disk = model.dcext_offload.device_stream.disk.statistics()
    assert disk.used_nbytes > 0
    assert disk.peak_nbytes <= disk.slots_nbytes
    (shard,) = folder.glob("*.safetensors")
    os.utime(shard)
    # What was read ahead before that is still right.
    with pytest.raises(dcext.FormatError, match="file changed: time of modification"):
        run_often(model)


@on_device
def test_some_blocks_rest(folders):
    folder = folders["zstd"]
    model = dcext.from_pretrained(folder)
    everything = plan_device(model, "device", 1 << 40, None)
    budget = (least(folder, "device") + everything.device_nbytes) // 2
    plan = plan_device(model, "device", budget, None)
    assert plan.resident or everything.device_nbytes <= budget
    assert plan.device_nbytes <= budget
    for mode in ("device", "raw"):
        with pytest.raises(ValueError, match="host_memory: expected at least"):
            plan_device(model, mode, least(folder, mode), 10)
    with pytest.raises(ValueError, match="mode: expected one of"):
        plan_device(model, "sideways", budget, None)
    expected = logits(model)
    dcext.offload(model, device_memory=budget, device=DEVICE)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@on_device
def test_a_layer_alone_is_refused(folders):
    model = traveling(folders["zstd"], least(folders["zstd"], "device"), "device")
    layer = model.model.layers[1].mlp.up_proj
    with pytest.raises(RuntimeError, match="expected a call of its decoder block"):
        layer(torch.randn(2, 32, device=DEVICE))
    assert "host/zstd" in repr(layer)
    original = dcext.from_pretrained(folders["zstd"]).model.layers[1].mlp.up_proj
    assert torch.equal(layer.decode_qweight().cpu(), original.decode_qweight())


@on_device
def test_everything_fits(folders):
    model = traveling(folders["packed"], 1 << 40, "auto")
    assert model.dcext_offload.device_stream is None
    assert "all 4 weights in device memory" in str(model.dcext_offload)
    torch.testing.assert_close(logits(model), logits(dcext.from_pretrained(folders["packed"])))


@on_device
def test_a_block_that_fails_gives_its_slot_back(folders):
    folder = folders["packed"]
    model = traveling(folder, least(folder, "device"), "device")
    expected = logits(model)
    block = model.model.layers[1]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        block(torch.randn(1, 2, 31, device=DEVICE))
    assert torch.equal(logits(model), expected)


@on_gpu
def test_a_replayed_graph_streams(folders):
    folder = folders["zstd"]
    model = traveling(folder, least(folder, "device"), "device")
    ids = torch.arange(3, device=DEVICE)[None]
    expected = logits(model)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output = model(ids, use_cache=False).logits
            model.dcext_offload.device_stream.join()
    for _ in range(3):
        graph.replay()
        assert torch.equal(output.cpu(), expected)


def test_a_missing_gpu_is_an_error(folders):
    if torch.cuda.is_available():
        pytest.skip("requires a machine without GPU")
    with pytest.raises(RuntimeError, match="expected a GPU for device_memory"):
        dcext.from_pretrained(folders["zstd"], device="cuda", device_memory="1GiB")


def test_models_without_blocks_are_refused(folders):
    model = dcext.from_pretrained(folders["zstd"])
    assert compressed_modules(model)
    with pytest.raises(ValueError, match="expected decoder blocks with compressed layers"):
        plan_device(model.lm_head, "device", 1 << 40, None)
