"""The examples run, on tiny models."""

import json

import pytest

from conftest import ROOT
from forked import run_script


@pytest.mark.parametrize("options", [(), ("--dora", "--checkpointing", "--recipe", "data-free")])
def test_finetune_lora(tmp_path, options):
    for package in ("peft", "transformers", "typer"):
        pytest.importorskip(package, reason=f"requires {package}")
    sizes = ("--steps", "20", "--context", "32", "--learning-rate", "0.01")
    script = ROOT / "examples" / "finetune_lora.py"
    done = run_script(script, "--smoke", *sizes, "-o", tmp_path, *options)
    result = json.loads(done.stdout)
    assert result["last_mean_loss"] < result["first_mean_loss"] - 0.1
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.1
    assert result["held_out_loss_loaded"] == result["held_out_loss_after"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
