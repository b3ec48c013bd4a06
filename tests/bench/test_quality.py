"""bench/quality: its measurements against plain formulas, its files, and a run of everything at tiny sizes."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "third_party")]

pytest.importorskip("transformers", reason="requires transformers")

from quality import models, peers, plot  # noqa: E402
from quality.measure import CachedReference, divergence  # noqa: E402
from quality.methods import all_methods  # noqa: E402
from quality.results import Results, key_of  # noqa: E402

VOCABULARY, WIDTH = 23, 8
SIZES = models.Sizes(evaluation=128, calibration=256, context=64)


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture(scope="module")
def subject():
    return models.load_subject(models.RANDOM, SIZES)


def ids(count):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "count", [2, 7, 33, 300]
)  # one window, a shorter last one, more than POSITIONS
@pytest.mark.parametrize("context", [2, 8, 200])
def test_divergence_is_the_plain_formula(count, context):
    model, reference, text = Bigram(0), Bigram(1), ids(count)
    log_q = model.table.double().log_softmax(-1)
    log_p = reference.table.double().log_softmax(-1)
    losses, kls, agreements = [], [], []
    for window in text.split(context):
        for token, following in zip(window.tolist(), window[1:].tolist(), strict=False):
            losses.append(-log_q[token, following].item())
            kls.append((log_p[token].exp() * (log_p[token] - log_q[token])).sum().item())
            agreements.append(bool(log_q[token].argmax() == log_p[token].argmax()))
    seen = []
    result = divergence(model, reference, text, context=context, progress=seen.append)
    assert result.tokens == len(losses)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-12)
    assert result.kl_nats == pytest.approx(sum(kls) / len(kls), rel=1e-12)
    assert result.top1_agreement == pytest.approx(sum(agreements) / len(agreements))
    assert sum(seen) == count - (count % context == 1)


def test_divergence_from_itself_is_zero():
    result = divergence(Bigram(0), Bigram(0), ids(64), context=16)
    assert result.kl_nats == 0
    assert result.perplexity == result.reference_perplexity
    assert result.top1_agreement == 1


@pytest.mark.parametrize(("count", "context"), [(1, 8), (0, 8), (8, 1)])
def test_divergence_refuses_too_little(count, context):
    with pytest.raises(ValueError, match="at least 2"):
        divergence(Bigram(0), Bigram(0), ids(count), context=context)


def test_the_cached_reference_gives_the_same_bits(subject):
    reference = CachedReference(subject.model)
    windows = subject.evaluation.view(-1, 1, 64)
    with torch.inference_mode():
        for window in [*windows, *windows]:
            expected = subject.model(input_ids=window).logits
            assert torch.equal(reference(input_ids=window).logits, expected)
    assert len(reference.hidden) == len(windows)


def test_the_layers_compared_leave_the_output_embedding_out(subject):
    names = subject.linears().keys()
    assert len(names) == 2 * 7
    assert "lm_head" not in names


def test_the_figure_knows_every_method(subject):
    known = {"float", *plot.CURVES, *plot.PEERS}
    listed = {method.series for method in all_methods(subject, peers.Peers(Path("unused")))}
    assert listed == known


def test_results_survive_processes_that_share_the_file(tmp_path):
    path = tmp_path / "quality.json"

    def write(number):
        row = {"model": "m", "method": str(number), "activations": "none", "sizes": vars(SIZES)}
        Results(path).add(key_of("m", str(number), "none", SIZES), row)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(32)))
    assert {row["method"] for row in Results(path).rows.values()} == {str(n) for n in range(32)}


def test_dropped_rows_are_gone_from_the_file(tmp_path):
    results = Results(tmp_path / "quality.json")
    row = {"model": "m", "method": "a", "activations": "none", "sizes": vars(SIZES)}
    key = key_of("m", "a", "none", SIZES)
    results.add(key, row)
    results.drop({key})
    assert Results(results.path).rows == {}


def smoke(output, *arguments):
    """Runs the driver; returns the rows that it wrote."""
    command = [sys.executable, str(ROOT / "bench/quality/run.py"), "--smoke", "--output", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads((output / "quality.json").read_text())["rows"], result


def test_smoke(tmp_path):
    pytest.importorskip("matplotlib", reason="requires matplotlib")
    rows, result = smoke(tmp_path)
    methods = {(row["method"], row["activations"]) for row in rows}
    assert len(methods) == len(rows) == 1 + 2 * (2 + 8 + 3 + 5 + 2)
    assert all(math.isfinite(row["perplexity"]) and row["kl_nats"] >= 0 for row in rows)
    assert "commit" in result.stdout
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib", reason="requires matplotlib")
    rows, _ = smoke(tmp_path, "--rows", "float32")
    again, _ = smoke(tmp_path, "--rows", "float32|INT8 per row")
    assert again[: len(rows)] == rows
    assert len(again) == 3


# Relative error of normally distributed weights, measured; a wrong decoder is far above.
WORST_ERROR = {"torchao-int8": 0.01, "torchao-int4": 0.1, "nf4": 0.1, "nf4-double": 0.1}
WORST_HQQ = {4: 0.1, 3: 0.2, 2: 0.46}


@pytest.mark.skipif(not peers.ENVIRONMENT.is_ready(), reason="requires .venv-peers (make quality)")
def test_peers_decode_what_they_stored(subject, tmp_path):
    runner = peers.Peers(tmp_path)
    linears = subject.linears()
    assert any(linear.in_features % 64 for linear in linears.values()), "blocks must cross rows"
    for row in peers.peer_rows(subject):
        peer, bits = row.options["peer"], row.options["bits"]
        weights, nbytes = runner.quantize(subject, **row.options)
        assert weights.keys() == linears.keys()
        assert bits <= 8 * nbytes / subject.num_weights() < bits + 1.01
        if peer == "gptq":  # trades the error of weights for that of outputs
            continue
        worst = WORST_HQQ[bits] if peer == "hqq" else WORST_ERROR[peer]
        for name, weight in weights.items():
            expected = linears[name].weight
            assert (weight - expected).norm() < worst * expected.norm(), (row.name, name)
