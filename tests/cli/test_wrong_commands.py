"""Wrong commands: one clear line each, with options as the user typed them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

import dcext
from dcext.cli import app
from models import byte_tokenizer
from wrong_usage import make_files

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("wrong"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Names on the hub are looked for in the cache only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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


UNREACHABLE = """
import sys, time
import dcext
from dcext.cli.app import main

def fail(seconds):
    raise AssertionError("it waits, to ask the hub again")

time.sleep = fail
try:
    dcext.from_pretrained("nobody/nothing")
except OSError as error:
    print(error)
sys.argv[1:] = ["compress", "nobody/nothing", "-o", "x", "--recipe", "int8"]
try:
    main()
except SystemExit as left:
    print(left.code)
"""


def test_an_unreachable_hub_is_asked_once(tmp_path):
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
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("nobody/nothing: expected a folder or a name on the hub, found no")
    assert lines[1] == "1"
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
