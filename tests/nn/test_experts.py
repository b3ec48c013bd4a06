"""Mixtures of experts: a payload per expert, and only those that tokens are sent to are decoded or read."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import dcext
from dcext.hub import load_lazy_model
from dcext.nn.compressed import compressed_modules

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from zoo import FAMILIES  # noqa: E402

W8A16 = dcext.CompressionConfig(recipe="int8", activations="none", codec="zstd")
EXPERT = re.compile(r"^(.*experts.*)_items\.(\d+)$")
FAMILY_NAMES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx"]


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in compressed_modules(model).items() if EXPERT.match(n)}


class Chosen:
    """Which experts routers choose, by layer, and which layers are called."""

    def __init__(self, model: nn.Module) -> None:
        self.called: set[str] = set()
        self.chosen: dict[str, set[int]] = {}
        for name, module in expert_layers(model).items():
            module.register_forward_hook(lambda m, a, y, name=name: self.called.add(name))
        for name in {
            EXPERT.match(name).group(1).rpartition(".")[0] for name in expert_layers(model)
        }:
            owner = name.removesuffix(".mlp") if name.endswith("experts.mlp") else name  # dbrx
            model.get_submodule(owner).register_forward_pre_hook(
                lambda m, args, kwargs, name=name: self._note(name, args, kwargs), with_kwargs=True
            )

    def _note(self, name: str, args: tuple, kwargs: dict) -> None:
        ids = [
            v
            for v in (*args, *kwargs.values())
            if isinstance(v, torch.Tensor) and not v.is_floating_point()
        ]
        self.chosen.setdefault(name, set()).update(ids[0].flatten().tolist())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_only_chosen_experts_are_decoded(family):
    family = FAMILIES[family]
    model = dcext.compress_(family.model(), W8A16)
    layers = expert_layers(model)
    assert layers
    assert len({layer.payload.data_ptr() for layer in layers.values()}) == len(layers)
    seen = Chosen(model)
    inputs = family.inputs(model)
    one = {name: value[:1, :1] for name, value in inputs.items()}
    with torch.no_grad():
        model(**one)
    expected = {
        name
        for name in layers
        for prefix, number in [EXPERT.match(name).groups()]
        if int(number) in seen.chosen[prefix.rpartition(".")[0]]
    }
    assert seen.called == expected
    assert len(expected) < len(layers)


def test_the_report_has_a_row_for_each_expert():
    family = FAMILIES["mixtral"]
    model = family.model()
    report = dcext.compress_(model, W8A16).dcext_report
    rows = [row for row in report.layers if EXPERT.match(row.name)]
    assert len(rows) == len(expert_layers(model)) == 2 * 2 * model.config.num_local_experts
    assert all(row.stored_nbytes > 0 and row.entropy_bits > 0 for row in rows)


def test_experts_from_the_disk(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    dcext.save_pretrained(dcext.compress_(model, W8A16), tmp_path / "m")
    seen = Chosen(model)
    ids = torch.arange(24).reshape(1, 24) * 7 % 512
    with torch.no_grad():
        expected, one = model(ids).logits, model(ids[:, :1]).logits
    loaded = dcext.from_pretrained(tmp_path / "m", host_memory=4_000_000)
    on_disk = {n for n, m in compressed_modules(loaded).items() if m.is_in_file}
    assert any(EXPERT.match(name) for name in on_disk)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(loaded(ids).logits, expected)
    before = loaded.dcext_offload.stream.statistics().layers
    seen.called.clear()
    with torch.no_grad():
        assert torch.equal(loaded(ids[:, :1]).logits, one)
        model(ids[:, :1])
    used = seen.called | {n for n in compressed_modules(loaded) if not EXPERT.match(n)}
    assert loaded.dcext_offload.stream.statistics().layers - before == len(on_disk & used)


def test_experts_that_stay_in_their_files_while_the_model_is_compressed(tmp_path):
    """Stored as one stack, as GPT-OSS is."""
    family = FAMILIES["gpt_oss"]
    model = family.model()
    model.save_pretrained(tmp_path / "float", save_original_format=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    ).save_pretrained(tmp_path / "float")
    lazy, _, source = load_lazy_model(tmp_path / "float")
    dcext.compress_(lazy, W8A16, source=source)
    dcext.compress_(model, W8A16)
    expected = compressed_modules(model)
    found = compressed_modules(lazy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].payload, expected[name].payload) for name in found)
    with torch.no_grad():
        inputs = family.inputs(model)
        assert torch.equal(family.output(lazy(**inputs)), family.output(model(**inputs)))
