"""Encoders, encoder-decoder, multimodal and hybrid models calibrated from end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from calibration_cases import (
    FAMILIES,
    VOCABULARY,
    bart,
    calibrate,
    decoder,
    floats,
    gemma3,
    hf,
    ids,
    llava,
    output_of,
    relative_error,
    round_without_data,
    stored_bits,
    t5,
    vit,
    whisper,
    zamba,
)
from torch import nn

import dcext
from dcext.calibrate.inputs import calibrating, model_inputs, shifted_ids
from dcext.calibrate.source import ShardSource
from dcext.calibrate.stacks import find_blocks, linear_layers

RATE = dcext.CompressionConfig(target_bits=5.0)
PAPER = dcext.CompressionConfig(recipe="paper", alpha=0.5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rate_meets_its_target_and_loses_less_than_rounding(family):
    model, calibration = FAMILIES[family]()
    exact, rounded = output_of(model, calibration), copy.deepcopy(model)
    training = [module.training for module in model.modules()]
    coded = calibrate(model, calibration, RATE)
    bits = stored_bits(model, coded)
    assert bits == pytest.approx(
        5, abs=0.3
    )  # small convolutions have scales that are large beside them
    round_without_data(rounded, bits)
    mine = relative_error(output_of(model, calibration), exact)
    assert mine < 0.95 * relative_error(output_of(rounded, calibration), exact)
    assert training == [module.training for module in model.modules()]


@pytest.mark.parametrize("family", ["t5", "whisper", "llava", "albert", "swin", "zamba"])
def test_paper(family):
    model, calibration = FAMILIES[family]()
    exact = output_of(model, calibration)
    coded = calibrate(model, calibration, PAPER)
    calibrated = [layer for layer in coded.values() if layer.report.fallback is None]
    assert len(calibrated) > len(coded) / 2
    assert all(layer.report.alpha == 0.5 for layer in calibrated)
    assert relative_error(output_of(model, calibration), exact) < 0.05


def text_like(windows: int, seed: int) -> torch.Tensor:
    """Tokens of which each follows from the one before, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = ids(windows, 48, seed)
    for i in range(1, tokens.shape[1]):
        follows = torch.rand(windows, generator=generator) < 0.7
        tokens[:, i] = torch.where(follows, 3 + (tokens[:, i - 1] * 5 + 7) % 60, tokens[:, i])
    return tokens


@pytest.mark.parametrize("family", ["gemma3", "t5", "whisper", "vit"])
def test_held_out_loss_is_less_than_without_data(family):
    """Divergence from the float model's predictions, on inputs of the same kind that calibration did not see."""
    make = {"gemma3": gemma3, "t5": t5, "whisper": whisper, "vit": vit}[family]

    def inputs(seed: int):
        if family == "vit":
            return floats(48, 3, 16, 16, seed=seed)
        tokens = text_like(24, seed)
        if family == "whisper":
            return {
                "input_features": floats(24, 8, 32, seed=seed),
                "decoder_input_ids": tokens[:, :16],
            }
        return tokens

    model, _ = make()
    rounded = copy.deepcopy(model)
    held_out = inputs(seed=2)
    exact = output_of(model, held_out).log_softmax(-1)
    bits = stored_bits(model, calibrate(model, inputs(seed=1), RATE))
    round_without_data(rounded, bits)
    losses = []
    for candidate in (model, rounded):
        found = output_of(candidate, held_out).log_softmax(-1)
        losses.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert losses[0] < 0.5 * losses[1]


def test_ids_become_a_decoders_inputs_by_the_models_own_rule():
    for make in (t5, bart):
        model, tokens = make()
        inputs = model_inputs(model, tokens)
        shifted = inputs.tensors["decoder_input_ids"]
        assert torch.equal(shifted[:, 1:], tokens[:, :-1])
        assert (shifted[:, 0] == model.config.decoder_start_token_id).all()
        assert torch.equal(
            shifted_ids(model.model if hasattr(model, "model") else model, tokens), shifted
        )
        given = model_inputs(model, {"input_ids": tokens, "decoder_input_ids": tokens})
        assert given.tensors["decoder_input_ids"] is tokens
    model, calibration = whisper()
    with pytest.raises(
        ValueError, match=r"decoder_input_ids: WhisperFor.* needs them beside input_f"
    ):
        model_inputs(model, {"input_features": calibration["input_features"]})


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({}, "expected tensors of one window or more"),
        ({"input_ids": ids(), "pixel_values": floats(7, 3)}, "expected a multiple of 6 windows"),
        (torch.zeros(0, 4), "expected tensors of one window or more"),
    ],
)
def test_wrong_inputs(calibration, message):
    with pytest.raises(ValueError, match=message):
        model_inputs(nn.Linear(4, 4), calibration)


