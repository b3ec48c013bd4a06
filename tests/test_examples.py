"""The examples run, on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(example: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [(), ("--dora", "--checkpointing", "--recipe", "data-free")])
def test_finetune_lora(tmp_path, options):
    for package in ("peft", "transformers", "typer"):
        pytest.importorskip(package, reason=f"requires {package}")
    sizes = ("--steps", "20", "--context", "32", "--learning-rate", "0.01")
    result = json.loads(run("finetune_lora.py", "--smoke", *sizes, "-o", str(tmp_path), *options))
    assert result["last_mean_loss"] < result["first_mean_loss"] - 0.1
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.1
    assert result["held_out_loss_loaded"] == result["held_out_loss_after"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
