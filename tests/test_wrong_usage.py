"""Wrong usages of the API and of the command: one clear line each, with names as the user wrote them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dcext
from dcext.cli import app
from dcext.policy.plan import Plan, PlannedLayer
from dcext.policy.tier import Tier
from models import byte_tokenizer, tiny_llama

transformers = pytest.importorskip("transformers")

INT8 = dcext.CompressionConfig(recipe="int8")
MATRIX = torch.zeros(8, 8, dtype=torch.int8)
TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float model, the same compressed, texts and files of other kinds; what is made is only read."""
    root = tmp_path_factory.mktemp("wrong")
    tokenizer = byte_tokenizer()
    for part in (tokenizer, tiny_llama()):
        part.save_pretrained(root / "float")
    model = dcext.compress_(tiny_llama(), INT8)
    dcext.save_pretrained(model, root / "out", tokenizer)
    layer = PlannedLayer("other", Tier("memory", "raw"), 1, {}, {})
    plan = Plan([layer], [], None, None, 0, 0, 0, 0, "none", "here", "measured", [])
    plan.save(root / "other.json")
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text("")
    (root / "binary.bin").write_bytes(bytes(range(256)) * 64)
    for name in ("empty", "work"):
        (root / name).mkdir()
    (root / "full").mkdir()
    (root / "full" / "letter.txt").write_text("dear")
    return SimpleNamespace(root=root, model=model, plan=plan)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Names on the hub are looked for in the cache only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def compress(**arguments):
    """A call of ``compress_`` on a float model."""
    return lambda made: dcext.compress_(tiny_llama(), **arguments)


def calibrated(calibration):
    """A call of ``compress_`` with what stands for calibration windows."""
    config = dcext.CompressionConfig(recipe="rate", target_bits=5)
    return compress(config=config, calibration=calibration)


def load(path="out", **arguments):
    """A call of ``from_pretrained``."""
    return lambda made: dcext.from_pretrained(made.root / path, **arguments)


def configure(**choices):
    """A configuration."""
    return lambda made: dcext.CompressionConfig(**choices)


