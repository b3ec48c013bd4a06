"""Compressed models under torch.compile and torch.export: one graph, no recompilation per layer, any number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import dcext
from models import tiny_llama

transformers = pytest.importorskip("transformers")

INT8 = dcext.CompressionConfig(recipe="int8")
IDS = torch.arange(40).reshape(2, 20) % 256


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def t5() -> nn.Module:
    """Reads the dtype of a layer's weight in its forward pass."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=256,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: tiny_llama(num_hidden_layers=6), ["input_ids"]),
        (t5, ["input_ids", "decoder_input_ids"]),
    ],
    ids=["llama", "t5"],
)
@torch.no_grad()
def test_one_graph_for_all_layers(make, inputs):
    model = dcext.compress_(make(), INT8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (20, 7, 13, 17):
        arguments = dict.fromkeys(inputs, IDS[:, :tokens])
        expected = model(**arguments, use_cache=False).logits
        torch.testing.assert_close(compiled(**arguments, use_cache=False).logits, expected)
    assert counters["stats"]["unique_graphs"] <= 2  # of 20 tokens, then of any number


@torch.no_grad()
def test_with_a_static_cache():
    model = dcext.compress_(tiny_llama(), INT8)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    found = model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)


@torch.no_grad()
def test_export():
    model = dcext.compress_(tiny_llama(), INT8)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(
        model,
        (IDS,),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: tokens}, "use_cache": None},
    )
    for ids in (IDS, IDS[:, :9]):
        found = exported.module()(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)


def test_reading_dtype_and_shape_of_a_weight_costs_nothing_in_a_graph():
    layer = dcext.DCLinear.from_float(nn.Linear(64, 32).bfloat16())
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list) -> object:
        graph.graph.eliminate_dead_code()
        graphs.append(graph)
        return graph.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype)) * layer.weight.shape[0]

    x = torch.randn(3, 64)
    found = torch.compile(forward, fullgraph=True, backend=backend)(x)
    assert found.dtype == torch.bfloat16
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert not any("dequantize_weight" in name for name in names), names
