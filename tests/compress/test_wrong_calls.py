"""Wrong configurations and calls of ``compress_``: one clear line each, with names as the user wrote them."""

from __future__ import annotations

import pytest
import torch

import dcext
from models import tiny_llama
from wrong_usage import check_call, make_files

transformers = pytest.importorskip("transformers")

INT8 = dcext.CompressionConfig(recipe="int8")
IDS = torch.zeros(2, 16, dtype=torch.int64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("wrong"))


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


def configure(**choices):
    """A configuration."""
    return lambda made: dcext.CompressionConfig(**choices)


CALLS = {
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
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(made, case):
    check_call(made, *CALLS[case])
