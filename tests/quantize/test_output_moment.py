"""Second moments of the derivatives by outputs, and rounding in which rows correct each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from dcext.quantize.feedback import NUM_LEVELS, round_with_feedback
from dcext.quantize.output_moment import (
    FLOOR,
    ROW_BLOCK,
    SHARES,
    OutputMoment,
    diagonal,
    row_energies,
    row_factor,
    row_feedback,
    row_scales,
    weighted_error,
)
from dcext.quantize.quantized import to_bfloat16_values
from reference import UNIT, UNIT_BFLOAT16, correlated_factor, full_matrix, seeded

SIZES = [1, 7, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK]


def gradients(tokens: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Derivatives that correlate within every block, over two decades, and differ in size by row."""
    blocks = [
        torch.randn(tokens, ROW_BLOCK, generator=seeded(seed + i))
        @ correlated_factor(ROW_BLOCK, seed + i).float().T
        for i in range(-(-rows // ROW_BLOCK))
    ]
    sizes = torch.exp(torch.randn(rows, generator=seeded(seed)))
    return torch.cat(blocks, 1)[:, :rows] * sizes


def moment_of(gradient: torch.Tensor) -> torch.Tensor:
    moment = OutputMoment(gradient.shape[1])
    moment.update(gradient)
    return moment.moment(gradient.shape[0])


def block_mask(rows: int) -> torch.Tensor:
    return full_matrix(torch.ones(-(-rows // ROW_BLOCK), ROW_BLOCK, ROW_BLOCK), rows)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("tokens", [2, 50, 3000])
def test_moment_is_the_mean_product_with_one_share_of_it_off_the_diagonal(rows, tokens):
    gradient = gradients(tokens, rows)
    exact = gradient.double().T @ gradient.double() / tokens * block_mask(rows)
    found = full_matrix(moment_of(gradient), rows).double()
    assert moment_of(gradient).dtype == torch.float32
    scale = exact.diagonal().sqrt()
    slack = (tokens + 4) * UNIT * torch.outer(scale, scale)
    assert ((found - exact).diagonal().abs() <= slack.diagonal()).all()
    off = 1 - torch.eye(rows)
    errors = [((found - (1 - s) * exact).abs() * off <= slack).all() for s in SHARES]
    assert sum(map(bool, errors)) == (1 if rows > 1 else len(SHARES))


def test_more_tokens_leave_more_off_the_diagonal():
    def kept(tokens: int) -> float:
        gradient = gradients(tokens, ROW_BLOCK)
        exact = gradient.T @ gradient / tokens
        return float(moment_of(gradient)[0, 0, 1] / exact[0, 1])

    few, many = kept(100), kept(20000)
    assert few < many
    assert many == pytest.approx(1 - SHARES[0], rel=1e-4)


def test_independent_derivatives_have_nothing_off_the_diagonal():
    gradient = torch.randn(200, ROW_BLOCK, generator=seeded(0))
    moment = moment_of(gradient)[0]
    assert torch.equal(moment, torch.diag(moment.diagonal()))


def test_moment_does_not_depend_on_how_tokens_come():
    """The halves are of each call, so calls of like text give like halves; sums are the same."""
    gradient = gradients(400, 100)
    whole, parts = OutputMoment(100), OutputMoment(100)
    whole.update(gradient.reshape(4, 100, 100))
    for part in gradient.split(100):
        parts.update(part)
    assert torch.allclose(
        diagonal(whole.moment(400), 100), diagonal(parts.moment(400), 100), rtol=1e-5
    )


@pytest.mark.parametrize("rows", SIZES)
def test_factor_is_of_the_floored_moment(rows):
    moment = moment_of(gradients(500, rows))
    factor = row_factor(moment, rows)
    assert torch.equal(factor, factor.tril())
    exact = full_matrix(moment, rows).double()
    low = (exact.diagonal().mean() - exact.diagonal()).clamp_min(0)
    product = full_matrix(factor @ factor.mT, rows)
    torch.testing.assert_close(product, exact + FLOOR * torch.diag(low), rtol=1e-6, atol=1e-9)
    scales = row_scales(factor, rows)
    assert torch.equal(scales, to_bfloat16_values(scales))
    ratio = scales * full_matrix(factor, rows).diagonal()
    assert ((ratio - 1).abs() <= 1.01 * UNIT_BFLOAT16).all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e30])
def test_factor_exists_for_any_moment(size):
    gradient = torch.zeros(10, 70)
    gradient[:, 3] = size**0.5
    scales = row_scales(row_factor(moment_of(gradient), 70), 70)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2 * ROW_BLOCK + 9), st.integers(1, 140), st.integers(0, 10**6))
def test_rows_are_rounded_from_what_those_behind_them_left(rows, cols, seed):
    """Hence ``|(A^T (W - W^) L)_ni| <= (1/2 + pull) step A_nn L_ii``, the bound of the method."""
    weight = torch.randn(rows, cols, generator=seeded(seed))
    factor = correlated_factor(cols, seed)
    by_row = row_factor(moment_of(gradients(300, rows, seed)), rows)
    row_scale = row_scales(by_row, rows)
    col_scale = (0.3 / factor.diagonal()).float()
    pull = torch.rand(NUM_LEVELS, generator=seeded(seed)) * 0.4
    q = round_with_feedback(weight, factor, row_scale, col_scale, pull, by_row)
    steps = row_scale.double()[:, None] * col_scale.double()
    target, slack = reference.feedback_targets(weight, q * steps, factor, by_row)
    lowest = reference.round_levels((target - slack) / steps, pull)
    highest = reference.round_levels((target + slack) / steps, pull)
    assert (lowest <= q).all()
    assert (q <= highest).all()


def test_factor_of_independent_rows_changes_nothing():
    weight, factor = torch.randn(100, 90, generator=seeded(0)), correlated_factor(90)
    row_scale, col_scale = torch.rand(100, generator=seeded(1)) + 0.5, torch.full((90,), 0.3)
    by_row = torch.diag_embed(torch.rand(1, ROW_BLOCK, generator=seeded(2)).double() + 0.1)
    assert not row_feedback(by_row, row_scale).any()
    plain = round_with_feedback(weight, factor, row_scale, col_scale)
    assert torch.equal(
        round_with_feedback(weight, factor, row_scale, col_scale, None, by_row), plain
    )


def test_rows_that_correct_each_other_lose_less():
    """At the same steps; and as much as the theory says: ``step^2 / 12`` for every weight."""
    rows, cols = 2 * ROW_BLOCK, 90
    factor, by_row = correlated_factor(cols), row_factor(moment_of(gradients(20000, rows)), rows)
    exact = torch.block_diag(*(by_row @ by_row.mT))
    row_scale, col_scale = row_scales(by_row, rows), (0.1 / factor.diagonal()).float()
    weight = torch.randn(rows, cols, generator=seeded(0)) * row_scale[:, None]
    losses = {}
    for name, feedback in (("both", by_row), ("columns", None)):
        q = round_with_feedback(weight, factor, row_scale, col_scale, None, feedback)
        error = (weight - q * row_scale[:, None] * col_scale).double()
        losses[name] = float(torch.trace(exact @ error @ (factor @ factor.T) @ error.T))
    assert losses["both"] < 0.9 * losses["columns"]
    assert losses["both"] == pytest.approx(rows * cols * 0.1**2 / 12, rel=0.03)


@pytest.mark.parametrize("rows", SIZES)
def test_weighted_error_is_the_trace(rows):
    error = torch.randn(rows, 20, generator=seeded(1))
    second_moment = correlated_factor(20) @ correlated_factor(20).T
    moment = moment_of(gradients(300, rows))
    exact = full_matrix(moment, rows).double() @ error.double() @ second_moment @ error.double().T
    expected = float(torch.trace(exact))
    assert weighted_error(error, second_moment, moment) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rows", SIZES)
def test_row_energies_are_the_eigenvalues(rows):
    weight = torch.randn(rows, 30, generator=seeded(0))
    moment = moment_of(gradients(300, rows))
    root = weight.double().square().mean(1).sqrt()
    matrix = root[:, None] * full_matrix(moment, rows).double() * root
    expected = torch.linalg.eigvalsh(matrix)
    energies = row_energies(weight, moment)
    assert energies.shape == (rows,)
    torch.testing.assert_close(energies, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