IDS = torch.zeros(2, 16, dtype=torch.int64)
API = {
    # configurations
    "config a string": (compress(config="rate"), TypeError, "compress_: config: .* got 'rate'"),
    "config a dict": (
        compress(config={"recipe": "int8"}),
        TypeError,
        "compress_: config: .* got a dict",
    ),
    "config a class": (
        compress(config=dcext.CompressionConfig),
        TypeError,
        "compress_: config: .* got <class",
    ),
    "unknown recipe": (configure(recipe="int4"), ValueError, "recipe: .*'rate'.* got 'int4'"),
    "recipe a list": (configure(recipe=["rate"]), ValueError, "recipe: .* got a list"),
    "bits a string": (configure(target_bits="4"), TypeError, "target_bits: .* got '4'"),
    "bits true": (configure(target_bits=True), TypeError, "target_bits: .* got True"),
    "bits too many": (configure(target_bits=99), ValueError, "target_bits: .* got 99"),
    "bits not a number": (
        configure(target_bits=float("nan")),
        ValueError,
        "target_bits: .* got nan",
    ),
    "ratio below one": (configure(target_ratio=0.5), ValueError, "target_ratio: .* got 0.5"),
    "size negative": (configure(target_nbytes=-1), ValueError, "target_nbytes: .* got -1"),
    "size a fraction": (configure(target_nbytes=1e6), TypeError, "target_nbytes: .* got 1000000.0"),
    "two targets": (
        configure(target_bits=4, target_ratio=2),
        ValueError,
        "target_bits, target_ratio: .* one",
    ),
    "sparsity a string": (
        configure(recipe="paper", sparsity="0.5"),
        TypeError,
        "sparsity: .* got '0.5'",
    ),
    "alpha a list": (
        configure(recipe="paper", alpha=[0.5]),
        TypeError,
        "alpha: .* got a list",
    ),
    "level of another codec": (
        configure(level=3),
        ValueError,
        "level: .*'zstd'.* got 3 with codec 'auto'",
    ),
    "level a string": (configure(codec="zstd", level="9"), TypeError, "level: .* got '9'"),
    "seed a float": (configure(seed=1.5), TypeError, "seed: .* got 1.5"),
    # compress_
    "model a name": (
        lambda made: dcext.compress_("org/model", INT8),
        TypeError,
        "compress_: model: .* got 'org/model'",
    ),
    "calibration a string": (
        calibrated("text"),
        TypeError,
        "compress_: calibration: .* got 'text'",
    ),
    "calibration strings": (
        calibrated(["a", "b"]),
        TypeError,
        "compress_: calibration: .* got a list",
    ),
    "calibration of strings": (
        calibrated({"input_ids": "a"}),
        TypeError,
        "calibration: input_ids: .* got 'a'",
    ),
    "calibration one-dimensional": (
        calibrated(IDS[0]),
        ValueError,
        "compress_: calibration: .* got shape \\(16,\\)",
    ),
    "calibration int32 flags": (
        calibrated(IDS.bool()),
        TypeError,
        "compress_: calibration: .* got torch.bool",
    ),
    "calibration float for ids": (
        calibrated(IDS.float()),
        TypeError,
        "compress_: calibration: .*int64.* got torch.float32",
    ),
    "calibration negative": (
        calibrated(IDS - 1),
        ValueError,
        "compress_: calibration: .* 0 to 255, got -1",
    ),
    "calibration beyond the vocabulary": (
        calibrated(IDS + 256),
        ValueError,
        "compress_: calibration: .* 0 to 255, got 256",
    ),
    "calibration missing": (
        compress(),
        ValueError,
        "compress_: calibration: recipe 'rate' .* got none",
    ),
    "calibration not wanted": (
        compress(config=INT8, calibration=IDS),
        ValueError,
        "compress_: calibration: recipe 'int8' .* got",
    ),
    "filter not callable": (
        compress(config=INT8, filter_fn="mlp"),
        TypeError,
        "compress_: filter_fn: .* got 'mlp'",
    ),
    "include not an expression": (
        compress(config=INT8, include="["),
        ValueError,
        "include: expected a regular expression, got '\\['",
    ),
    "include a list": (
        compress(config=INT8, include=["mlp"]),
        TypeError,
        "include: .* got a list",
    ),
    "include nothing": (
        compress(config=INT8, include="nowhere"),
        ValueError,
        "compress_: include: .* pass 'nowhere'",
    ),
    "compressed twice": (
        lambda made: dcext.compress_(made.model, INT8),
        ValueError,
        "compress_: model: .* got .*all are compressed",
    ),
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


@pytest.mark.parametrize("case", API)
def test_wrong_calls(made, case):
    call, kind, pattern = API[case]
    with pytest.raises(kind) as raised:
        call(made)
    message = str(raised.value)
    assert type(raised.value) is kind or kind is OSError
    assert "\n" not in message
    assert re.search(pattern, message), message
    assert not any((made.root / "work").iterdir())


COMPRESS = ("compress", "{root}/float", "-o", "{root}/work/x")
CALIBRATED = (*COMPRESS, "--calibration")
GENERATE = ("generate", "{root}/out", "--prompt")
SHAPES = ("plan", "--machine", "laptop", "--shapes")
# Arguments, exit status, what the last line of stderr matches.
CLI = {
    "unknown recipe": ((*COMPRESS, "--recipe", "int4"), 1, "--recipe: .*'rate'.* got 'int4'"),
    "bits that are no number": ((*COMPRESS, "--bits", "abc"), 2, "'--bits': .*number.* got 'abc'"),
    "too many bits": (
        (*COMPRESS, "--recipe", "data-free", "--bits", "99"),
        1,
        "--bits: expected .* got 99",
    ),
    "bits of int8": (
        (*COMPRESS, "--recipe", "int8", "--bits", "4"),
        1,
        "--bits: expected recipe 'rate' or 'data-free', got 'int8'",
    ),
    "bits and ratio": (
        (*COMPRESS, "--recipe", "data-free", "--bits", "4", "--ratio", "2"),
        1,
        "--bits, --ratio: .* one",
    ),
    "an infinite size": (
        (*COMPRESS, "--recipe", "data-free", "--size-mb", "inf"),
        1,
        "--size-mb: .* got inf",
    ),
    "a size that is no number": (
        (*COMPRESS, "--recipe", "data-free", "--size-mb", "nan"),
        1,
        "--size-mb: .* got nan",
    ),
    "a size below what is there": (
        (*COMPRESS, "--recipe", "data-free", "--size-mb", "0.001"),
        1,
        "--size-mb: expected more than .* got 0.001",
    ),
    "a codec with a typo": (
        (*COMPRESS, "--recipe", "int8", "--codec", "lz4"),
        1,
        "--codec: .* 'lz4'",
    ),
    "a level of another codec": (
        (*COMPRESS, "--recipe", "int8", "--level", "3"),
        1,
        "--level: .* got 3",
    ),
    "activations with a typo": (
        (*COMPRESS, "--recipe", "int8", "--activations", "int4"),
        1,
        "--activations: .* got 'int4'",
    ),
    "an alpha that is a word": (
        (*COMPRESS, "--recipe", "paper", "--alpha", "best", "--calibration", "{root}/text.txt"),
        1,
        "--alpha: .* got 'best'",
    ),
    "sparsity of another recipe": (
        (*COMPRESS, "--recipe", "int8", "--sparsity", "0.5"),
        1,
        "--sparsity: .*'paper'.* got 'int8'",
    ),
    "an option that is none": ((*COMPRESS, "--bit", "4"), 2, "No such option.*--bit"),
    "no output": (("compress", "{root}/float"), 2, "Missing option.*--output"),
    "no calibration": (COMPRESS, 1, "--calibration: .* got none"),
    "calibration that is missing": (
        (*CALIBRATED, "{root}/no.txt"),
        1,
        "--calibration: .*no.txt: expected .* found none",
    ),
    "calibration that is binary": (
        (*CALIBRATED, "{root}/binary.bin"),
        1,
        "--calibration: .*binary.bin: expected UTF-8 text, found",
    ),
    "calibration that is empty": (
        (*CALIBRATED, "{root}/empty.txt"),
        1,
        "--calibration: .*empty.txt: expected .* found an empty file",
    ),
    "calibration that is a folder": (
        (*CALIBRATED, "{root}/empty"),
        1,
        "--calibration: .*empty: expected a file, found a folder",
    ),
    "calibration that is too short": (
        (*CALIBRATED, "{root}/text.txt"),
        1,
        "--calibration: .* 96 windows of 512 tokens, got .*--calibration-tokens",
    ),
    "an output that is a model": (
        ("compress", "{root}/float", "-o", "{root}/float", "--recipe", "int8", "--overwrite"),
        1,
        "float: expected .* found",
    ),
    "an output that is there": (
        ("compress", "{root}/float", "-o", "{root}/out", "--recipe", "int8"),
        1,
        "out: expected .*--overwrite",
    ),
    "an expression that is none": (
        (*COMPRESS, "--recipe", "int8", "--include", "["),
        1,
        "--include: expected a regular expression, got '\\['",
    ),
    "an expression that finds nothing": (
        (*COMPRESS, "--recipe", "int8", "--include", "nowhere"),
        1,
        "--include.*'nowhere'",
    ),
    "a dtype with a typo": (
        (*COMPRESS, "--recipe", "int8", "--dtype", "int4"),
        1,
        "--dtype: .* got 'int4'",
    ),
    "shards of nothing": (
        (*COMPRESS, "--recipe", "int8", "--max-shard-gb", "0"),
        1,
        "--max-shard-gb: .* got 0",
    ),
    "a plot that is no PNG": (
        (*COMPRESS, "--recipe", "int8", "--plot", "{root}/work/plot.pdf"),
        1,
        "--plot: .*plot.pdf: expected a name ending in .png, got .pdf",
    ),
    "a model that is missing": (
        ("compress", "./nowhere", "-o", "{root}/work/x", "--recipe", "int8"),
        1,
        "./nowhere: expected a model folder .* found",
    ),
    "a model that is a text": (
        ("compress", "{root}/text.txt", "-o", "{root}/work/x", "--recipe", "int8"),
        1,
        "text.txt: expected a model folder .* found",
    ),
    "a model that is compressed": (
        ("compress", "{root}/out", "-o", "{root}/work/x", "--recipe", "int8"),
        1,
        "out: expected a float model, found .*compressed",
    ),
    "a hub name while offline": (
        ("compress", "nobody/nothing", "-o", "{root}/work/x", "--recipe", "int8"),
        1,
        "nobody/nothing: expected .* found",
    ),
    "a word for a folder": (("verify", "nowhere"), 1, "nowhere: expected a folder .* found none"),
    "verify a file": (
        ("verify", "{root}/text.txt"),
        1,
        "text.txt: expected a folder .* found a file",
    ),
    "verify a float model": (("verify", "{root}/float"), 1, "dcext.json: expected .* found"),
    "an empty prompt": ((*GENERATE, ""), 1, "--prompt: expected .* got ''"),
    "a temperature below zero": (
        (*GENERATE, "a", "--temperature", "-1"),
        2,
        "'--temperature': .* got '-1'",
    ),
    "a temperature that is no number": (
        (*GENERATE, "a", "--temperature", "nan"),
        2,
        "'--temperature': .* got 'nan'",
    ),
    "a chat without a template": (
        (*GENERATE, "a", "--chat"),
        1,
        "--chat: expected .* found none",
    ),
    "no memory": (
        (*GENERATE, "a", "--host-memory", "0"),
        1,
        "--host-memory: expected at least .* got 0",
    ),
    "a memory with a typo": (
        (*GENERATE, "a", "--host-memory", "4 GiBB"),
        1,
        "--host-memory: .* got '4 GiBB'",
    ),
    "a device with a typo": ((*GENERATE, "a", "--device", "gpu"), 1, "--device: .* got 'gpu'"),
    "a mode with a typo": ((*GENERATE, "a", "--mode", "fast"), 1, "--mode: .* got 'fast'"),
    "device memory on the CPU": (
        (*GENERATE, "a", "--device-memory", "1GiB"),
        1,
        "--device-memory: .* got '1GiB'",
    ),
    "a plan that is missing": (
        (*GENERATE, "a", "--plan", "{root}/no.json"),
        1,
        "--plan: .*no.json: expected a file, found none",
    ),
    "a plan that is no JSON": (
        (*GENERATE, "a", "--plan", "{root}/text.txt"),
        1,
        "--plan: .*text.txt: expected JSON, found",
    ),
    "a plan of another model": (
        (*GENERATE, "a", "--plan", "{root}/other.json"),
        1,
        "--plan: other: expected a compressed layer",
    ),
    "eval on a binary": (
        ("eval", "{root}/out", "--text", "{root}/binary.bin"),
        1,
        "--text: .*binary.bin: expected UTF-8 text, found",
    ),
    "eval on nothing": (
        ("eval", "{root}/out", "--text", "{root}/empty.txt"),
        1,
        "--text: .*empty.txt: expected .* found an empty file",
    ),
    "eval on what is missing": (
        ("eval", "{root}/out", "--text", "{root}/no.txt"),
        1,
        "--text: .*no.txt: expected a file, found none",
    ),
    "analyze a binary": (
        ("analyze", "{root}/float", "--text", "{root}/binary.bin"),
        1,
        "--text: .*binary.bin: expected UTF-8 text, found",
    ),
    "plan for no tokens": ((*SHAPES, "opt-1.3b", "--tokens", "0"), 1, "--tokens: .* got"),
    "plan for minus tokens": ((*SHAPES, "opt-1.3b", "--tokens", "1:-2"), 1, "--tokens: .* got"),
    "plan at a slowdown below zero": (
        (*SHAPES, "opt-1.3b", "--slowdown=-5%"),
        1,
        "--slowdown: .* got",
    ),
    "shapes with a typo": (
        (*SHAPES, "gpt-2"),
        1,
        "--shapes: expected one of opt-1.3b.* got 'gpt-2'",
    ),
    "a machine with a typo": (
        ("plan", "--shapes", "opt-1.3b", "--machine", "pcie9"),
        1,
        "--machine: .*pcie4.* got 'pcie9'",
    ),
    "a machine that is no JSON": (
        ("plan", "--shapes", "opt-1.3b", "--machine", "{root}/text.txt"),
        1,
        "--machine: .*text.txt: expected JSON, found",
    ),
    "device memory of a machine without": (
        (*SHAPES, "opt-1.3b", "--device-memory", "wide"),
        1,
        "--device-memory: .* got 'wide'",
    ),
    "neither a folder nor shapes": (("plan",), 1, "expected either OUT.* or --shapes, got neither"),
    "tune a folder that is missing": (
        ("tune", "{root}/nowhere"),
        1,
        "nowhere: expected a folder, found none",
    ),
    "tune a device with a typo": (("tune", "--device", "gpu"), 1, "--device: .* got 'gpu'"),
    "decompress over something else": (
        ("decompress", "{root}/out", "-o", "{root}/full"),
        1,
        "full: expected .* found 'letter.txt'",
    ),
    "a command that is none": (("compres",), 2, "No such command 'compres'"),
}


def run(monkeypatch, capfd, *arguments):
    """Exit status and lines of stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["dcext", *arguments])
    with pytest.raises(SystemExit) as left:
        app.main()
    out, err = capfd.readouterr()
    assert out == ""
    return left.value.code, err.strip().splitlines()


@pytest.mark.parametrize("case", CLI)
def test_wrong_commands(made, monkeypatch, capfd, case):
    arguments, code, pattern = CLI[case]
    found = run(monkeypatch, capfd, *(a.replace("{root}", str(made.root)) for a in arguments))
    assert found[0] == code
    assert found[1][-1].startswith("error: ")
    assert re.search(pattern, found[1][-1]), found[1][-1]
    assert "Traceback" not in "".join(found[1])
    assert not any((made.root / "work").iterdir())


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


UNREACHABLE = """
import sys, time
import dcext
from dcext.cli.app import main
begin = time.perf_counter()
try:
    dcext.from_pretrained("nobody/nothing")
except OSError as error:
    print(error)
sys.argv[1:] = ["compress", "nobody/nothing", "-o", "x", "--recipe", "int8"]
try:
    main()
except SystemExit as left:
    print(left.code, time.perf_counter() - begin)
"""


def test_an_unreachable_hub_fails_in_seconds(tmp_path):
    """In a process of its own, as huggingface_hub reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", UNREACHABLE],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("nobody/nothing: expected a folder or a name on the hub, found no")
    assert lines[1].startswith("1 ")
    assert float(lines[1].split()[1]) < 15
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: OSError: nobody/nothing: expected a model folder")
    assert not (tmp_path / "x").exists()


EDITS = {
    "edited": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("  ", " ")
    ),
    "saved again": lambda folder: with_template().save_pretrained(folder),
}


