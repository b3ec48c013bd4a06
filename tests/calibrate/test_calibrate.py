"""Models compressed with the calibrated recipes: targets, resumption, fallbacks, weights that stay on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dcext
from conftest import ROOT
from dcext.calibrate.blocks import find_blocks
from dcext.calibrate.fold import fold_col_scales
from dcext.calibrate.resume import remove_resume_folder
from dcext.calibrate.sensitivity import measure_sensitivity
from dcext.calibrate.source import BlockSource
from dcext.compress import compressed_modules
from dcext.format import CheckpointReader
from dcext.hub import load_lazy_model
from dcext.quantize.output_moment import diagonal
from dcext.quantize.report import CompressionReport
from models import logits, tiny_llama

transformers = pytest.importorskip("transformers")


def calibration(windows: int = 6, tokens: int = 64) -> torch.Tensor:
    return torch.randint(256, (windows, tokens), generator=torch.Generator().manual_seed(1))


def wide_llama(**changes) -> nn.Module:
    """Wide enough that scales and headers do not dominate the bits."""
    settings = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    return tiny_llama(**{**settings, **changes})


def config(**changes) -> dcext.CompressionConfig:
    return dcext.CompressionConfig(**{"target_bits": 5.0, **changes})


def payloads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.payload for name, module in compressed_modules(model).items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = payloads(a), payloads(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(logits(a), logits(b))


def test_sensitivity_is_the_mean_square_of_gradients():
    """Against autograd through the whole model, with the labels that the pass drew."""
    model, ids = tiny_llama(), calibration(2, 8)
    found = measure_sensitivity(
        model, find_blocks(model), BlockSource(), ids, dtype=torch.float32, seed=3
    )
    assert found.groups[0] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    with torch.no_grad():
        p = model(ids).logits.softmax(-1).reshape(16, -1)
    drawn = torch.rand((16, 1), generator=torch.Generator().manual_seed(3))
    labels = torch.searchsorted(p.cumsum(-1), drawn * p.cumsum(-1)[:, -1:])[:, 0]
    grads = {}
    layer = model.model.layers[1].mlp.down_proj

    def keep(module, args, y):
        y.register_hook(lambda g: grads.update(y=g))

    layer.register_forward_hook(keep)
    output = model(ids).logits.reshape(16, -1)
    nn.functional.cross_entropy(output, labels, reduction="sum").backward()
    moment = found.output["model.layers.1.mlp.down_proj"]
    expected = grads["y"].reshape(16, -1).square().mean(0)
    torch.testing.assert_close(diagonal(moment, len(expected)), expected)


@pytest.mark.parametrize("bits", [4.0, 5.5])
def test_rate_meets_its_target_and_repeats_itself(bits):
    models = [dcext.compress_(wide_llama(), config(target_bits=bits), calibration()) for _ in "ab"]
    report = models[0].dcext_report
    assert report.bits_per_weight("rate") == pytest.approx(bits, rel=0.005)
    assert_same(*models)
    modules = compressed_modules(models[0])
    stored = sum(m.stored_nbytes for name, m in modules.items() if "layers" in name)
    shared = sum(2 * m.shape[1] for name, m in modules.items() if "k_proj" in name) * 2
    shared += sum(2 * m.shape[1] for name, m in modules.items() if "up_proj" in name)
    counted = sum(layer.stored_nbytes for layer in report.layers if layer.recipe == "rate")
    assert stored - shared == counted  # q, k and v share one col_scale; so do gate and up


def test_rate_beats_rounding_at_the_same_size():
    reference = wide_llama()
    ids = calibration(4, 32)
    with torch.no_grad():
        p = reference(ids).logits.log_softmax(-1)
    losses = {}
    for recipe in ("rate", "data-free"):
        calibrated = recipe == "rate"
        model = dcext.compress_(
            wide_llama(), config(recipe=recipe), calibration() if calibrated else None
        )
        with torch.no_grad():
            q = model(ids).logits.log_softmax(-1)
        losses[recipe] = float((p.exp() * (p - q)).sum(-1).mean())
    assert losses["rate"] < losses["data-free"]


@pytest.mark.parametrize("recipe", ["rate", "data-free"])
def test_targets_as_ratio_and_as_size(recipe):
    ids = calibration() if recipe == "rate" else None
    by_ratio = dcext.compress_(
        wide_llama(), dcext.CompressionConfig(recipe=recipe, target_ratio=1.6), ids
    )
    assert by_ratio.dcext_report.bits_per_weight(recipe) == pytest.approx(5, rel=0.005)
    by_size = dcext.compress_(
        wide_llama(), dcext.CompressionConfig(recipe=recipe, target_nbytes=420_000), ids
    )
    nbytes = sum(layer.stored_nbytes for layer in by_size.dcext_report.layers)
    nbytes += sum(p.nbytes for p in by_size.parameters())
    nbytes += sum(b.nbytes for name, b in by_size.named_buffers() if name.endswith(".bias"))
    assert nbytes == pytest.approx(420_000, rel=0.005)


def small_gpt2() -> nn.Module:
    """Its blocks hold no ``nn.Linear``: ``lm_head``, tied to the embedding, is the only one."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=256)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("recipe", ["rate", "paper", "data-free"])
