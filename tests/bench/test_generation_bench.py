"""bench/generation.py: what it draws, what it compares, and a run of every row on a tiny model."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcext

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "third_party")]

pytest.importorskip("transformers", reason="requires transformers")

import generation  # noqa: E402
from whole import drawn, llama_files, split, tables  # noqa: E402
from whole.torch_worker import TorchEngine, digest, num_weights  # noqa: E402

SPEED = {"threads", "prefill_tokens_per_s", "generation_tokens_per_s", "token_ms", "tokens"}
SPLIT = {"token_ms", "products_ms", "others_ms", "python_ms"}


def test_entropy_of_drawn_integers():
    layers, embeddings = drawn.pools("normal")
    assert dcext.entropy(layers.take(512, 1024)) == pytest.approx(3.64, abs=0.01)
    assert dcext.entropy(embeddings.take(512, 1024)) == pytest.approx(6.7, abs=0.01)
    for pool in (layers, embeddings, drawn.pools("levels")[0]):
        weights = pool.take(512, 1024) * pool.scale
        assert float(weights.std()) == pytest.approx(drawn.WEIGHT_STD, rel=0.01)


def test_levels_are_few_but_for_exceptions():
    size = 1 << 20
    q = drawn.levels(size, torch.Generator().manual_seed(0))
    fine = int(drawn.FINE_SHARE * size)
    assert (len(drawn.LEVELS), len(drawn.FINE_LEVELS)) == (16, 32)
    parts = zip(q.split([size - fine, fine]), (drawn.LEVELS, drawn.FINE_LEVELS), strict=True)
    for part, levels in parts:
        others = ~torch.isin(part, torch.tensor(levels, dtype=torch.int8))
        assert float(others.float().mean()) == pytest.approx(drawn.OTHERS_SHARE, rel=0.2)


def test_a_matrix_larger_than_the_pool():
    pool = drawn.Pool(torch.arange(-50, 50, dtype=torch.int8), seed=0)
    q = pool.take(7, 33)
    assert q.shape == (7, 33)
    rises = q.flatten().diff() == 1
    assert int((~rises).sum()) <= math.ceil(7 * 33 / 100) - 1


def test_drawn_model_is_tied_and_counts_once():
    raw, zstd, plain = (drawn.drawn_model("tiny", "normal", c) for c in ("raw", "zstd", None))
    assert raw.lm_head.payload is raw.model.embed_tokens.payload
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    shape = drawn.SHAPES["tiny"]
    hidden = shape["hidden_size"]
    block = hidden * (2 * hidden + 2 * hidden // 2 + 3 * shape["intermediate_size"] + 2)
    expected = 2 * block + hidden * (shape["vocab_size"] + 1)
    assert num_weights(raw) == num_weights(plain) == expected
    assert digest(raw) == digest(zstd) != digest(drawn.drawn_model("tiny", "levels", "raw"))
    assert digest(plain) is None
    weight = raw.model.layers[1].mlp.down_proj.dequantize()
    torch.testing.assert_close(plain.model.layers[1].mlp.down_proj.weight, weight)


def test_static_cache_writes_the_same_tokens(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: model)
    model = drawn.drawn_model("tiny", "normal", "raw")
    prompt = list(range(20, 36))
    with torch.inference_mode():
        grown, fixed = (
            split.generate(TorchEngine(model, length), prompt, 8)[0] for length in (None, 32)
        )
    assert grown == fixed


def test_products_are_timed_and_layers_left_as_they_were():
    before = dcext.DCLinear.forward, torch.nn.Linear.forward
    layer = torch.nn.Linear(64, 64)
    with split.timed_products() as spent:
        layer(torch.ones(64))
    assert spent[0] > 0
    assert (dcext.DCLinear.forward, torch.nn.Linear.forward) == before


def row(name, tokens, digest=None, **fields):
    speeds = [{"threads": 1, "generation_tokens_per_s": len(name), "tokens": tokens}]
    common = {"model": "m", "sizes": {"prompt": 1, "new_tokens": 2}, "compiled": False}
    integers = digest and "INT8"
    return {
        **common,
        "name": name,
        "speeds": speeds,
        "digest": digest,
        "integers": integers,
        **fields,
    }


def test_equal_integers_must_write_equal_tokens():
    rows = [row("INT8 raw", [1, 2], "a"), row("zstd", [1, 2], "a"), row("float", [4])]
    rows += [row("rate", [3], "b", integers=None), row("compiled", [5], "a", compiled=True)]
    assert generation.disagreements(rows) == []
    rows += [row("first", [5], "a"), row("second", [5], "c")]
    assert generation.disagreements(rows) == [
        "m: first and INT8 raw write other tokens",
        "m: second and INT8 raw hold other integers",
    ]


def test_ratios():
    found = tables.ratios([row("INT8 raw", []), row("zstd", [])])["ratios"]
    assert [r["over_raw"] for r in found] == [[1.0], [0.5]]
    assert [r["over_bfloat16"] for r in found] == [None, None]


def test_smoke(tmp_path):
    output = tmp_path / "out.json"
    chosen = re.compile("raw|zstd|packed$|Q8_0")  # one of each kind
    command = [sys.executable, str(ROOT / "bench/generation.py"), "--smoke"]
    command += ["--rows", chosen.pattern, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(output.read_text())
    rows = {r["name"]: r for r in report["rows"]}
    expected = {c.name for c in generation.smoke_cases() if chosen.search(c.name)}
    if not llama_files.ENVIRONMENT.is_ready():
        expected = {name for name in expected if not name.startswith("llama.cpp")}
    assert rows.keys() == expected
    for found in rows.values():
        assert SPEED.issubset(found["speeds"][0])
        assert len(found["speeds"][0]["tokens"]) == generation.SMOKE_SIZES.new_tokens + 1
        assert found["peak_rss_bytes"] > found["weights_nbytes"] > found["num_weights"] / 2
        assert found["speeds"][0]["generation_tokens_per_s"] > 0
    assert rows["zstd"]["split"].keys() == SPLIT
    assert rows["INT8 raw"]["digest"] == rows["zstd"]["digest"]
    assert len({r["num_weights"] for r in rows.values()}) == 1
    assert [r["name"] for r in report["ratios"]] == list(rows)
    assert "Python and dispatch" in result.stdout
    assert "zstd 1.5.7" in result.stdout
