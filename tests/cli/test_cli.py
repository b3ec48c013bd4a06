"""The command line on a small model, and on the real one of the demo."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dcext
from conftest import ROOT
from dcext.evaluate import generation_speed, perplexity
from dcext.format import CheckpointReader
from dcext.hub import load_float_model
from forked import run, run_json
from models import byte_tokenizer, tiny_llama

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 30


def run_python(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in a Python of its own."""
    command = [sys.executable, "-c", "from dcext.cli.app import main; main()", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model with a byte-level tokenizer, a text, and the model compressed by the command."""
    root = tmp_path_factory.mktemp("cli")
    byte_tokenizer().save_pretrained(root / "float")
    tiny_llama().save_pretrained(root / "float")
    (root / "text.txt").write_text(TEXT)
    report = run_json(
        "compress", root / "float", "-o", root / "out", "--recipe", "int8", "--codec", "zstd"
    )
    assert report["output"] == str(root / "out")
    assert report["ratio"] > 0
    return root


def test_inspect(folders):
    report = run_json("inspect", folders / "out")
    keys = {"bits_per_weight", "entropy", "ratio"}
    assert keys <= set(report)
    assert len(report["tensors"]) == 15
    for row in report["tensors"]:
        assert keys | {"name", "shape", "codec"} <= set(row)
        assert row["bits_per_weight"] > row["entropy"]
        assert row["ratio"] == pytest.approx(8 / row["bits_per_weight"])
    table = run("inspect", folders / "out").stdout
    assert "model.layers.1.mlp.down_proj" in table
    assert "total" in table


def test_verify(folders):
    assert run_json("verify", folders / "out")["ok"] is True
    assert "every byte of" in run("verify", folders / "out").stdout


def test_decompress(folders):
    run("decompress", folders / "out", "-o", folders / "plain")
    plain = load_file(folders / "plain" / "dcext.safetensors")
    model = dcext.from_pretrained(folders / "out")
    layer = model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj"
    assert plain[f"{name}.weight"].dtype == torch.int8
    assert torch.equal(plain[f"{name}.weight"], layer.decode_qweight())
    assert torch.equal(plain[f"{name}.row_scale"], layer.row_scale)
    assert torch.equal(plain["model.norm.weight"], model.model.norm.weight)


def test_eval(folders):
    report = run_json(
        "eval",
        folders / "out",
        "--text",
        folders / "text.txt",
        "--context",
        "64",
        "--max-tokens",
        "500",
    )
    assert set(report) >= {"perplexity", "tokens", "tokens_per_s", "peak_rss_bytes"}
    assert report["tokens"] == 500 - 8  # the first token of each of the eight windows
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(folders / "out")(TEXT).input_ids)[
        :500
    ]
    model = dcext.from_pretrained(folders / "out")
    assert report["perplexity"] == pytest.approx(perplexity(model, ids, context=64).perplexity)


def test_generate(folders):
    arguments = ("generate", folders / "out", "--prompt", "It was", "--max-new-tokens", "5")
    assert run(*arguments).stdout.startswith("It was")
    sampled = [run(*arguments, "--temperature", "1", "--seed", seed).stdout for seed in (1, 1)]
    assert sampled[0] == sampled[1]


def test_a_plan_is_made_saved_and_followed(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("DCEXT_CACHE", str(tmp_path / "cache"))
    plan, png = tmp_path / "plan.json", tmp_path / "plan.png"
    report = run_json(
        *("plan", folders / "out", "--host-memory", "60MB", "--tokens", "1:8,16:1"),
        *("-o", plan, "--plot", png, "--measure"),
    )
    assert report == {**json.loads(plan.read_text()), "curve": report["curve"]}
    assert len(report["layers"]) == 15
    assert {each["tokens"] for each in report["passes"]} == {1, 16}
    assert all(each["measured_s"] > 0 for each in report["passes"])
    assert png.read_bytes().startswith(b"\x89PNG")
    machines = list((tmp_path / "cache/machines").iterdir())
    assert len(machines) == 1
    copied = tmp_path / "machine.json"
    assert run_json("tune", "-o", copied) == json.loads(
        machines[0].read_text()
    )  # not measured again
    arguments = ("generate", folders / "out", "--prompt", "It was", "--max-new-tokens", "5")
    assert run(*arguments, "--plan", plan).stdout == run(*arguments).stdout


def draw_few_points() -> None:
    """Plans for the curve over memory take seconds each."""
    from dcext.planning import explain

    explain.SHARES = explain.SHARES[::5]


def test_plans_for_what_is_not_here(tmp_path):
    options = ("plan", "--shapes", "opt-1.3b", "--machine", "pcie4", "--device-memory", "800MB")
    shown = run(*options, "--host-memory", "8GB", "--plot", "-", before=draw_few_points).stdout
    assert "projected: PCIe 4.0" in shown
    assert "of device memory; plain INT8" in shown
    assert "INT8 operations for each stored byte" in shown
    missed = run(*options[:-1], "10MB", code=1).stderr
    assert "BudgetError: plan: expected room" in missed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "plan: expected either OUT, a folder that `dcext compress` wrote, or --shapes"),
        (["plan", "--shapes", "gpt-2"], "shapes: expected one of opt-1.3b"),
        (["plan", "--shapes", "opt-1.3b", "--tokens", "x"], "--tokens: expected tokens"),
        (["plan", "--shapes", "opt-1.3b", "--slowdown", "x"], "--slowdown: expected a share"),
        (["plan", "--shapes", "opt-1.3b", "--plot", "a.pdf"], "expected a name ending in .png"),
        (["plan", "--shapes", "opt-1.3b", "--measure"], "--measure: expected a model"),
    ],
)
def test_wrong_options_of_plan(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("DCEXT_CACHE", str(tmp_path))
    machine = ["--machine", "laptop"] if "--measure" not in arguments else []
    assert message in " ".join(run(*arguments, *machine, code=1).stderr.split())


def test_info():
    report = run_json("info")
    assert report["zstd"] == "1.5.7"
    assert report["isa"] in report["isas"]
    assert report["cpu"]


def test_the_example_of_the_readme(folders, tmp_path, monkeypatch):
    code = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("```python\n")[2]
        .partition("```")[0]
    )
    assert code.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    names: dict = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folders / "float")), names)
    assert names["model"](torch.tensor([[1]])).logits.isfinite().all()
    assert CheckpointReader(tmp_path / "smollm2-dc").names()


@pytest.fixture(scope="module")
def calibration(folders):
    path = folders / "calibration.txt"
    path.write_text("\n".join(f"{i} bottles of beer on the wall" for i in range(900, 0, -1)))
    return ("--calibration", path, "--calibration-tokens", 512, "--context", 64)


def test_compress_with_calibration(folders, calibration, tmp_path):
    plot = tmp_path / "bits.png"
    arguments = ("-o", tmp_path / "out", *calibration, "--bits", 5.5, "--plot", plot)
    report = run_json("compress", folders / "float", *arguments)
    rows = [layer for layer in report["report"]["layers"] if layer["recipe"] == "rate"]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    bits = 8 * sum(row["stored_nbytes"] for row in rows) / weights
    assert bits == pytest.approx(5.5, rel=0.005)
    assert plot.read_bytes().startswith(b"\x89PNG")
    run("verify", tmp_path / "out")
    assert not list(tmp_path.glob(".*resume*"))
    inspected = run_json("inspect", tmp_path / "out")
    assert inspected["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    arguments = ("-o", tmp_path / "sized", *calibration, "--size-mb", report["nbytes"] / 1e6)
    sized = run_json("compress", folders / "float", *arguments)
    assert sized["nbytes"] == pytest.approx(report["nbytes"], rel=0.05)  # half of it side files


def test_interrupted_compress_goes_on(folders, calibration, tmp_path):
    """Killed once a block is kept; the same command again ends with the bytes of a run that was let alone."""
    run("compress", folders / "float", "-o", tmp_path / "whole", *calibration)
    code = "from dcext.cli.app import main; main()"
    arguments = ["compress", folders / "float", "-o", tmp_path / "out", *calibration]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kept = tmp_path / ".out.dcext-resume" / "block-00000.safetensors"
    while process.poll() is None and not kept.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(*arguments)
    data = [(tmp_path / name / "dcext.safetensors").read_bytes() for name in ("out", "whole")]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "/nowhere"), "/nowhere: expected a folder"),
        (
            ("compress", "./nowhere", "-o", "{root}/x", "--recipe", "int8"),
            "expected a model folder or a .gguf file",
        ),
        (("compress", "{root}/out", "-o", "{root}/x", "--recipe", "int8"), "compressed already"),
        (("compress", "{root}/float", "-o", "{root}/out", "--recipe", "int8"), "pass --overwrite"),
        (
            ("compress", "{root}/float", "-o", "{root}/float", "--recipe", "int8", "--overwrite"),
            "not dcext's",
        ),
        (
            ("compress", "{root}/float", "-o", "{root}/x", "--recipe", "int8", "--codec", "lz4"),
            "codec: expected 'auto'",
        ),
        (
            ("compress", "{root}/float", "-o", "{root}/x", "--recipe", "int8", "--dtype", "int4"),
            "--dtype: expected one of",
        ),
        (
            ("compress", "{root}/float", "-o", "{root}/x"),
            "--calibration: expected a text file for --recipe rate",
        ),
        (
            ("compress", "{root}/float", "-o", "{root}/x", "--calibration", "{root}/no.txt"),
            "no.txt: expected a file",
        ),
        (
            ("compress", "{root}/float", "-o", "{root}/x", "--calibration", "{root}/text.txt"),
            "expected enough for 96 windows of 512 tokens",
        ),
        (("inspect", "{root}/float"), "expected the manifest"),
        (("eval", "{root}/out", "--text", "{root}/no.txt"), "no.txt"),
    ],
)
def test_errors_are_one_line(folders, arguments, message):
    result = run(*(argument.format(root=folders) for argument in arguments), code=1)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (folders / "x").exists()


def test_damaged_weights_are_one_line(folders, tmp_path):
    """Cut short, as a download that was interrupted; transformers' own error is no OSError."""
    shutil.copytree(folders / "float", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 5000)
    for memory in ("--no-low-memory", "--low-memory"):
        command = ("compress", tmp_path / "cut", "-o", tmp_path / "out", "--recipe", "int8", memory)
        error = run(*command, code=1).stderr.strip()
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("error: ")
        assert "safetensors" in error.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_usage_errors():
    assert "Missing option" in run("compress", "model", code=2).stderr
    for command in (
        "compress",
        "analyze",
        "inspect",
        "verify",
        "decompress",
        "eval",
        "generate",
        "info",
    ):
        assert "Usage" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("ids", "context"),
    [(torch.tensor([1]), 8), (torch.zeros(2, 2).long(), 8), (torch.arange(9), 1)],
)
def test_perplexity_refuses_what_it_cannot_do(ids, context):
    with pytest.raises(ValueError, match=r"expected .* got"):
        perplexity(tiny_llama(), ids, context=context)


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    result = perplexity(model, torch.arange(100) % 256, context=30)
    assert result.perplexity == pytest.approx(256)
    assert result.tokens == 29 * 3 + 9