def with_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<|user|>"])
    return tokenizer


@pytest.mark.parametrize("edit", EDITS)
def test_a_tokenizer_that_is_not_the_sealed_one(made, tmp_path, monkeypatch, capfd, edit):
    """Weights load as before; who reads or verifies the tokenizer is told the file and the way out, which works."""
    folder = tmp_path / "out"
    shutil.copytree(made.root / "out", folder)
    EDITS[edit](folder)
    model = dcext.from_pretrained(folder)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder) is not None
    for arguments in (("verify", folder), ("generate", folder, "--prompt", "a")):
        code, lines = run(monkeypatch, capfd, *map(str, arguments))
        assert code == 1
        assert re.search(
            r"tokenizer.*\.json: checksum: expected .* found .*save_pretrained", lines[-1]
        )
    before = (folder / "tokenizer.json").read_bytes()
    dcext.save_pretrained(model, folder, overwrite=True)
    assert (folder / "tokenizer.json").read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["dcext", "verify", str(folder)])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert not left.value.code


def test_a_package_that_is_missing(made, monkeypatch, capfd):
    """Each is named with the extra that brings it, before any work."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    arguments = ("compress", str(made.root / "float"), "-o", str(made.root / "work" / "x"))
    plot = ("--recipe", "int8", "--plot", str(made.root / "work" / "plot.png"))
    code, lines = run(monkeypatch, capfd, *arguments, *plot)
    assert code == 1
    assert re.search("plots: expected matplotlib, found none .*dcext\\[plot\\]", lines[-1])
    assert not any((made.root / "work").iterdir())


def test_transformers_is_missing(made, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = "expected the package transformers, found none: pip install 'dcext[hf]'"
    with pytest.raises(ImportError) as raised:
        dcext.from_pretrained(made.root / "out")
    assert expected in str(raised.value)
    code, lines = run(monkeypatch, capfd, "generate", str(made.root / "out"), "--prompt", "a")
    assert code == 1
    assert expected in lines[-1]
