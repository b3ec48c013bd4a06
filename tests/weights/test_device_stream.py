"""Units that travel to a device ahead of their use: under sanitizers, and as the operators that layers use."""

from __future__ import annotations

import gc
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dcext
from conftest import ROOT
from dcext.codec import seek_index
from dcext.weights.device_stream import DeviceStream, HostDecoded
from emulated_kernel import SANITIZERS, require_sanitizer
from matrices import gaussian

sys.path.insert(0, str(Path(__file__).parents[1] / "device"))

import device_program


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request) -> Path:
    require_sanitizer(request.param)
    return device_program.build(request.param)


@pytest.mark.parametrize("link", ["host", "cuda"])
def test_kernels_see_their_units(program: Path, link: str):
    counts = device_program.run(program, "eager", over=link, rounds=60, steps=400, seed=1)
    # Otherwise the test would not show what it is for.
    assert counts["kernels"] > 10_000
    assert counts["hits"] > 1000
    assert counts["late"] > 0
    assert counts["failures"] > 0
    assert counts["closes"] > 0


@pytest.mark.parametrize("link", ["host", "cuda"])
def test_captured_kernels_see_their_units(program: Path, link: str):
    counts = device_program.run(program, "captures", over=link, rounds=20, steps=200, seed=1)
    assert counts["replays"] > 100
    assert counts["kernels"] > counts["begins"]
    assert counts["hits"] > 0


@pytest.mark.parametrize("link", ["host", "cuda"])
def test_the_expected_order_is_copied_ahead(program: Path, link: str):
    counts = device_program.run(program, "exact", over=link, rounds=20, steps=200, seed=1)
    assert counts["hits"] == counts["begins"] - 20


