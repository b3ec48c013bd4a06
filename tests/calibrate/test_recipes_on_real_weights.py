"""The recipes on SmolLM2-135M-Instruct: the paper's ratio over all layers, and its first blocks calibrated on real text."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dcext
import wiki_text
from dcext.calibrate.text import text_windows

pytest.importorskip("transformers")
pytestmark = pytest.mark.real_model


def in_blocks(name: str, module: nn.Module) -> bool:
    return ".layers." in name


@pytest.fixture(scope="module")
def loaded(smollm2):
    from dcext.hub import load_float_model

    return load_float_model(smollm2)


@pytest.fixture(scope="module")
def calibration(loaded):
    text = wiki_text.enwik8_text("calibration").read_text(encoding="utf-8")
    return text_windows(loaded[1], text, tokens=2048, context=256)


@pytest.fixture(scope="module")
def first_blocks(loaded):
    """The model with two of its thirty blocks."""
    model = copy.copy(loaded[0])
    model._modules = dict(model._modules)
    model.model = copy.copy(model.model)
    model.model._modules = dict(model.model._modules)
    model.model.layers = model.model.layers[:2]
    model.config = copy.copy(model.config)
    model.config.num_hidden_layers = 2
    model.model.config = model.config
    return lambda: copy.deepcopy(model)


def compressed(model: nn.Module, calibration: torch.Tensor | None, **choices) -> float:
    """INT8 bytes over stored bytes of the blocks' linear layers."""
    config = dcext.CompressionConfig(**choices)
    dcext.compress_(model, config, calibration, in_blocks)
    return 8 / model.dcext_report.bits_per_weight()


def test_int8_per_tensor_has_the_ratio_that_the_paper_starts_from(loaded):
    ratio = compressed(copy.deepcopy(loaded[0]), None, recipe="int8", granularity="tensor")
    assert ratio == pytest.approx(1.52, abs=0.02)


def test_the_papers_ratio_rises_with_alpha_and_with_sparsity(first_blocks, calibration):
    by_alpha = [
        compressed(first_blocks(), calibration, recipe="paper", alpha=alpha)
        for alpha in (0.0, 0.3, 0.6, 0.9)
    ]
    assert by_alpha == sorted(by_alpha)
    assert by_alpha[-1] > 1.2 * by_alpha[0]
    by_sparsity = [
        compressed(first_blocks(), calibration, recipe="paper", alpha=0.5, sparsity=sparsity)
        for sparsity in (0.0, 0.3, 0.5)
    ]
    assert by_sparsity == sorted(by_sparsity)
    assert by_sparsity[-1] > 1.1 * by_sparsity[0]


@pytest.mark.parametrize("bits", [2.5, 3.64])
@torch.no_grad()
def test_rate_meets_its_target_and_loses_less_than_rounding(first_blocks, calibration, bits):
    losses = {}
    reference = first_blocks()(calibration[:2]).logits.log_softmax(-1)
    for recipe in ("rate", "data-free"):
        model = first_blocks()
        text = calibration if recipe == "rate" else None
        ratio = compressed(model, text, recipe=recipe, target_bits=bits)
        assert 8 / ratio == pytest.approx(bits, rel=0.005)
        found = model(calibration[:2]).logits.log_softmax(-1)
        losses[recipe] = float((reference.exp() * (reference - found)).sum(-1).mean())
    assert losses["rate"] < 0.3 * losses["data-free"]
