"""The zoo itself: each family is built the same twice, runs, and every matrix of it counts."""

import functools
import inspect
import re

import pytest
import torch
from torch import Tensor, nn

from zoo import FAMILIES, Family, generate, is_matrix

# Matrices that no output depends on, at full size as here: pattern of names, and why.
UNUSED: dict[str, tuple[str, str]] = {
    "big_bird": (r"pooler", "pooled, and the language head does not read it"),
    "fnet": (r"pooler\.dense", "pooled, and the language head does not read it"),
    "squeezebert": (r"pooler\.dense", "pooled, and the language head does not read it"),
    "detr": (r"decoder\.layers\.0\.self_attn\.v_proj", "the first values are of zeros"),
    "llava": (r"vision_tower\.encoder\.layers\.2\.", "features are those before the last layer"),
    "sam": (r"hypernetworks_mlps\.0\.", "of the single mask, where three are asked for"),
    "wav2vec2_conformer": (r"pos_conv_embed", "replaced by relative positions"),
    "SD3Transformer2DModel": (r"blocks\.1\.attn\.add_q_proj", "text ends before the last layer"),
    "nllb_moe": (
        r"experts\.expert_[23]\.",
        "transformers 5.24 takes the router's one-hot mask for indices, which are 0 and 1 then",
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small run slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model_of(family: Family) -> nn.Module:
    """Built once; who changes it puts it back. Skips the test where its package is missing."""
    reason = family.missing()
    if reason is not None:
        pytest.skip(reason)
    return family.model()


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def run(family: Family, model: nn.Module) -> Tensor:
    """Main output, without a cache."""
    uncached = {"use_cache": False} if takes_cache(model) else {}
    return family.output(model(**family.inputs(model), **uncached))


def takes_cache(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def test_zoo_has_the_families_it_promises():
    groups = [family.group for family in FAMILIES.values()]
    assert sum(family.auto is not None for family in FAMILIES.values()) >= 50
    assert groups.count("diffusion") >= 3
    assert all(name == family.name for name, family in FAMILIES.items())
    assert UNUSED.keys() <= FAMILIES.keys()


def test_same_weights_twice(family):
    once, random = model_of(family).state_dict(), torch.get_rng_state()
    again = family.model().state_dict()
    assert torch.equal(random, torch.get_rng_state())
    assert once.keys() == again.keys()
    assert [name for name in once if not torch.equal(once[name], again[name])] == []
    assert 2e4 < sum(p.numel() for p in model_of(family).parameters()) < 2e6
    assert not any(module.training for module in model_of(family).modules())


def test_structured_values_stay():
    """What a family starts with for a reason is no random matrix."""
    mamba = model_of(FAMILIES["mamba"]).backbone.layers[0].mixer
    assert torch.equal(mamba.A_log[5].exp().round(), torch.arange(1.0, 9))
    sines = model_of(FAMILIES["whisper"]).model.encoder.embed_positions.weight
    assert torch.equal(sines[0], torch.arange(64).ge(32).float())


def test_weights_are_sensible(family):
    for name, parameter in model_of(family).named_parameters():
        assert parameter.dtype == torch.float32, name
        assert bool(parameter.isfinite().all()), name
        assert parameter.abs().max() < 100, name  # SAM multiplies positions by that much
        if is_matrix(parameter):
            assert parameter.std() > 1e-3, name


@torch.no_grad()
def test_same_finite_output_twice(family):
    model = model_of(family)
    once = run(family, model)
    assert len(once) >= 2
    assert bool(once.isfinite().all())
    assert once.std() > 1e-3
    assert torch.equal(once, run(family, model))
    inputs, again = family.inputs(model), family.inputs(model)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs if isinstance(inputs[k], Tensor))


def test_every_matrix_counts(family):
    """The output has a gradient by each matrix, or changes when it does (codebooks, chosen experts)."""
    model = model_of(family)
    matrices = {name: p for name, p in model.named_parameters() if is_matrix(p)}
    flags = {name: p.requires_grad for name, p in matrices.items()}
    for parameter in matrices.values():
        parameter.requires_grad_(True)
    output = run(family, model)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((output * weights).sum(), matrices.values(), allow_unused=True)
    for name, parameter in matrices.items():
        parameter.requires_grad_(flags[name])
    silent = [
        name
        for name, gradient in zip(matrices, gradients, strict=True)
        if gradient is None or not bool(gradient.any())
    ]
    unmoved = {name for name in silent if not changes_output(family, model, matrices[name])}
    pattern, _ = UNUSED.get(family.name, (r"$^", ""))
    assert unmoved == {name for name in matrices if re.search(pattern, name)}


@torch.no_grad()
def changes_output(family: Family, model: nn.Module, matrix: Tensor) -> bool:
    """Whether another draw of the matrix, of its scale, gives another output."""
    before, saved = run(family, model), matrix.clone()
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    matrix.copy_(noise * saved.std())
    after = run(family, model)
    matrix.copy_(saved)
    return not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].generates])
def test_generates(name):
    family = FAMILIES[name]
    model = model_of(family)
    inputs = family.inputs(model)
    made = generate(model, inputs)
    assert len(made) == 2
    assert torch.equal(made, generate(model, inputs))
    if family.group in ("decoders", "mixtures", "hybrids") and "decoder_input_ids" not in inputs:
        prompt = inputs["input_ids"]
        assert torch.equal(made[:, : prompt.shape[1]], prompt)
        assert made.shape[1] == prompt.shape[1] + 4
