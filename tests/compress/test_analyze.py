"""dcext analyze: every figure against plain numpy on a small model, the plots, and the command."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import dcext
import dcext.plots.figure
from dcext.analyze import analyze_model
from dcext.cli.analyze import analyze
from dcext.plots.compression import plot_analysis, plot_compression
from dcext.plots.figure import check_plot
from dcext.quantize.report import CompressionReport, LayerReport
from models import tiny_llama

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

IDS = (torch.arange(80) * 37 % 256).reshape(2, 40)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
SIZE_KEYS = {"nbytes", "stored_nbytes", "entropy_bits", "ratio"}
VALUE_KEYS = {"min", "max", "absmax", "near_zero", "int8"}
LAYER_KEYS = {"name", "kind", "block", "shape", "weights", "tied", "weight", "input"}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def analysis(model):
    return analyze_model(model, IDS)


def inputs_of(model: nn.Module) -> dict[str, np.ndarray]:
    """``(tokens, K)`` inputs of the blocks' linear layers, from one pass through the whole model."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.update({name: args[0].flatten(0, 1).numpy()})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return found


def entropy_bits(q: np.ndarray) -> float:
    p = np.unique(q, return_counts=True)[1] / q.size
    return float(-(p * np.log2(p)).sum())


def check_values(found, values: np.ndarray, integers: dict[str, np.ndarray], near_zero: float):
    assert (found.minimum, found.maximum) == pytest.approx((values.min(), values.max()), rel=1e-5)
    assert found.absmax == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert found.near_zero == pytest.approx(near_zero, abs=1e-9)
    assert found.int8.keys() == integers.keys()
    for scales, q in integers.items():
        size = found.int8[scales]
        payload = dcext.encode(torch.from_numpy(q.astype(np.int8)), "zstd")
        assert size.nbytes == q.size
        assert size.entropy_bits == pytest.approx(entropy_bits(q), abs=1e-6)
        assert size.stored_nbytes == payload.numel()
        assert size.ratio == q.size / payload.numel()


def test_weights_are_those_of_numpy(model, analysis):
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert [layer.name for layer in analysis.layers] == list(modules)
    for layer in analysis.layers:
        w = modules[layer.name].weight.detach().numpy()
        q = {
            "tensor": np.rint(w / (np.abs(w).max() / np.float32(127))),
            "row": np.rint(w / (np.abs(w).max(1, keepdims=True) / np.float32(127))),
        }
        check_values(layer.weight, w, q, (q["tensor"] == 0).mean())
        assert layer.shape == w.shape
        parts = layer.name.split(".")
        assert layer.block == (int(parts[2]) if "layers" in parts else None)
        assert layer.kind == parts[-1]


def test_inputs_are_those_of_one_pass_through_the_model(model, analysis):
    reference = inputs_of(model)
    layers = {layer.name: layer.input for layer in analysis.layers if layer.input is not None}
    assert layers.keys() == reference.keys()
    assert len(layers) == 14
    for name, x in reference.items():
        absmax = np.abs(x).max(1, keepdims=True)
        q = np.rint(x * (np.float32(127) / absmax))
        check_values(layers[name], x, {"token": q}, (np.abs(x) < absmax / 254).mean())


def test_totals_are_weighted(analysis):
    for total, layers in (
        (analysis.total, analysis.layers),
        (analysis.blocks, [layer for layer in analysis.layers if layer.block is not None]),
    ):
        inputs = [layer.input for layer in layers if layer.input is not None]
        for found, parts in ((total.weight, [x.weight for x in layers]), (total.input, inputs)):
            counts = [part.values for part in parts]
            assert found.values == sum(counts)
            assert found.minimum == min(part.minimum for part in parts)
            assert found.maximum == max(part.maximum for part in parts)
            near_zero = np.average([part.near_zero for part in parts], weights=counts)
            assert found.near_zero == pytest.approx(near_zero)
            for scales, size in found.int8.items():
                sizes = [part.int8[scales] for part in parts]
                entropy = np.average([x.entropy_bits for x in sizes], weights=counts)
                assert size.entropy_bits == pytest.approx(entropy)
                assert size.ratio == sum(counts) / sum(x.stored_nbytes for x in sizes)


