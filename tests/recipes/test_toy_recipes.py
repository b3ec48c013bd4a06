"""Recipes that somebody else registers work as those that come with dcext."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcext
from dcext.nn.compressed import compressed_modules
from dcext.quantize import recipe
from models import logits, tiny_llama

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def toys(monkeypatch):
    """The recipes of ``toy_recipes``, known while a test runs."""
    monkeypatch.delitem(sys.modules, "toy_recipes", raising=False)
    yield importlib.import_module("toy_recipes")
    for name in ("toy", "toy-calibrated"):
        recipe._registered.pop(name, None)


def text() -> torch.Tensor:
    return torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "calibration"), [("toy", None), ("toy-calibrated", text())])
def test_model_is_compressed_stored_and_loaded(name, calibration, toys, tmp_path):
    exact, config = tiny_llama(), dcext.CompressionConfig(recipe=name, activations="none")
    model = dcext.compress_(tiny_llama(), config, calibration)
    layers = [layer for layer in model.dcext_report.layers if layer.recipe == name]
    assert len(layers) == 2 * 7
    assert all((layer.output_snr_db is None) == (calibration is None) for layer in layers)
    for layer in layers:
        weight = exact.get_submodule(layer.name).weight
        found = model.get_submodule(layer.name).dequantize()
        torch.testing.assert_close(found, toys.round_to_powers(weight).dequantize())
    dcext.save_pretrained(model, tmp_path / "out", config=config)
    loaded = dcext.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert len(compressed_modules(loaded)) == len(compressed_modules(model))


def test_checkpoints_load_where_the_recipe_is_not_known(toys, tmp_path):
    model = dcext.compress_(tiny_llama(), dcext.CompressionConfig(recipe="toy"))
    dcext.save_pretrained(model, tmp_path / "out")
    del recipe._registered["toy"]
    with pytest.raises(ValueError, match=r"recipe: expected 'rate' .* got 'toy'"):
        dcext.CompressionConfig(recipe="toy")
    assert torch.equal(logits(dcext.from_pretrained(tmp_path / "out")), logits(model))


def test_what_a_recipe_takes_is_checked(toys):
    with pytest.raises(ValueError, match="expected a new recipe, got a second 'toy'"):
        recipe.register(recipe.Recipe("toy"))
    with pytest.raises(ValueError, match=r"target_bits: expected recipe .*'data-free', got 'toy'"):
        dcext.CompressionConfig(recipe="toy", target_bits=4)
    with pytest.raises(
        ValueError, match=r"'toy-calibrated' needs calibration text.* or 'toy' needs"
    ):
        dcext.compress_(tiny_llama(), dcext.CompressionConfig(recipe="toy-calibrated"))
    with pytest.raises(ValueError, match="recipe 'toy' takes none"):
        dcext.compress_(tiny_llama(), dcext.CompressionConfig(recipe="toy"), text())


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process that imports the toys first."""
    code = "import toy_recipes; from dcext.cli.app import main; main()"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    environment["PYTHONPATH"] = f"{TESTS}{os.pathsep}{environment.get('PYTHONPATH', TESTS.parent)}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_command_line_takes_it(tmp_path):
    pytest.importorskip("typer")
    shown = run_cli("compress", "--help")
    assert "toy, toy-calibrated (needs --calibration)" in " ".join(shown.stdout.split())
    tiny_llama().save_pretrained(tmp_path / "float")
    done = run_cli("compress", tmp_path / "float", "-o", tmp_path / "out", "--recipe", "toy")
    assert done.returncode == 0, done.stderr
    assert compressed_modules(dcext.from_pretrained(tmp_path / "out"))
