"""Importing dcext: what it loads, and that every name is there when it is asked for."""

import subprocess
import sys

import pytest

import dcext

HEAVY = (
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "typer",
    "rich",
    "safetensors",
    "matplotlib",
)


def test_importing_loads_nothing_heavy():
    code = f"""
import sys, torch
before = set(sys.modules)
import dcext
torch.ops.dcext.linear
assert dcext.codec.CODECS
print(*({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({HEAVY})))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("name", dcext.__all__)
def test_every_name_is_there(name):
    assert name in dir(dcext)
    if name == "DCConfig":
        pytest.importorskip("transformers")
    assert getattr(dcext, name).__name__ == name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'dcext' has no attribute 'compress_model'"):
        dcext.compress_model  # noqa: B018
