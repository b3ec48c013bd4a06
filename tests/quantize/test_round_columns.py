"""The operator that rounds columns with error feedback, against plain loops in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from dcext import _C
from reference import (
    NO_PULL,
    UNIT,
    assert_rounded,
    grid,
    seeded,
    some_pull,
    sparse_feedback,
)

ISAS = _C.supported_isas()
ROWS = [1, 31, 32, 33, 200]
COLS = [1, 5, 64]


def exact_case(rows: int, cols: int, *, pull: torch.Tensor, seed: int, spread: int = 400) -> dict:
    """Arguments of ``round_columns_`` for which float32 is exact; one weight in eight is a tie or
    on a threshold.
    """
    return {
        "weight": grid(cols, rows, step=1 / 64, most=spread, seed=seed),
        "target": grid(cols, rows, step=1 / 64, most=spread, seed=seed + 1),
        "feedback": sparse_feedback(cols, seed + 2),
        "step": 2.0 ** torch.randint(-3, 1, (cols,), generator=seeded(seed + 3)),
        "pull": pull,
    }


def real_case(rows: int, cols: int, seed: int = 0) -> dict:
    """Arguments of ``round_columns_`` with weights of all sizes, some beyond the levels."""
    return {
        "weight": torch.randn(cols, rows, generator=seeded(seed)) * 20,
        "target": torch.randn(cols, rows, generator=seeded(seed + 1)) * 20,
        "feedback": torch.randn(cols, cols, generator=seeded(seed + 2)) / cols**0.5,
        "step": torch.rand(cols, generator=seeded(seed + 3)) + 0.3,
        "pull": some_pull(seed + 4, step=2.0**-20),
    }


def with_rows(case: dict, size: int, seed: int, exact: bool = True) -> dict:
    """The case with ``row_feedback`` for blocks of ``size`` rows."""
    blocks = range(-(-case["weight"].shape[1] // size))
    if exact:
        feedback = [sparse_feedback(size, seed + 2 * i) for i in blocks]
    else:
        noise = [torch.randn(size, size, generator=seeded(seed + i)) for i in blocks]
        feedback = [matrix.tril(-1) / size**0.5 for matrix in noise]
    return {**case, "row_feedback": torch.stack(feedback)}


def with_tables(case: dict, panel_rows: int, seed: int) -> dict:
    """The case with a table of random integers for every ``panel_rows`` rows."""
    panels = -(-case["weight"].shape[1] // panel_rows)
    tables = torch.randint(-127, 128, (panels, 512), generator=seeded(seed), dtype=torch.int8)
    return {**case, "nearest": tables, "panel_rows": panel_rows}


def run_op(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` and ``error``; of what is passed, only ``target`` may change."""
    arguments = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in case.items()
    }
    q = torch.full_like(case["weight"], 99, dtype=torch.int8)
    error = torch.full_like(case["weight"], float("nan"))
    torch.ops.dcext.round_columns_(**arguments, q=q, error=error)
    kept = case.keys() - {"target", "panel_rows"}
    assert all(torch.equal(arguments[name], case[name]) for name in kept)
    return q, error


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("rows", ROWS)
def test_op_is_the_plain_loop_where_float32_is_exact(isa, rows, cols, pulled):
    case = exact_case(rows, cols, pull=some_pull(5) if pulled else NO_PULL, seed=rows * 100 + cols)
    q, error = run_op(case)
    expected_q, expected_error = reference.round_columns(**case)
    assert torch.equal(q.double(), expected_q)
    assert torch.equal(error.double(), expected_error)


@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("rows", [1, 8, 31, 200])
def test_op_is_the_plain_loop_where_rows_correct_each_other(isa, rows, size):
    case = with_rows(exact_case(rows, 12, pull=some_pull(5), seed=rows), size, seed=size)
    q, error = run_op(case)
    expected_q, expected_error = reference.round_columns(**case)
    assert torch.equal(q.double(), expected_q)
    assert torch.equal(error.double(), expected_error)
    if rows > 8:
        without = {name: value for name, value in case.items() if name != "row_feedback"}
        assert not torch.equal(run_op(without)[0], q)


@pytest.mark.parametrize("size", [0, 8, 64])
@pytest.mark.parametrize(("rows", "panel_rows"), [(1, 1), (31, 7), (33, 16), (200, 48), (70, 100)])
def test_op_rounds_to_tables(isa, rows, panel_rows, size):
    """Values on thresholds, a quarter of them, go to the interval above; others stay inside."""
    case = exact_case(rows, 12, pull=NO_PULL, seed=rows)
    case["weight"], case["target"] = case["weight"] * 16, case["target"] * 16  # beyond both ends
    case["feedback"] *= 1 / 16  # errors of random tables do not explode
    case = with_tables(case, panel_rows, seed=rows + 1)
    if size:
        case = with_rows(case, size, seed=size)
        case["row_feedback"] = case["row_feedback"] / 16
    q, error = run_op(case)
    expected_q, expected_error = reference.round_columns(**case)
    assert torch.equal(q.double(), expected_q)
    assert torch.equal(error.double(), expected_error)