@pytest.mark.real_model
def test_the_real_model(smollm2_gguf, smollm2, evaluation_text, tmp_path):
    """Compressed by the command, it says what raw INT8 says, bit for bit, and is close to the float model."""
    run("compress", smollm2_gguf, "-o", tmp_path / "out", "--recipe", "int8")
    model, tokenizer = load_float_model(smollm2)
    text = evaluation_text.read_text(encoding="utf-8")[:8000]
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)[:1024]
    reference = perplexity(model, ids).perplexity
    raw = dcext.compress_(model, dcext.CompressionConfig(recipe="int8", codec="raw"))
    compressed = dcext.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(compressed(ids[None, :64]).logits, raw(ids[None, :64]).logits)
    assert reference < perplexity(compressed, ids).perplexity < 1.10 * reference
    speed = generation_speed(compressed, ids[:32], new_tokens=2, repeats=1)
    assert speed.prefill_tokens_per_s > 0
    report = run_json("inspect", tmp_path / "out")
    payload_bits = 8 * sum(
        module.payload.numel()
        for module in {
            id(m.payload): m for m in compressed.modules() if hasattr(m, "payload")
        }.values()
    )
    assert payload_bits <= 1.01 * report["entropy"] * report["weights"]


def test_names_are_left_out_and_the_coverage_is_told(folders, tmp_path):
    text = run(
        "compress", folders / "float", "-o", tmp_path / "m", "--recipe", "int8", "--exclude", "mlp"
    ).stdout
    assert "weights compressed" in text
    assert "excluded by the caller" in text
    report = json.loads((tmp_path / "m" / "compression_report.json").read_text())
    assert {row["name"].split(".")[3] for row in report["left"] if "mlp" in row["name"]} == {"mlp"}
    error = run(
        "compress",
        folders / "float",
        "-o",
        tmp_path / "n",
        "--exclude",
        "(",
        "--recipe",
        "int8",
        code=1,
    )
    assert "exclude: expected a regular expression" in error.stderr