def test_a_decoder_reads_the_compressed_encoder():
    """Its cross attention is calibrated on what the compressed encoder gives, not the float one."""
    model, calibration = bart()
    cross = model.model.decoder.layers[0].encoder_attn.k_proj
    seen = []

    def keep(module, args):
        seen.append(args[0])

    cross.register_forward_pre_hook(keep)
    calibrate(model, calibration, RATE)
    with torch.no_grad():
        compressed = model.get_encoder()(calibration).last_hidden_state
    whole = [x for x in seen if x.shape[0] == len(calibration) and not x.requires_grad]
    torch.testing.assert_close(whole[-1], compressed)


def test_layers_that_are_shared_are_given_away_once_no_block_needs_them():
    """Two blocks of Zamba hold attention of the same weights."""
    model, calibration = zamba()
    names = [f"model.layers.{i}.shared_transf.self_attn.q_proj" for i in (2, 5)]
    weights = [model.get_submodule(name).weight for name in names]
    assert weights[0] is weights[1]
    before, unchanged = weights[0].detach().clone(), []

    def progress(label: str, share: float) -> None:
        unchanged.append(torch.equal(weights[0], before))

    coded = calibrate(model, calibration, RATE, progress=progress)
    assert coded[names[0]] is coded[names[1]]
    assert coded[names[0]].report.fallback is None
    assert unchanged[-2:] == [True, False]  # with the last of six blocks


def test_a_tie_between_layers_of_blocks_is_kept():
    model, calibration = decoder("llama", num_key_value_heads=4)
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    coded = calibrate(model, calibration, RATE)
    first, second = (coded[f"model.layers.{i}.self_attn.o_proj"] for i in (0, 1))
    assert first is second


def test_blocks_never_hold_what_is_tied_to_an_embedding():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 64)
            self.inner = nn.Linear(64, 64)
            self.head = nn.Linear(64, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight

    (whole,) = find_blocks(Block())
    assert list(linear_layers(whole)) == ["inner"]


def test_a_model_without_blocks_that_reads_tokens():
    """Its only block has no floating-point input to differentiate by."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, 64)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, VOCABULARY)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.embed(input_ids)).relu())

    model = Bag().eval()
    exact = output_of(model, ids())
    coded = calibrate(model, ids(), RATE)
    assert all("gradient" not in (layer.report.fallback or "") for layer in coded.values())
    assert relative_error(output_of(model, ids()), exact) < 0.05


def test_layers_that_no_input_reaches_say_so():
    """A vision tower, when only text is given."""
    model, calibration = llava()
    tokens = calibration["input_ids"].clamp(min=3)
    coded = calibrate(model, tokens, RATE)
    reasons = {name: layer.report.fallback or "" for name, layer in coded.items()}
    assert all(("no calibration" in reason) == ("vision" in n) for n, reason in reasons.items())


def test_a_cache_that_was_on_is_on_again():
    model, _ = decoder("llama", num_key_value_heads=4)
    model.train()
    with calibrating(model):
        assert not model.config.use_cache
        assert not any(module.training for module in model.modules())
    assert model.config.use_cache
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["t5", "whisper", "zamba", "albert"])
def test_weights_that_stay_on_the_disk_give_the_same_layers(tmp_path, family):
    from accelerate import init_empty_weights

    reference, calibration = FAMILIES[family]()
    reference.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=False):
        model = type(reference)(reference.config)
    model.tie_weights()
    source = ShardSource(model.eval(), tmp_path, find_blocks(model))
    coded = calibrate(model, calibration, RATE, source=source)
    expected = calibrate(reference, calibration, RATE)
    assert all(torch.equal(coded[name].payload, layer.payload) for name, layer in expected.items())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert isinstance(reference, hf.PreTrainedModel)
