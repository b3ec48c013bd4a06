"""What is registered of a codec reaches costs, footprints, shapes, machines and plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dcext import codecs
from dcext.codecs import Codec, Extent, arrivals, codec_named, codec_names
from dcext.policy.decide import Budget, Decider, device_reserves
from dcext.policy.footprint import PART_NBYTES, index_nbytes, payload_index_nbytes
from dcext.policy.machine import Machine, machine_from_dict
from dcext.policy.predict import Predictor
from dcext.policy.shapes import units_of
from dcext.profiling.measure import drawn_weights
from dcext.quantize.cost import PACKED_COST
from policy_cases import CPU, GPU

TOY = Codec(
    "toy",
    layer_bits=3.0,
    embedding_bits=6.0,
    cost=PACKED_COST,
    parts=4,
    index_nbytes=lambda extent: 8 * extent.chunks + extent.exceptions,
    exception_every=100,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(codecs, "_registered", dict(codecs._registered))
    codecs.register(TOY)


def test_recipes_find_its_cost():
    assert codec_names() == ("raw", "packed", "zstd", "toy")
    assert codec_named("toy").cost is PACKED_COST
    with pytest.raises(ValueError, match="expected a new codec, got a second 'toy'"):
        codecs.register(TOY)


def test_footprint_and_shapes_have_it():
    assert index_nbytes("toy", Extent(50, 3, 9, 70)) == 4 * PART_NBYTES + 8 * 3 + 70
    chunk = {"shape": (50, 64), "exceptions": 70}
    info = {"codec": "toy", "shape": (50, 64), "level": 0, "chunks": [chunk], "nbytes": 1280}
    assert payload_index_nbytes(info) == 4 * PART_NBYTES + 8 + 70
    units, _ = units_of("opt-1.3b")
    assert [units[1].nbytes["toy"], units[0].nbytes["toy"]] == [
        units[1].weights * 3 // 8,
        units[0].weights * 6 // 8,
    ]
    assert {unit.file_codec for unit in units} == {"toy"}  # the smallest
    few = drawn_weights("toy", (64, 100))
    assert len(few.unique()) < 80 < len(drawn_weights("packed", (640, 1000)).unique())


def test_machines_may_know_it():
    host = replace(CPU.host[2], layer_s={"toy": {1: 0.02}})
    machine = replace(CPU, host={2: host})
    assert (
        machine_from_dict(machine.to_dict(), "a test").host[2].seconds("toy", 10**9, 0, 1) == 0.02
    )


def tiers_within(machine: Machine, host: int | None, device: int | None) -> Counter[str]:
    """How many layers of OPT-1.3B are in each tier; bounds in bytes."""
    units, others = units_of("opt-1.3b")
    decider = Decider(Predictor(machine), units, {1: 1.0}, others)
    chosen = decider.within(Budget(host, device, others, slots=16 << 20), quick=True)
    return Counter(str(tier) for tier in chosen.values())


def test_plans_use_it():
    bound = 3.1 / 8 * 1.316e9
    on_cpu = tiers_within(CPU, int(1.1 * bound), None)
    assert on_cpu["memory/toy"] > 0.9 * on_cpu.total(), on_cpu
    on_device = tiers_within(GPU, None, int(1.6 * bound))
    assert on_device["device/toy"] > 0.9 * on_device.total(), on_device


def test_it_may_arrive_on_a_device():
    assert [names for names in arrivals() if "toy" not in names] == [
        (),
        ("zstd",),
        ("packed",),
        ("packed", "zstd"),
    ]
    assert arrivals()[-1] == ("packed", "toy", "zstd", "raw")
    units, _ = units_of("opt-1.3b")
    assert any(room.arrives == ("toy",) and not room.decodes for room in device_reserves(units))