# As transformers writes it, and as it is on the hub, where only the configuration tells the class.
TOKENIZER_CONFIGS = {
    "saved": '{"tokenizer_class": "MarianTokenizer"}',
    "hub": '{"source_lang": "en", "target_lang": "de"}',
}


@pytest.fixture(params=list(TOKENIZER_CONFIGS))
def marian(request, tmp_path, monkeypatch):
    """A model whose tokenizer cannot be loaded: its package is hidden."""
    folder = tmp_path / "float"
    config = transformers.MarianConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=256,
        max_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=1,
    )
    transformers.MarianMTModel(config).save_pretrained(folder)
    (folder / "source.spm").write_bytes(b"\0")
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(TOKENIZER_CONFIGS[request.param])
    hide("sentencepiece", tmp_path / "hidden", monkeypatch)
    return folder


def hide(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets processes that are started from here not find a package."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_tokenizer_that_is_not_needed_is_no_problem(marian, tmp_path):
    folder = marian
    out = tmp_path / "out"
    told = run_python("compress", folder, "-o", out, "--recipe", "data-free", "--bits", "5").stderr
    assert "pip install sentencepiece" in told
    for name in ("source.spm", "vocab.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    model = dcext.from_pretrained(out)
    assert type(model).__name__ == "MarianMTModel"
    bits = {
        half: [
            layer.bits_per_weight
            for layer in model.dcext_report.layers
            if f".{half}.layers." in layer.name
        ]
        for half in ("encoder", "decoder")
    }
    mean = {half: sum(values) / len(values) for half, values in bits.items()}
    assert mean["encoder"] == pytest.approx(mean["decoder"], rel=0.05)  # one target over both


def test_a_tokenizer_that_is_needed_and_missing_is_one_line(marian, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("compress", marian, "-o", tmp_path / "out", "--calibration", tmp_path / "text.txt")
    (error,) = run_python(*command, code=1).stderr.strip().splitlines()
    assert error.startswith("error: ImportError: ")
    assert "pip install sentencepiece" in error
    assert len(error) < 300
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_one_line(folders, tmp_path, monkeypatch):
    hide("transformers", tmp_path / "hidden", monkeypatch)
    command = ("compress", folders / "float", "-o", tmp_path / "out", "--recipe", "int8")
    (error,) = run_python(*command, code=1).stderr.strip().splitlines()
    assert error.startswith("error: ImportError: expected the package transformers, found none")
    assert "pip install 'dcext[hf]'" in error


def limit_files(nbytes: int) -> None:
    """Writing more to a file fails, instead of ending the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def test_a_result_that_cannot_be_written_does_not_lose_the_calibration(folders, tmp_path):
    """Files may grow as large as the steps that are kept, so that only the shard of the result fails."""
    shutil.copytree(folders / "float", tmp_path / "float")
    tiny_llama(vocab_size=65536).save_pretrained(tmp_path / "float")
    command = [
        *("compress", str(tmp_path / "float"), "-o", str(tmp_path / "out")),
        *("--calibration", str(folders / "text.txt"), "--bits", "6"),
        *("--calibration-tokens", "256", "--context", "64"),
    ]
    limited = functools.partial(limit_files, 2_000_000)
    assert "File too large" in run(*command, before=limited, code=1).stderr
    steps = tmp_path / ".out.dcext-resume"
    kept = sorted(path.name for path in steps.iterdir())
    assert {"block-00000.safetensors", "block-00001.safetensors"} <= set(kept)
    before = {name: (steps / name).stat().st_mtime_ns for name in kept if "block" in name}
    assert sorted(path.name for path in tmp_path.iterdir()) == [steps.name, "float"]
    run(*command, before=limited, code=1)
    assert before == {name: (steps / name).stat().st_mtime_ns for name in before}  # not done again
    run(*command)
    assert not steps.exists()
    assert dcext.from_pretrained(tmp_path / "out") is not None
