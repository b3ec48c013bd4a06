"""Wrong calls around models and payloads: one clear line each, with names as the user wrote them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dcext
from models import tiny_llama
from wrong_usage import check_call, make_files

transformers = pytest.importorskip("transformers")

MATRIX = torch.zeros(8, 8, dtype=torch.int8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("wrong"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Names on the hub are looked for in the cache only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(path="out", **arguments):
    """A call of ``from_pretrained``."""
    return lambda made: dcext.from_pretrained(made.root / path, **arguments)


CALLS = {
    # from_pretrained
    "device a dtype": (
        load(device=torch.float16),
        TypeError,
        "from_pretrained: device: .* got torch.float16",
    ),
    "device a typo": (load(device="gpu"), ValueError, "from_pretrained: device: .* got 'gpu'"),
    "dtype a device": (load(dtype="cuda"), ValueError, "from_pretrained: dtype: .* got 'cuda'"),
    "dtype a typo": (load(dtype="float61"), ValueError, "from_pretrained: dtype: .* got 'float61'"),
    "dtype of integers": (
        load(dtype=torch.int8),
        ValueError,
        "from_pretrained: dtype: .* got torch.int8",
    ),
    "memory with a typo": (load(host_memory="4 GiBB"), ValueError, "host_memory: .* got '4 GiBB'"),
    "memory negative": (load(host_memory=-1), ValueError, "host_memory: .* got -1"),
    "memory a fraction": (load(host_memory=1e30), ValueError, "host_memory: .* got 1e\\+30"),
    "memory too large": (
        load(host_memory="99999999999 TiB"),
        ValueError,
        "host_memory: .* got '99999999999 TiB'",
    ),
    "memory a word": (load(host_memory="abc"), ValueError, "host_memory: .* got 'abc'"),
    "memory true": (load(host_memory=True), ValueError, "host_memory: .* got True"),
    "memory none at all": (
        load(host_memory=0),
        ValueError,
        "host_memory: expected at least .* got 0",
    ),
    "device memory on the CPU": (
        load(device_memory="1GiB"),
        ValueError,
        "from_pretrained: device_memory: .* got '1GiB'",
    ),
    "mode a typo": (
        load(host_memory="1GiB", mode="fast"),
        ValueError,
        "from_pretrained: mode: .* got 'fast'",
    ),
    "plan a path": (load(plan="plan.json"), TypeError, "from_pretrained: plan: .* got 'plan.json'"),
    "plan a dict": (load(plan={}), TypeError, "from_pretrained: plan: .* got a dict"),
    "a float folder": (load("float"), dcext.FormatError, "float/dcext.json: expected .* found"),
    "a file": (load("text.txt"), NotADirectoryError, "text.txt: expected a folder .* found a file"),
    "an empty folder": (load("empty"), dcext.FormatError, "empty/dcext.json: expected .* found"),
    "a folder that is missing": (
        load("nowhere"),
        FileNotFoundError,
        "nowhere: expected a folder .* found none",
    ),
    "a model for a folder": (
        lambda made: dcext.from_pretrained(made.model),
        TypeError,
        "from_pretrained: directory: .* got LlamaForCausalLM",
    ),
    "a hub name while offline": (
        lambda made: dcext.from_pretrained("nobody/nothing"),
        OSError,
        "nobody/nothing: expected .* found",
    ),
    # save_pretrained
    "save a name": (
        lambda made: dcext.save_pretrained("org/model", made.root / "work"),
        TypeError,
        "save_pretrained: model: .* got 'org/model'",
    ),
    "save a float model": (
        lambda made: dcext.save_pretrained(tiny_llama(), made.root / "work"),
        ValueError,
        "save_pretrained: model: .* got LlamaForCausalLM with 0 compressed",
    ),
    "save over something else": (
        lambda made: dcext.save_pretrained(made.model, made.root / "full"),
        FileExistsError,
        "full: expected .* found 'letter.txt'",
    ),
    "save over a file": (
        lambda made: dcext.save_pretrained(made.model, made.root / "text.txt"),
        FileExistsError,
        "text.txt: expected .* found",
    ),
    "save over a checkpoint": (
        lambda made: dcext.save_pretrained(made.model, made.root / "out"),
        FileExistsError,
        "out: expected .* overwrite=True",
    ),
    "save with a name of a tokenizer": (
        lambda made: dcext.save_pretrained(made.model, made.root / "work", "gpt2"),
        TypeError,
        "save_pretrained: tokenizer: .* got 'gpt2'",
    ),
    "save with a config dict": (
        lambda made: dcext.save_pretrained(made.model, made.root / "work", config={}),
        TypeError,
        "save_pretrained: config: .* got a dict",
    ),
    "save shards of nothing": (
        lambda made: dcext.save_pretrained(made.model, made.root / "work", max_shard_nbytes=0),
        ValueError,
        "max_shard_nbytes: .* got 0",
    ),
    "save shards by a size": (
        lambda made: dcext.save_pretrained(made.model, made.root / "work", max_shard_nbytes="5XB"),
        ValueError,
        "max_shard_nbytes: .* got '5XB'",
    ),
    # offload, plan, apply, adapt
    "offload a name": (
        lambda made: dcext.offload("org/model", host_memory=1),
        TypeError,
        "offload: model: .* got 'org/model'",
    ),
    "offload a float model": (
        lambda made: dcext.offload(tiny_llama(), host_memory="1GiB"),
        ValueError,
        "offload: model: expected compressed layers, found none",
    ),
    "offload a model that is in no file": (
        lambda made: dcext.offload(made.model, host_memory="1GiB"),
        ValueError,
        "offload: .*expected a payload from a checkpoint, got",
    ),
    "offload without a budget": (
        lambda made: dcext.offload(made.model),
        ValueError,
        "offload: expected host_memory or device_memory, got neither",
    ),
    "offload to a typo": (
        lambda made: dcext.offload(made.model, device_memory="1GiB", device="gpu"),
        ValueError,
        "offload: device: .* got 'gpu'",
    ),
    "plan a name": (
        lambda made: dcext.plan("org/model"),
        TypeError,
        "plan: model: .* got 'org/model'",
    ),
    "plan a float model": (
        lambda made: dcext.plan(tiny_llama()),
        ValueError,
        "plan: model: expected compressed layers, found none",
    ),
    "plan for no tokens": (
        lambda made: dcext.plan(made.model, tokens=0),
        ValueError,
        "tokens: .* got 0",
    ),
    "plan for a mix that is none": (
        lambda made: dcext.plan(made.model, mix=[1, 2]),
        TypeError,
        "mix: .* got a list",
    ),
    "plan for a machine with a typo": (
        lambda made: dcext.plan(made.model, machine="pcie9"),
        ValueError,
        "machine: .*pcie4.* got 'pcie9'",
    ),
    "plan in a memory with a typo": (
        lambda made: dcext.plan(made.model, machine="laptop", host_memory="4 GiBB"),
        ValueError,
        "host_memory: .* got '4 GiBB'",
    ),
    "plan at a slowdown with a percent sign": (
        lambda made: dcext.plan(made.model, slowdown="5%"),
        TypeError,
        "slowdown: .* got '5%'",
    ),
    "apply a path": (
        lambda made: dcext.apply(made.model, "plan.json"),
        TypeError,
        "apply: plan: .*load_plan.* got 'plan.json'",
    ),
    "apply to a name": (
        lambda made: dcext.apply("org/model", made.plan),
        TypeError,
        "apply: model: .* got 'org/model'",
    ),
    "apply a plan of another model": (
        lambda made: dcext.apply(made.model, made.plan),
        ValueError,
        "plan: other: expected a compressed layer of the model, found none",
    ),
    "adapt a name": (
        lambda made: dcext.adapt("org/model"),
        TypeError,
        "adapt: model: .* got 'org/model'",
    ),
    # payloads and layers
    "encode floats": (
        lambda made: dcext.encode(MATRIX.float()),
        TypeError,
        "encode: qweight: .* got .*[Ff]loat",
    ),
    "encode a list": (
        lambda made: dcext.encode([[1]]),
        TypeError,
        "encode: qweight: .* got a list",
    ),
    "encode three dimensions": (
        lambda made: dcext.encode(MATRIX[None]),
        ValueError,
        "encode: qweight: .* got",
    ),
    "encode nothing": (
        lambda made: dcext.encode(MATRIX[:0]),
        ValueError,
        "encode: qweight: .* got",
    ),
    "codec a typo": (
        lambda made: dcext.encode(MATRIX, "zstandard"),
        ValueError,
        "encode: codec: .* got 'zstandard'",
    ),
    "level out of range": (
        lambda made: dcext.encode(MATRIX, "zstd", 99),
        ValueError,
        "encode: level: .*22.* got 99",
    ),
    "level zero": (
        lambda made: dcext.encode(MATRIX, "zstd", 0),
        ValueError,
        "encode: level: .* got 0",
    ),
    "a payload cut short": (
        lambda made: dcext.decode(dcext.encode(MATRIX)[:-1]),
        dcext.FormatError,
        "expected .* (got|found)",
    ),
    "decode a file's name": (
        lambda made: dcext.decode("weights.bin"),
        TypeError,
        "decode: payload: .* got 'weights.bin'",
    ),
    "decode floats": (
        lambda made: dcext.decode(torch.zeros(64)),
        TypeError,
        "payload: .* got .*[Ff]loat",
    ),
    "entropy of floats": (
        lambda made: dcext.entropy(MATRIX.float()),
        TypeError,
        "entropy: qweight: expected torch.int8, got torch.float32",
    ),
    "a convolution for a linear layer": (
        lambda made: dcext.DCLinear.from_float(nn.Conv2d(8, 8, 3)),
        TypeError,
        "DCLinear.from_float: linear: .* got Conv2d",
    ),
    "a tensor for a linear layer": (
        lambda made: dcext.DCLinear.from_float(torch.zeros(8, 8)),
        TypeError,
        "DCLinear.from_float: linear: .* got Tensor",
    ),
    "a linear layer for an embedding": (
        lambda made: dcext.DCEmbedding.from_float(nn.Linear(8, 8)),
        TypeError,
        "DCEmbedding.from_float: embedding: .* got Linear",
    ),
    "granularity a typo": (
        lambda made: dcext.DCLinear.from_float(nn.Linear(8, 8), granularity="rows"),
        ValueError,
        "granularity: .* got 'rows'",
    ),
    "no threads": (
        lambda made: dcext.set_num_threads(0),
        ValueError,
        "num_threads: expected .* got 0",
    ),
    "threads a word": (
        lambda made: dcext.set_num_threads("all"),
        TypeError,
        "set_num_threads: num_threads: .* got 'all'",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(made, case):
    check_call(made, *CALLS[case])


def test_no_gpu(made):
    if torch.cuda.is_available():
        pytest.skip("requires a machine without a GPU")
    with pytest.raises(
        RuntimeError, match=r"from_pretrained: device: expected a GPU .* got 'cuda'"
    ):
        dcext.from_pretrained(made.root / "out", device="cuda")
    with pytest.raises(RuntimeError, match=r"offload: device: expected a GPU .* got 'cuda'"):
        dcext.offload(made.model, device_memory="1GiB")


def test_dtypes_by_their_names(made):
    for dtype in ("bfloat16", torch.bfloat16):
        assert dcext.from_pretrained(made.root / "out", dtype=dtype).dtype == torch.bfloat16
    assert dcext.from_pretrained(made.root / "out", dtype="auto").dtype == torch.float32