def test_op_takes_the_half_below_each_threshold_for_its_own():
    """Right below a multiple of 1/2, where adding the table's offset would round up to it."""
    halves = torch.arange(-300, 301) / 2
    values = torch.stack([halves, torch.nextafter(halves, torch.tensor(-1e9))]).reshape(1, -1)
    table = torch.arange(512).remainder(251).sub(125).to(torch.int8)[None]
    case = {"weight": values, "target": values, "feedback": torch.zeros(1, 1)}
    case |= {"step": torch.ones(1), "pull": NO_PULL, "nearest": table, "panel_rows": 10**6}
    q, _ = run_op(case)
    assert torch.equal(q.double(), reference.look_up(values, table.expand(1, values.shape[1], -1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([30, 20000]))
def test_op_is_the_plain_loop_for_any_shape(rows, cols, seed, spread):
    case = exact_case(rows, cols, pull=some_pull(seed), seed=seed, spread=spread)
    q, error = run_op(case)
    expected_q, expected_error = reference.round_columns(**case)
    assert torch.equal(q.double(), expected_q)
    assert torch.equal(error.double(), expected_error)


@pytest.mark.parametrize("shape", [(33, 5), (200, 64)])
def test_op_rounds_to_float32_accuracy(isa, shape):
    case = real_case(*shape)
    q, error = run_op(case)
    step = case["step"][:, None]
    assert torch.equal(error, case["weight"] - q.float() * step)
    behind = case["feedback"].double().tril(-1).T
    target = case["target"].double() + behind @ error.double()
    magnitude = case["target"].double().abs() + behind.abs() @ error.double().abs()
    slack = (shape[1] + 4) * UNIT * magnitude  # a rounding per sum, and those of error and division
    assert_rounded(q, target / step, slack / step, case["pull"])


def test_op_clamps_to_127_and_passes_the_error_on(isa):
    weight = torch.tensor([[1.0, -1.0, 0.0], [300.0, -300.0, 126.75]])
    feedback = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    case = {"weight": weight, "target": weight, "feedback": feedback}
    q, error = run_op({**case, "step": torch.ones(2), "pull": NO_PULL})
    assert q.tolist() == [
        [88, -88, 0],
        [127, -127, 127],
    ]  # 1 + (300 - 127) / 2 = 87.5, half to even
    assert error.tolist() == [[-87, 87, 0], [173, -173, -0.25]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9000, 9000), min_size=1, max_size=40), st.integers(0, 10**6))
def test_op_thresholds_are_the_middles_plus_pull(sixtyfourths, seed):
    values = torch.tensor([sixtyfourths]) / 64
    pull = some_pull(seed)
    case = {"weight": values, "target": values, "feedback": torch.zeros(1, 1)}
    q, _ = run_op({**case, "step": torch.ones(1), "pull": pull})
    assert torch.equal(q.double(), reference.round_levels(values, pull))


@pytest.mark.parametrize("has_tables", [False, True])
@pytest.mark.parametrize("size", [0, 64])
def test_op_gives_the_same_bits_for_every_isa_and_number_of_threads(size, has_tables):
    threads, before = torch.get_num_threads(), _C.selected_isa()
    case = real_case(200, 64)
    if has_tables:
        case = with_tables(case, 48, seed=3)
    if size:
        case = with_rows(case, size, seed=9, exact=False)
    outputs = []
    try:
        for name in ISAS:
            _C.set_isa(name)
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                outputs.append(run_op(case))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(before)
    assert all(torch.equal(q, outputs[0][0]) for q, _ in outputs)
    assert all(torch.equal(error, outputs[0][1]) for _, error in outputs)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_op_takes_nothing(shape):
    q, error = run_op(real_case(*shape))
    assert q.shape == error.shape == shape[::-1]


