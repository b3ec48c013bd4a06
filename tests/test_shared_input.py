"""Layers that read the same input run together: same bits, one operator call, whatever the rest of the program does."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import dcext

INT8 = dcext.CompressionConfig(recipe="int8", codec="packed", granularity="tensor")
IDS = torch.arange(12).reshape(1, 12) * 7 % 64


class CountOperators(TorchDispatchMode):
    """Counts calls of dcext's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcext":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> nn.Module:
    return dcext.compress_(tiny_llama(), INT8)


def layers_of(model: nn.Module) -> list[dcext.DCLinear]:
    return [module for module in model.modules() if isinstance(module, dcext.DCLinear)]


@torch.inference_mode()
def test_a_block_makes_four_calls_and_the_same_bits(model):
    alone = copy.deepcopy(model)  # a copy's layers run one by one
    with CountOperators() as counter:
        together = model(input_ids=IDS).logits
    assert counter.calls == {"embedding": 1, "linear_group": 4, "linear": 2 * 2 + 1}
    with CountOperators() as counter:
        assert torch.equal(alone(input_ids=IDS).logits, together)
    assert counter.calls == {"embedding": 1, "linear": 7 * 2 + 1}
    with CountOperators() as counter:
        assert torch.equal(dcext.share_inputs_(alone)(input_ids=IDS).logits, together)
    assert counter.calls["linear_group"] == 4


@torch.inference_mode()
def test_any_order_of_calls_and_inputs(model):
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = copy.deepcopy(layers)
    first, second = torch.randn(3, 64), torch.randn(3, 64)
    for order in [(0, 1, 2), (2, 0, 1), (1, 1, 0, 2), (0, 0)]:
        for x in (first, second, first.clone()):
            for i in order:
                assert torch.equal(layers[i](x), expected[i](x))
        assert torch.equal(layers[0](first), expected[0](first))
        assert torch.equal(layers[1](second), expected[1](second))


@torch.inference_mode()
def test_layers_that_differ_run_alone(model):
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 64)
    attention.k_proj.activations = "none"
    attention.v_proj.col_scale = torch.full((64,), 2.0)
    expected = copy.deepcopy(attention)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(attention, name)(x), getattr(expected, name)(x))


@torch.inference_mode()
def test_nothing_is_kept_after_a_block(model):
    model(input_ids=IDS)
    groups = {id(layer.shared_input): layer.shared_input for layer in layers_of(model)}
    kept = [g for g in groups.values() if g is not None and getattr(g._local, "run", None)]
    assert len(groups) == 5  # two of each block, and None of lm_head and the others
    assert kept == []


def test_threads_do_not_mix(model):
    inputs = [(IDS + i) % 64 for i in range(4)]
    with torch.inference_mode():
        expected = [model(input_ids=ids).logits for ids in inputs]
    wrong = []

    def run(index: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(model(input_ids=inputs[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_group_operator():
    x = torch.randn(5, 40)
    layers = [
        dcext.DCLinear.from_float(nn.Linear(40, n, bias=n != 7), codec="packed") for n in (3, 7, 50)
    ]
    arguments = (
        x,
        [layer.payload for layer in layers],
        [layer.row_scale for layer in layers],
        None,
        [layer.bias for layer in layers],
        "int8",
    )
    op = torch.ops.dcext.linear_group
    for y, layer in zip(op(*arguments), layers, strict=True):
        assert torch.equal(y, layer(x))
    torch.library.opcheck(op.default, arguments)
    with pytest.raises(ValueError, match="as many row scales"):
        op(x, arguments[1], arguments[2][:2], None, arguments[4], "int8")
    other = dcext.encode(torch.zeros(3, 41, dtype=torch.int8))
    with pytest.raises(ValueError, match="payload 1: expected 40 columns"):
        op(x, [layers[0].payload, other], arguments[2][:2], None, [None, None], "int8")