DAMAGES = {
    "slots are filled while they are read": (
        "device_slots",
        "link->wait(copies, reader.read)",
        "(static_cast<void>(reader), Failure())",
        "eager",
    ),
    "pieces from disk are released before they are copied": (
        "unit_copier",
        "if (!happened && !must_wait) return false;",
        "happened = must_wait || !happened;",
        "eager",
    ),
    "copies ahead go on while a graph is captured": (
        "device_stream",
        "closed_ ? closed() : link_.drain()",
        "Failure()",
        "captures",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources_are_found(damage: str, tmp_path: Path):
    require_sanitizer("thread")
    name, intact, damaged, mode = DAMAGES[damage]
    text = (ROOT / "csrc" / "runtime" / f"{name}.cpp").read_text()
    assert text.count(intact) == 1
    changed = tmp_path / f"{name}.cpp"
    changed.write_text(text.replace(intact, damaged))
    program = device_program.build("thread", changed)
    with pytest.raises(AssertionError, match=r"data race|bytes that are not its unit's"):
        device_program.run(program, mode, rounds=100, steps=400, seed=1)


SHAPE = (48, 64)


@dataclass
class Stack:
    """Layers whose weights travel, in three ways, beside the same weights in memory."""

    qweights: list[Tensor]
    stream: DeviceStream

    @staticmethod
    def of(kinds: str, **options) -> Stack:
        qweights = [gaussian(*SHAPE, 3.0, seed=i) for i in range(len(kinds))]
        units: list[list[Tensor | HostDecoded]] = []
        for kind, qweight in zip(kinds, qweights, strict=True):
            payload = dcext.encode(qweight, "zstd")
            if kind == "i":
                units.append([payload, seek_index(payload)])
            else:
                units.append([qweight] if kind == "r" else [HostDecoded(payload)])
        return Stack(qweights, DeviceStream(units, "cpu", **options))

    def layer(self, unit: int, x: Tensor) -> Tensor:
        weight, *index = self.stream.fetch(unit)
        if index:
            payload, weight = weight, torch.empty(SHAPE, dtype=torch.int8)
            failures = torch.zeros(1, dtype=torch.int32)
            torch.ops.dcext.decode_indexed_([payload], index, [weight], failures)
        y = torch.tanh(x @ weight.float() / 30) @ weight.float().T / 30
        self.stream.fetched(unit, after=y)
        return y

    def expected(self, order: list[int], x: Tensor) -> Tensor:
        for unit in order:
            weight = self.qweights[unit].float()
            x = torch.tanh(x @ weight / 30) @ weight.T / 30
        return x

    def run(self, order: list[int], x: Tensor) -> Tensor:
        for unit in order:
            x = self.layer(unit, x)
        return x


@pytest.mark.parametrize("num_slots", [1, 2, 3, 9])
@pytest.mark.parametrize("kinds", ["iiiiiii", "rrrrr", "ddddd", "irdirdird"])
def test_any_order_gives_the_same_as_weights_in_memory(kinds: str, num_slots: int):
    stack = Stack.of(kinds, num_slots=num_slots)
    draw = random.Random(num_slots)
    x = torch.randn(3, SHAPE[0])
    order = list(range(len(kinds)))
    for _ in range(12):
        if draw.random() < 0.5:
            order = draw.choices(range(len(kinds)), k=draw.randint(1, 12))
        assert torch.equal(stack.run(order, x), stack.expected(order, x))
    stack.stream.close()


def test_a_repeated_order_is_learnt():
    stack = Stack.of("irdirdi", num_slots=3)
    x = torch.randn(1, SHAPE[0])
    order = [0, 4, 2, 6, 1, 3, 5]
    for _ in range(2):
        stack.run(order, x)
    before = stack.stream.statistics()
    stack.run(order, x)
    after = stack.stream.statistics()
    assert after["begins"] - before["begins"] == len(order)
    assert after["hits"] - before["hits"] >= len(order) - 1
    assert after["stall_ns"] > 0


def test_everything_that_fits_is_copied_once():
    stack = Stack.of("rrr", num_slots=3)
    for _ in range(4):
        stack.run([0, 1, 2], torch.randn(1, SHAPE[0]))
    assert stack.stream.statistics()["copied_nbytes"] == 3 * SHAPE[0] * SHAPE[1]


def test_views_lie_at_static_addresses():
    stack = Stack.of("iri", num_slots=2)
    payload, index = stack.stream.fetch(2)
    assert payload.data_ptr() == stack.stream.slot(0).data_ptr()
    assert index.shape[1] == 448
    assert index.data_ptr() % 16 == 0
    assert torch.equal(payload, dcext.encode(stack.qweights[2], "zstd"))
    stack.stream.fetched(2)
    with stack.stream.using(1) as (weight,):
        assert torch.equal(weight, stack.qweights[1])


def test_torch_compile_keeps_the_order():
    stack = Stack.of("irirrii", num_slots=2)
    order = [0, 2, 4, 1, 6, 5, 3, 3]
    x = torch.randn(2, SHAPE[0])
    compiled = torch.compile(lambda y: stack.run(order, y), fullgraph=True)
    expected = stack.expected(order, x)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
    assert stack.stream.statistics()["begins"] == 3 * len(order)


@pytest.mark.parametrize("op", ["fetch_", "fetched_"])
def test_opcheck(op: str):
    # Of a stream that brings nothing: opcheck copies its arguments, and a copy is not the stream's slot.
    torch.library.opcheck(getattr(torch.ops.dcext, op).default, (0, 0, torch.zeros(8).byte()))


def test_a_copy_of_a_slot_is_refused():
    stream = Stack.of("rr", num_slots=2).stream
    with pytest.raises(ValueError, match="the stream's own slot for unit 0"):
        torch.ops.dcext.fetch_(stream.handle, 0, stream.slot(0).clone())
    with pytest.raises(ValueError, match="the stream's own slot for unit 0"):
        torch.ops.dcext.fetch_(stream.handle, 0, stream.slot(0)[:8])


def test_wrong_use_is_reported():
    stream = Stack.of("rrr", num_slots=2).stream
    with pytest.raises(ValueError, match="unit: expected 0 to 2, got 3"):
        stream.fetch(3)
    with pytest.raises(RuntimeError, match="unit that was begun"):
        stream.fetched(0)
    stream.fetch(0)
    stream.fetch(1)
    with pytest.raises(RuntimeError, match="other units in use of the same slot"):
        stream.fetch(2)
    stream.fetched(0)
    stream.fetch(2)
    with pytest.raises(ValueError, match="num_slots: expected at least 1, got 0"):
        DeviceStream([[torch.zeros(4).byte()]], "cpu", num_slots=0)
    with pytest.raises(ValueError, match="expected at least 1 part in each, got none"):
        DeviceStream([[]], "cpu")
    with pytest.raises(TypeError, match=r"expected torch.uint8 or torch.int8, got torch.float32"):
        DeviceStream([[torch.zeros(4)]], "cpu")


def test_a_closed_stream_fails_its_users():
    stack = Stack.of("rd", num_slots=2)
    (weight,) = stack.stream.fetch(0)
    stack.stream.close()
    assert torch.equal(weight, stack.qweights[0])
    stack.stream.fetched(0)
    with pytest.raises(RuntimeError, match="closed"):
        stack.stream.fetch(1)
    handle, slot = stack.stream.handle, stack.stream.slot(0)
    del stack
    gc.collect()
    with pytest.raises(RuntimeError, match="expected the handle of an open stream"):
        torch.ops.dcext.fetch_(handle, 0, slot)


def test_damage_is_reported_where_it_is_needed():
    qweights = [gaussian(*SHAPE, 3.0, seed=i) for i in range(3)]
    payloads = [dcext.encode(qweight, "zstd") for qweight in qweights]
    chunk = dcext.payload_info(payloads[1])["chunks"][0]
    payloads[1][chunk["offset"] : chunk["offset"] + chunk["frame_nbytes"]] = 255
    stream = DeviceStream([[HostDecoded(payload)] for payload in payloads], "cpu", num_slots=2)
    for _ in range(2):
        for unit in (0, 2):
            with stream.using(unit) as (weight,):
                assert torch.equal(weight, qweights[unit])
        with pytest.raises(dcext.FormatError, match="corrupt data in chunk 0"):
            stream.fetch(1)


def test_threads_share_a_stream():
    stack = Stack.of("irdirdi", num_slots=2)
    x = torch.randn(1, SHAPE[0])

    def run(seed: int) -> bool:
        order = random.Random(seed).choices(range(7), k=200)
        return torch.equal(stack.run(order, x), stack.expected(order, x))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))


def test_a_forked_child_is_told():
    stack = Stack.of("rd", num_slots=2)
    stack.run([0, 1], torch.randn(1, SHAPE[0]))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            stack.stream.fetch(0)
        except RuntimeError as error:
            status = 0 if "its parent" in str(error) else 2
        stack.stream.close()
        del stack
        gc.collect()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(stack.stream.fetch(1)[0], stack.qweights[1])
    stack.stream.fetched(1)