def test_a_tied_head_is_no_block_and_is_stored_once(tmp_path, recipe):
    settings = dcext.CompressionConfig(recipe=recipe)
    ids = None if recipe == "data-free" else calibration()
    model = dcext.compress_(small_gpt2(), settings, ids)
    assert {row.name for row in model.dcext_report.layers if row.recipe == recipe} == {
        f"transformer.h.{i}.{name}"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    dcext.save_pretrained(model, tmp_path / "out")
    stored = [name for name in CheckpointReader(tmp_path / "out").names() if "payload" in name]
    assert len([name for name in stored if "lm_head" in name or "wte" in name]) == 1
    for each in (model, dcext.from_pretrained(tmp_path / "out")):
        assert each.lm_head.payload is each.transformer.wte.payload


def small_t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=256
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config).eval()


def small_bart(kind: str = "Bart") -> nn.Module:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 256, "d_model": 128}
    sizes |= {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
    sizes |= {f"{half}_ffn_dim": 256 for half in ("encoder", "decoder")}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1
    )
    config.decoder_start_token_id = 0
    model_class = {"Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}[kind]
    return getattr(transformers, model_class)(config).eval()


@pytest.mark.parametrize("recipe", ["rate", "data-free"])
@pytest.mark.parametrize(
    "make", [small_t5, small_bart, lambda: small_bart("Marian")], ids=["t5", "bart", "marian"]
)
def test_one_target_over_encoder_and_decoder(make, recipe):
    torch.manual_seed(0)
    ids = calibration(16) if recipe == "rate" else None
    report = dcext.compress_(make(), config(recipe=recipe, target_bits=4.5), ids).dcext_report
    assert report.bits_per_weight(recipe) == pytest.approx(4.5, rel=0.02)
    coded = [row for row in report.layers if row.recipe == recipe]
    assert len(coded) == 32  # two blocks of 6 in the encoder, two of 10 in the decoder
    assert all(row.fallback is None for row in coded)
    encoder = [row for row in coded if "encoder." in row.name]
    assert len(encoder) == 12
    if recipe == "data-free":  # evenly; rate gives bits to where they are worth most
        mean = sum(row.bits_per_weight for row in encoder) / len(encoder)
        assert mean == pytest.approx(4.5, rel=0.05)


def test_rate_survives_saving(tmp_path):
    model = dcext.compress_(wide_llama(), config(), calibration())
    dcext.save_pretrained(model, tmp_path / "out")
    loaded = dcext.from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.col_scale is attention.v_proj.col_scale
    data = (tmp_path / "out" / "compression_report.json").read_text()
    assert CompressionReport.from_dict(json.loads(data)) == model.dcext_report


class JobInterruptedError(Exception):
    pass


@pytest.mark.parametrize("recipe", ["rate", "paper"])
def test_an_interrupted_job_goes_on_with_the_same_result(tmp_path, recipe):
    settings = config() if recipe == "rate" else dcext.CompressionConfig(recipe="paper", alpha=0.5)
    whole = dcext.compress_(wide_llama(), settings, calibration())
    folder = tmp_path / "resume"

    def stop(label: str, share: float) -> None:
        if label.startswith("model.layers.1."):
            raise JobInterruptedError

    with pytest.raises(JobInterruptedError):
        dcext.compress_(wide_llama(), settings, calibration(), progress=stop, resume_dir=folder)
    assert {"block-00000.safetensors", "block-00001.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    done = []
    resumed = dcext.compress_(
        wide_llama(),
        settings,
        calibration(),
        progress=lambda label, share: done.append(label),
        resume_dir=folder,
    )
    remove_resume_folder(folder)
    assert not folder.exists()
    assert_same(resumed, whole)
    assert resumed.dcext_report == whole.dcext_report


def test_a_job_with_other_settings_starts_anew(tmp_path):
    folder = tmp_path / "resume"

    def stop(label: str, share: float) -> None:
        if label.startswith("model.layers.1."):
            raise JobInterruptedError

    with pytest.raises(JobInterruptedError):
        dcext.compress_(wide_llama(), config(), calibration(), progress=stop, resume_dir=folder)
    other = dcext.compress_(wide_llama(), config(target_bits=4.5), calibration(), resume_dir=folder)
    assert_same(other, dcext.compress_(wide_llama(), config(target_bits=4.5), calibration()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="expected a folder of an interrupted"):
        dcext.compress_(wide_llama(), config(), calibration(), resume_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


class Chain(nn.Module):
    """Not a language model: one layer gets zeros, one is never called, one more inputs than samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(96, 64)
        self.zeros = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)
        self.last = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        return self.last(h + self.zeros(torch.zeros_like(h)))


def test_any_module_and_layers_that_calibration_says_nothing_about():
    x = torch.randn(80, 96, generator=torch.Generator().manual_seed(2))
    model = dcext.compress_(Chain(), config(target_bits=6.0), x)
    fallbacks = {layer.name: layer.fallback for layer in model.dcext_report.layers}
    assert "rank 80 at most, for 96 inputs" in fallbacks["first"]
    assert "all inputs of the layer are zero" in fallbacks["zeros"]
    assert "no calibration token reached" in fallbacks["unused"]
    assert fallbacks["last"] is None
    exact, found = Chain()(x), model(x)
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_nan_in_the_inputs_is_named():
    x = torch.randn(200, 96)
    x[3, 5] = float("nan")
    model = dcext.compress_(Chain(), config(target_bits=6.0), x)
    assert all(layer.fallback is not None for layer in model.dcext_report.layers)
    assert "NaN or infinity" in model.dcext_report.layers[0].fallback


@pytest.mark.parametrize(
    ("settings", "ids", "message"),
    [
        ({}, None, "needs calibration text"),
        ({"recipe": "data-free"}, calibration(), "takes none"),
        ({}, calibration().reshape(-1), r"expected \(windows, tokens\)"),
        ({"target_bits": 0.01}, calibration(), "target_bits: expected"),
    ],
)
def test_wrong_calibration(settings, ids, message):
    with pytest.raises(ValueError, match=message):
        dcext.compress_(wide_llama(), config(**settings), ids)


@pytest.mark.parametrize("alpha", ["model", "layer", 0.5])
def test_paper(alpha):
    settings = dcext.CompressionConfig(recipe="paper", alpha=alpha, sparsity=0.2)
    model = dcext.compress_(wide_llama(), settings, calibration())
    report = model.dcext_report
    linear = [layer for layer in report.layers if layer.recipe == "paper"]
    assert all(layer.zero_share >= 0.2 - 1e-4 for layer in linear)
    chosen = {layer.alpha for layer in linear}
    assert len(chosen) == 1 or alpha == "layer"
    if alpha == "model":
        best = min(report.alphas, key=lambda row: row["cost"])
        assert chosen == {best["alpha"]}
        assert [row["alpha"] for row in report.alphas] == [i / 10 for i in range(11)]


def test_weights_that_stay_on_the_disk_give_the_same_model(tmp_path):
    reference = wide_llama(tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "float", max_shard_size="300KB")
    save_tokenizer(tmp_path / "float")
    model, _, source = load_lazy_model(tmp_path / "float")
    assert all(p.is_meta for p in model.parameters())
    dcext.compress_(model, config(), calibration(), source=source, resume_dir=tmp_path / "resume")
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert_same(model, dcext.compress_(reference, config(), calibration()))


def test_paper_folds_what_norms_can_take(tmp_path):
    """The same outputs as with the vectors kept, which stay where no norm feeds the layer alone."""
    settings = dcext.CompressionConfig(recipe="paper", alpha=0.5)
    model = dcext.compress_(wide_llama(), settings, calibration())
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert attention.q_proj.col_scale is attention.v_proj.col_scale is mlp.up_proj.col_scale is None
    assert attention.o_proj.col_scale is not None
    assert mlp.down_proj.col_scale is not None
    half = dcext.compress_(wide_llama().bfloat16(), settings, calibration())
    assert half.model.layers[1].self_attn.q_proj.col_scale is not None  # bfloat16 would lose digits
    layers = {layer.name: layer for layer in model.dcext_report.layers}
    modules = {n: m for n, m in compressed_modules(model).items() if "layers" in n}
    assert all(layers[name].stored_nbytes == m.stored_nbytes for name, m in modules.items())
    reference = logits(wide_llama())
    assert (logits(model) - reference).norm() < 0.1 * reference.norm()
    dcext.save_pretrained(model, tmp_path / "out")
    assert torch.equal(logits(dcext.from_pretrained(tmp_path / "out")), logits(model))


def test_folding_changes_nothing_but_rounding(monkeypatch):
    monkeypatch.setattr("dcext.compress.fold_col_scales", lambda block: [])
    settings = dcext.CompressionConfig(recipe="paper", alpha=0.5, activations="none")
    model = dcext.compress_(wide_llama(), settings, calibration())
    before = logits(model)
    for block in model.model.layers:
        assert len(fold_col_scales(block)) == 5
    torch.testing.assert_close(logits(model), before)
    assert fold_col_scales(model.model.layers[0]) == []


def save_tokenizer(folder) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


MEMORY_SCRIPT = """
import re, sys, threading, time, torch, dcext
from dcext.hub import load_lazy_model

def anonymous():  # what the system could not read again from the files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

model, _, source = load_lazy_model(sys.argv[1])
ids = torch.randint(256, (2, 32))
peak = base = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
dcext.compress_(model, dcext.CompressionConfig(target_bits=4.0), ids, source=source, resume_dir=sys.argv[2])
print(peak - base)
"""


def test_memory_stays_at_a_block(tmp_path):
    """A model of 40 blocks in half the memory of its weights, most of it for one block and torch itself."""
    model = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=40)
    nbytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "float", max_shard_size="20MB")
    save_tokenizer(tmp_path / "float")
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "float"), str(tmp_path / "resume")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Every block of memory its own mapping: what is held is measured, not the holes that glibc's heap keeps.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert int(result.stdout) < nbytes / 2