def test_dictionaries(analysis):
    value = json.loads(json.dumps(analysis.to_dict()))
    assert value.keys() == {"tokens", "layers", "blocks", "total"}
    assert value["tokens"] == 80
    for row in value["layers"]:
        assert row.keys() == LAYER_KEYS
        assert row["weights"] == row["shape"][0] * row["shape"][1]
    for row in (*value["layers"], value["blocks"], value["total"]):
        assert row["weight"].keys() == VALUE_KEYS
        assert row["weight"]["int8"].keys() == {"tensor", "row"}
        assert row["weight"]["int8"]["row"].keys() == SIZE_KEYS
    assert value["total"]["input"]["int8"].keys() == {"token"}


def test_weights_alone_and_tied_layers():
    model = tiny_llama(num_hidden_layers=1)
    found = analyze_model(model)
    assert found.tokens == 0
    assert found.total.input is None
    assert [(layer.name, layer.tied) for layer in found.layers if layer.tied] == [
        ("model.embed_tokens", ("lm_head",))
    ]
    assert found.total.weight.values == sum(p.numel() for p in model.parameters() if p.dim() == 2)


@pytest.mark.parametrize("ids", [None, IDS])
def test_shares_of_progress_add_up_and_the_model_is_left_alone(model, ids):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = str(model)
    steps = []
    analyze_model(model, ids, lambda name, share: steps.append((name, share)))
    assert sum(share for _, share in steps) == pytest.approx(1)
    assert steps[0][0] == "model.embed_tokens"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert str(model) == structure
    assert not any(module._forward_pre_hooks for module in model.modules())


class Twice(nn.Module):
    """A block that runs its layer twice, and one layer only on no token at all."""

    def __init__(self):
        super().__init__()
        self.twice, self.empty = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.empty(x[:, :0])
        return self.twice(self.twice(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Twice(), Twice()])

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_run_twice_or_never():
    torch.manual_seed(0)
    found = {layer.name: layer for layer in analyze_model(Model(), IDS % 16).layers}
    assert found["layers.0.empty"].input is None
    assert found["layers.1.twice"].input.values == 2 * IDS.numel() * 8


def test_zero_weights_are_counted():
    layer = nn.Linear(16, 4)
    nn.init.zeros_(layer.weight)
    found = analyze_model(nn.Sequential(layer)).total.weight
    assert (found.near_zero, found.absmax, found.int8["row"].entropy_bits) == (1, 0, 0)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (IDS[0], ValueError, r"expected \(windows, tokens\).*got \(40,\)"),
        (IDS[:0], ValueError, r"at least one, got \(0, 40\)"),
        (IDS.float(), TypeError, "expected int64 or int32, got torch.float32"),
        (IDS + 256, ValueError, "expected 0 to 255, got 256 to 508"),
        (-IDS, ValueError, "expected 0 to 255, got -"),
    ],
)
def test_wrong_ids(model, ids, error, message):
    with pytest.raises(error, match=message):
        analyze_model(model, ids)


def test_wrong_models():
    with pytest.raises(
        ValueError, match="expected linear layers or embeddings, found none in ReLU"
    ):
        analyze_model(nn.ReLU())
    with pytest.raises(ValueError, match="expected weights on the CPU, got meta"):
        analyze_model(nn.Linear(4, 4, device="meta"))
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.full((160,), float("inf")))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: input: .*NaN or infinity"):
        analyze_model(model, IDS)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: .*NaN or inf"):
        analyze_model(model)


def compression_report(snr: float | None) -> CompressionReport:
    names = [f"model.layers.{i}.mlp.{kind}" for i in range(3) for kind in ("up", "down")]
    rows = [LayerReport(name, (8, 8), "rate", 32 + i, 3.0, snr) for i, name in enumerate(names)]
    return CompressionReport([*rows, LayerReport("lm_head", (8, 8), "int8", 64, 7.0)])