def test_op_survives_what_is_not_finite():
    """In a process of its own: a level that is no index reads memory that is not there."""
    code = (
        "import torch, dcext\n"
        "for value in ('nan', 'inf', '-inf'):\n"
        "    w = torch.ones(4, 40); w[3, 5] = float(value)\n"
        "    q, step = torch.empty(4, 40, dtype=torch.int8), torch.ones(4)\n"
        "    args = (w, w.clone(), torch.eye(4), step, torch.zeros(128), q, torch.empty(4, 40))\n"
        "    torch.ops.dcext.round_columns_(*args)\n"
        "    assert (q[:, :5] == 1).all() and (q[:, 6:] == 1).all() and (q >= -127).all()\n"
        "    table = torch.full((3, 512), 7, dtype=torch.int8)\n"
        "    torch.ops.dcext.round_columns_(*args, None, table, 16)\n"
        "    assert (q == 7).all()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("weight", lambda t: t.double(), TypeError, "weight: expected .*, got Double"),
        ("weight", lambda t: t[0], ValueError, "weight: expected 2 dimensions, got 1"),
        ("target", lambda t: t.half(), TypeError, "target: expected .*, got Half"),
        (
            "target",
            lambda t: t[:, 1:],
            ValueError,
            r"target: expected .*\[5, 33\], got .*\[5, 32\]",
        ),
        ("target", lambda t: t.T.contiguous().T, ValueError, r"target: expected a contiguous"),
        ("feedback", lambda t: t[:, :4], ValueError, r"feedback: .*\[5, 5\], got .*\[5, 4\]"),
        ("feedback", lambda t: t.T.contiguous().T, ValueError, r"feedback: expected a contiguous"),
        ("step", lambda t: t.double(), TypeError, "step: expected torch.float32, got Double"),
        ("step", lambda t: t[:4], ValueError, r"step: expected .*\[5\] on cpu, got shape \[4\]"),
        ("step", lambda t: t.repeat(2)[::2], ValueError, "step: expected a contiguous"),
        ("pull", lambda t: t.double(), TypeError, "pull: expected torch.float32, got Double"),
        (
            "pull",
            lambda t: t[:127],
            ValueError,
            r"pull: expected .*\[128\] on cpu, got shape \[127\]",
        ),
        ("q", lambda t: t.int(), TypeError, "q: expected .*, got Int"),
        ("q", lambda t: t[:4], ValueError, r"q: expected .*\[5, 33\], got shape \[4, 33\]"),
        ("q", lambda t: t.T.contiguous().T, ValueError, "q: expected a contiguous"),
        ("error", lambda t: t.bfloat16(), TypeError, "error: expected .*, got BFloat16"),
        ("error", lambda t: t[None], ValueError, r"error: .*\[5, 33\], got shape \[1, 5, 33\]"),
        ("row_feedback", lambda t: t.double(), TypeError, "row_feedback: expected .*, got Double"),
        ("row_feedback", lambda t: t[1:], ValueError, r"row_feedback: .*33 rows.*\[4, 8, 8\]"),
        ("row_feedback", lambda t: t[:, :4, :4], ValueError, r"row_feedback: .*\[5, 4, 4\]"),
        ("row_feedback", lambda t: t[0], ValueError, r"row_feedback: .*\[8, 8\]"),
        ("row_feedback", lambda t: t[:, :0, :0], ValueError, r"row_feedback: .*\[5, 0, 0\]"),
        ("row_feedback", lambda t: t.mT, ValueError, r"row_feedback: expected a contiguous"),
        (
            "row_feedback",
            lambda t: torch.zeros(1, 264, 264),
            ValueError,
            r"row_feedback: .*up to 256, got shape \[1, 264, 264\]",
        ),
        ("nearest", lambda t: t.int(), TypeError, "nearest: expected .*, got Int"),
        ("nearest", lambda t: t[1:], ValueError, r"nearest: .*\[3, 512\], got shape \[2, 512\]"),
        ("nearest", lambda t: t[:, 1:], ValueError, r"nearest: .*\[3, 512\], got shape \[3, 511\]"),
        ("panel_rows", lambda n: 0, ValueError, "panel_rows: expected at least 1, got 0"),
        ("panel_rows", lambda n: -16, ValueError, "panel_rows: expected at least 1, got -16"),
    ],
)
def test_op_refuses(argument, change, error, message):
    arguments = with_tables(with_rows(real_case(33, 5), 8, seed=0), 16, seed=1)
    arguments |= {"q": torch.empty(5, 33, dtype=torch.int8), "error": torch.empty(5, 33)}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(error, match=f"^dcext::round_columns_: {message}"):
        torch.ops.dcext.round_columns_(**arguments)


def test_opcheck():
    q, error = torch.empty(5, 33, dtype=torch.int8), torch.empty(5, 33)
    case = with_rows(real_case(33, 5), 8, seed=0)
    row_feedback = case.pop("row_feedback")
    table = torch.zeros(3, 512, dtype=torch.int8)
    for last in ((row_feedback,), (None,), (None, table, 16), (row_feedback, table, 16)):
        arguments = (*case.values(), q, error, *last)
        torch.library.opcheck(torch.ops.dcext.round_columns_.default, arguments)
