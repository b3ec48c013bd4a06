"""What recipes are made of: error feedback, statistics of inputs, the configuration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dcext
import reference
from dcext.quantize.feedback import (
    BLOCK_COLS,
    DAMPING,
    NUM_LEVELS,
    cholesky_factor,
    rate_pull,
    round_with_feedback,
)
from dcext.quantize.statistics import CHUNK_TOKENS, PANEL_COLS, InputStatistics
from reference import (
    NO_PULL,
    UNIT,
    assert_rounded,
    correlated_factor,
    grid,
    seeded,
    some_pull,
    sparse_feedback,
)

# Error feedback


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (33, 64), (5, 65), (37, 130), (3, 200)])
def test_feedback_is_the_plain_loop_where_float32_is_exact(shape, pulled):
    rows, cols = shape
    weight = grid(rows, cols, step=1 / 64, most=600, seed=cols)
    row_scale = 2.0 ** torch.randint(-1, 2, (rows,), generator=seeded(1))
    col_scale = 2.0 ** torch.randint(-3, 1, (cols,), generator=seeded(2))
    diagonal = 2.0 ** torch.randint(-2, 3, (cols,), generator=seeded(3))
    factor = ((sparse_feedback(cols, 4) + torch.eye(cols)) * diagonal).double()
    pull = some_pull(5) if pulled else NO_PULL
    q = round_with_feedback(weight, factor, row_scale, col_scale, pull if pulled else None)
    expected = reference.round_with_feedback(weight, factor, row_scale, col_scale, pull)
    assert torch.equal(q.double(), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 2 * BLOCK_COLS + 9), st.integers(0, 10**6))
def test_feedback_rounds_every_column_from_its_corrected_target(rows, cols, seed):
    """Hence ``|((W - W^) L)_ni| <= (1/2 + pull) step L_ii``, the bound of the whole method."""
    weight = torch.randn(rows, cols, generator=seeded(seed))
    factor = correlated_factor(cols, seed)
    row_scale = torch.rand(rows, generator=seeded(seed + 1)) + 0.1
    col_scale = (0.3 / factor.diagonal()).float()
    pull = some_pull(seed, step=2.0**-20)
    inputs = (weight, factor, row_scale, col_scale, pull)
    copies = [tensor.clone() for tensor in inputs]
    q = round_with_feedback(*inputs)
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))
    assert q.dtype == torch.int8
    assert q.is_contiguous()
    steps = row_scale.double()[:, None] * col_scale.double()
    target, slack = reference.feedback_targets(weight, q * steps, factor)
    assert_rounded(q, target / steps, slack / steps, pull)


def test_feedback_without_correlation_rounds_to_nearest():
    weight = torch.randn(20, 100, generator=seeded(0)) * 50
    factor = torch.diag(torch.rand(100, dtype=torch.float64, generator=seeded(1)) + 0.1)
    q = round_with_feedback(weight, factor, torch.ones(20), torch.ones(100))
    assert torch.equal(q, weight.round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("cols", [5, 70, 200])
def test_feedback_loses_less_than_rounding_to_nearest(cols):
    weight = torch.randn(64, cols, generator=seeded(0))
    factor = correlated_factor(cols)
    col_scale = (0.3 / factor.diagonal()).float()
    q = round_with_feedback(weight, factor, torch.ones(64), col_scale)
    moment = factor @ factor.T
    nearest = (weight / col_scale).round() * col_scale
    error = reference.output_error(weight, q * col_scale, moment)
    assert error < reference.output_error(weight, nearest, moment)
    # Uniform errors of every column, as the theory has it; 64 x cols of them average to within 4
    # sigma.
    expected = 64 * cols * 0.3**2 / 12
    assert error == pytest.approx(expected, rel=4 * (0.8 / (64 * cols)) ** 0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=NUM_LEVELS, max_size=NUM_LEVELS))
@example([0] * NUM_LEVELS)
@example([10**6] + [0] * 127)
@example([0] * 127 + [10**6])
def test_rate_pull_is_where_both_levels_cost_the_same(counts):
    smoothed = [count + 0.5 for count in counts]
    total = sum(smoothed)
    values = [1] + [2] * 127  # a magnitude is two values, but for zero
    bits = [-math.log2(s / total / v) for s, v in zip(smoothed, values, strict=True)]
    wanted = [reference.rate_threshold(*bits[q - 1 : q + 1]) - 0.5 for q in range(1, NUM_LEVELS)]
    pull = rate_pull(torch.tensor(counts))
    assert pull.dtype == torch.float32
    expected = torch.tensor([0.0, *wanted], dtype=torch.float64).clamp(0, 0.45)
    assert ((pull - expected).abs() <= 2 * UNIT).all()


def test_rate_pull_minimizes_error_and_bits():
    """Brute force over all magnitudes of a grid: either of the two neighbours is taken, whichever
    costs less.
    """
    counts = (1e6 * 0.93 ** torch.arange(NUM_LEVELS)).long()
    pull = rate_pull(counts).double()
    p = (counts + 0.5) / (counts.sum() + 64) / torch.tensor([1.0] + [2.0] * 127)
    magnitude = torch.arange(0, 127, 0.003, dtype=torch.float64)
    lower = magnitude.floor()
    pair = torch.stack([lower, lower + 1])
    cost = (magnitude - pair) ** 2 - reference.BIT_PRICE * p.double().log2()[pair.long()]
    chosen = reference.round_levels(magnitude, pull)
    best = torch.where(cost[0] <= cost[1], lower, lower + 1)
    is_clear = (cost[0] - cost[1]).abs() > 4 * UNIT
    assert ((pull[1:] > 0) & (pull[1:] < 0.45)).all()
    assert torch.equal(chosen[is_clear], best[is_clear])
    assert (chosen != magnitude.round()).any()


def moment_of(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, cols, dtype=torch.float64, generator=seeded(seed))
    return x.T @ x / tokens


@pytest.mark.parametrize(("tokens", "cols"), [(1, 1), (50, 20), (10, 64), (300, 100)])
def test_cholesky_factor_is_of_the_damped_moment(tokens, cols):
    """Also of rank-deficient ones. Higham, Accuracy and Stability, theorem 10.3: the error of any
    factorization.
    """
    moment = moment_of(tokens, cols)
    before = moment.clone()
    factor = cholesky_factor(moment)
    identity = torch.eye(cols, dtype=torch.float64)
    damped = moment + DAMPING * moment.diagonal().mean() * identity
    assert torch.equal(moment, before)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() > 0).all()
    slack = (cols + 2) * 2.0**-52 * (factor.abs() @ factor.abs().T)
    assert ((factor @ factor.T - damped).abs() <= slack).all()


def test_cholesky_factor_raises_the_damping_until_it_exists():
    moment = torch.diag(torch.tensor([1.0, 1.0, -0.001], dtype=torch.float64))
    factor = cholesky_factor(moment, damping=0)
    damping = (factor @ factor.T - moment).diagonal() / moment.diagonal().mean()
    assert damping.tolist() == pytest.approx([0.01] * 3)  # 1e-8, 1e-7 .. : the first above 0.0015


@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (0, math.inf), (1, math.nan)])
def test_cholesky_factor_refuses_what_is_not_finite(index, value):
    moment = torch.eye(3, dtype=torch.float64)
    moment[0, index] = moment[index, 0] = value
    with pytest.raises(ValueError, match="cholesky_factor: second_moment: expected finite"):
        cholesky_factor(moment)


def test_cholesky_factor_refuses_zero():
    with pytest.raises(ValueError, match=r"expected finite and not zero, got mean diagonal 0\.0"):
        cholesky_factor(torch.zeros(3, 3, dtype=torch.float64))


# Statistics of inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [1, PANEL_COLS - 1, PANEL_COLS, PANEL_COLS + 1, 800])
def test_statistics_are_the_plain_formulas(cols, dtype):
    x = (torch.randn(3, 40, cols, generator=seeded(cols)) * 5).to(dtype)
    before = x.clone()
    statistics = InputStatistics(cols)
    statistics.update(x)
    tokens = x.reshape(-1, cols).double()
    moment = statistics.second_moment
    assert torch.equal(x, before)
    assert statistics.tokens == 120
    assert statistics.finite
    assert torch.equal(statistics.absmax, tokens.abs().amax(0).float())
    assert torch.equal(moment, moment.T)
    slack = (120 + 1) * UNIT * (tokens.abs().T @ tokens.abs()) / 120  # of a float32 dot product
    assert ((moment - tokens.T @ tokens / 120).abs() <= slack).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6))
def test_several_updates_equal_one(parts, seed):
    """Whole numbers, whose products and sums float32 holds exactly."""
    x = torch.randint(-20, 21, (sum(parts), 6), generator=seeded(seed)).float()
    whole, pieces = InputStatistics(6), InputStatistics(6)
    whole.update(x)
    for part in x.split(parts):
        pieces.update(part)
    assert pieces.tokens == whole.tokens
    assert torch.equal(pieces.absmax, whole.absmax)
    assert torch.equal(pieces.second_moment, whole.second_moment)
    assert pieces.near_zero == whole.near_zero


def test_more_tokens_than_a_chunk():
    x = torch.randint(-9, 10, (2 * CHUNK_TOKENS + 1, 3), generator=seeded(0)).double()
    statistics = InputStatistics(3)
    statistics.update(x)
    assert statistics.tokens == x.shape[0]
    assert torch.equal(statistics.second_moment, x.T @ x / x.shape[0])


@pytest.mark.parametrize("cols", [2, 50, 800])
def test_near_zero_is_what_int8_rounds_to_zero(cols):
    x = torch.randn(40, cols, generator=seeded(cols)) * 5
    statistics = InputStatistics(cols, with_moment=False)
    statistics.update(x)
    assert statistics.near_zero == reference.int8_zero_share(x)


@pytest.mark.parametrize(("token", "share"), [([0.0, 0.0], 1.0), ([254.0, 1.0], 0.5)])
def test_near_zero_counts_zero_tokens_and_halves_which_go_to_even(token, share):
    statistics = InputStatistics(2, with_moment=False)
    statistics.update(torch.tensor(token))
    assert reference.int8_zero_share(torch.tensor([token])) == share
    assert statistics.near_zero == share


def test_no_token_changes_nothing():
    statistics = InputStatistics(4)
    statistics.update(torch.empty(2, 0, 4))
    assert statistics.tokens == 0
    assert statistics.near_zero == 0


def test_no_token_has_no_second_moment():
    with pytest.raises(ValueError, match="second_moment: expected inputs, got 0 tokens"):
        _ = InputStatistics(4).second_moment


@pytest.mark.parametrize("parts", [{}, {"with_moment": False}, {"with_values": False}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_remembered(value, parts):
    statistics = InputStatistics(4, **parts)
    x = torch.ones(3, 4)
    x[1, 2] = value
    for part in (torch.ones(3, 4), x, torch.ones(3, 4)):
        statistics.update(part)
    assert not statistics.finite


@pytest.mark.parametrize("parts", [{}, {"with_moment": False}, {"with_values": False}])
def test_inputs_that_are_zero(parts):
    statistics = InputStatistics(4, **parts)
    statistics.update(torch.zeros(3, 4))
    assert statistics.zero
    assert statistics.finite
    x = torch.zeros(3, 4)
    x[2, 1] = -1e-3
    statistics.update(x)
    assert not statistics.zero


def test_statistics_without_values_have_the_same_moment():
    x = torch.randn(50, 20, generator=seeded(0))
    whole, part = InputStatistics(20), InputStatistics(20, with_values=False)
    whole.update(x)
    part.update(x)
    assert part.tokens == whole.tokens
    assert torch.equal(part.second_moment, whole.second_moment)


def test_statistics_without_moment():
    statistics = InputStatistics(2, with_moment=False)
    statistics.update(torch.ones(3, 2))
    assert statistics.absmax.tolist() == [1, 1]
    with pytest.raises(ValueError, match="second_moment: expected inputs"):
        _ = statistics.second_moment


# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "none"}, "recipe: expected 'rate' or .* or 'int8', got 'none'"),
        ({"granularity": "column"}, "granularity: expected 'row' or 'tensor', got 'column'"),
        ({"codec": "lz4"}, "codec: expected 'auto' or 'raw' or 'zstd' or 'packed', got 'lz4'"),
        ({"activations": "int4"}, "activations: expected 'int8' or 'none', got 'int4'"),
        ({"level": 3}, "level: expected 1..22 with codec 'zstd', or none, got 3 with codec 'auto'"),
        ({"level": 23, "codec": "zstd"}, "level: expected 1..22 .*, got 23"),
        ({"level": 0, "codec": "zstd"}, "level: expected 1..22 .*, got 0"),
        ({"recipe": "int8", "target_bits": 4}, "target_bits: expected .*'data-free', got 'int8'"),
        ({"recipe": "paper", "target_ratio": 2}, "target_ratio: expected .* got 'paper'"),
        ({"recipe": "int8", "target_nbytes": 9}, "target_nbytes: expected .* got 'int8'"),
        (
            {"target_bits": 4, "target_ratio": 2},
            "target_bits, target_ratio: expected only one of them, got ",
        ),
        (
            {"target_ratio": 2, "target_nbytes": 9},
            "target_ratio, target_nbytes: expected only one of them, got ",
        ),
        ({"target_bits": 0.0}, "target_bits: expected 0.3 to 7.5 .*, got 0.0"),
        ({"target_ratio": -1.0}, "target_ratio: expected 1.067 to 26.67 .*, got -1.0"),
        ({"target_bits": math.nan}, "target_bits: expected 0.3 to 7.5 .*, got nan"),
        ({"target_nbytes": 0}, "target_nbytes: expected .*, got 0"),
        ({"alpha": 0.5}, "alpha: expected recipe 'paper', got 'rate'"),
        ({"recipe": "data-free", "sparsity": 0.5}, "expected recipe 'paper', got 'data-free'"),
        ({"recipe": "paper", "alpha": "best"}, "alpha: expected a number, .*, got 'best'"),
        ({"recipe": "paper", "alpha": 1.1}, "alpha: expected 0 to 1, got 1.1"),
        ({"recipe": "paper", "alpha": math.nan}, "alpha: expected 0 to 1, got nan"),
        ({"recipe": "paper", "sparsity": 1.0}, "sparsity: expected 0 to 1, got 1.0"),
        ({"recipe": "paper", "sparsity": -0.1}, "sparsity: expected 0 to 1, got -0.1"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=f"^CompressionConfig: .*{message}"):
        dcext.CompressionConfig(**changes)


@pytest.mark.parametrize("target", ["target_bits", "target_ratio"])
def test_config_refuses_infinite_targets(target):
    with pytest.raises(ValueError, match=r"^CompressionConfig: .*expected .* got .*inf"):
        dcext.CompressionConfig(**{target: math.inf})


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 8 / 2.2),
        ({"target_bits": 3.5}, 3.5),
        ({"target_ratio": 2}, 4.0),
        ({"recipe": "data-free", "target_bits": 5}, 5),
    ],
)
def test_config_target_in_bits(changes, bits):
    assert dcext.CompressionConfig(**changes).bits == bits


def test_config_target_in_bytes_is_not_bits():
    config = dcext.CompressionConfig(target_nbytes=1000)
    with pytest.raises(ValueError, match="expected target_bits or target_ratio, got target_nbytes"):
        _ = config.bits


@pytest.mark.parametrize(
    "changes", [{}, {"recipe": "paper", "alpha": 0.3, "sparsity": 0.2}, {"target_nbytes": 5}]
)
def test_config_survives_json(changes):
    config = dcext.CompressionConfig(**changes)
    assert dcext.CompressionConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("recipe", "granularity"),
    [("paper", "tensor"), ("int8", "row"), ("rate", "row"), ("data-free", "row")],
)
def test_config_granularity_by_recipe(recipe, granularity):
    assert dcext.CompressionConfig(recipe=recipe).granularity == granularity


def test_massive_tokens_count_as_the_most_power_allowed():
    x = torch.randn(99, 8, generator=torch.Generator().manual_seed(0))
    x[7] *= 1000
    statistics = InputStatistics(8, with_values=False, most_power=10)
    statistics.update(x)
    power = x.double().square().sum(1)
    factor = (10 * power.median() / power).clamp(max=1)
    expected = (x.double().t() * factor) @ x.double() / len(x)
    torch.testing.assert_close(statistics.second_moment, expected, rtol=1e-5, atol=1e-5)