def test_plots_are_png_files_and_leave_nothing_behind(analysis, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="requires matplotlib")
    monkeypatch.setattr(dcext.plots.figure, "DPI", 40)
    plot_analysis(analysis, tmp_path / "inputs.png")
    plot_analysis(analyze_model(nn.Sequential(nn.Linear(8, 8))), tmp_path / "weights.png")
    (tmp_path / "error.png").write_text("an older file")
    plot_compression(compression_report(15.0), tmp_path / "error.png")
    plot_compression(compression_report(None), tmp_path / "bits.png")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"inputs.png", "weights.png", "error.png", "bits.png"}
    assert all(data.startswith(PNG_MAGIC) and len(data) > 1000 for data in files.values())
    with pytest.raises(ValueError, match="expected layers to draw, got none"):
        plot_compression(CompressionReport(), tmp_path / "none.png")


def test_wrong_plots(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected a name ending in \.png, got \.svg"):
        check_plot(tmp_path / "plot.svg")
    with pytest.raises(FileNotFoundError, match=r"expected a folder .*nowhere"):
        check_plot(tmp_path / "nowhere" / "plot.png")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"expected matplotlib.*pip install 'dcext\[plot\]'"):
        check_plot(tmp_path / "plot.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """The model with a byte-level tokenizer, and a text."""
    root = tmp_path_factory.mktemp("analyze")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "float")
    model.save_pretrained(root / "float")
    (root / "text.txt").write_text("It was a dark and stormy night; " * 20)
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    return root


def run(*arguments: object):
    app = typer.Typer()
    app.command()(analyze)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_prints_json(folder, model):
    result = run(
        *(folder / "float", "--text", folder / "text.txt", "--json"),
        *("--max-tokens", 100, "--context", 40),
    )
    assert result.exception is None, result.exception
    value = json.loads(result.stdout)
    assert value["model"] == str(folder / "float")
    assert value["tokens"] == 80  # two whole windows
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "float")
    ids = torch.tensor(tokenizer((folder / "text.txt").read_text()).input_ids)[:80].reshape(2, 40)
    expected = json.loads(json.dumps(analyze_model(model, ids).to_dict()))
    assert {key: value[key] for key in expected} == expected
    assert "analyzing" in result.stderr


def test_command_prints_tables_and_draws(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="requires matplotlib")
    weights = run(folder / "float")
    assert weights.exception is None, weights.exception
    assert "model.layers.1.mlp.down_proj" in weights.stdout
    assert "inputs of the layers" not in weights.stdout
    monkeypatch.setattr(dcext.plots.figure, "DPI", 40)
    plot = tmp_path / "plot.png"
    both = run(folder / "float", "--text", folder / "text.txt", "--max-tokens", 50, "--plot", plot)
    assert both.exception is None, both.exception
    assert "over 50 tokens" in both.stdout
    assert both.stdout.count("total") == 2
    assert plot.read_bytes().startswith(PNG_MAGIC)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("{root}/nowhere",), FileNotFoundError, "nowhere"),
        (("{root}/float", "--text", "{root}/no.txt"), FileNotFoundError, "no.txt"),
        (
            ("{root}/float", "--text", "{root}/empty.txt"),
            ValueError,
            "expected text, found an empty",
        ),
        (("{root}/float", "--text", "{root}/latin.txt"), ValueError, "latin.txt: expected UTF-8"),
        (("{root}/float", "--plot", "{root}/plot.pdf"), ValueError, "ending in .png"),
        (("{root}/float", "--dtype", "int4"), ValueError, "--dtype: expected one of"),
        (
            ("{root}/float", "--text", "{root}/text.txt", "--context", "4096"),
            ValueError,
            "--context: expected at most 2048",
        ),
    ],
)
def test_command_errors(folder, arguments, error, message):
    result = run(*(argument.format(root=folder) for argument in arguments))
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)
    assert result.stdout == ""
