"""Machines as files and presets, times by the roofline, shapes of models."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcext.errors import FormatError
from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.machine import Processor, interpolate, load_machine, machine_from_dict
from dcext.policy.predict import LINK, Observed, Predictor
from dcext.policy.presets import preset, presets
from dcext.policy.shapes import SHAPES, units_of
from dcext.policy.tier import HOST_DECODE, Tier

ROOT = Path(__file__).resolve().parents[2]
WHOLE = presets()["pcie4"].to_dict()


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_are_plausible(name):
    machine = preset(name)
    assert machine.kind == "projected"
    assert machine.notes
    (cores,) = machine.host
    host = machine.host_with()
    assert 4 <= cores <= 128
    assert 20 <= host.memory_gbps <= 600
    assert 0.05 * cores <= host.int8_tops <= 2 * cores
    assert 1 * cores <= host.decode_gweights["zstd"] <= 3 * cores
    assert 1 <= machine.disk_gbps <= 15
    if machine.device is not None:
        device = machine.device
        assert 150 <= device.memory_gbps <= 8000
        assert 50 <= device.int8_tops <= 5000
        assert device.decode_gweights["zstd"] * 1.46 <= device.memory_gbps  # reads and writes
        assert 10 <= machine.link_gbps <= 450
        assert machine.link_gbps <= device.memory_gbps


def test_files_come_back_equal(tmp_path):
    path = tmp_path / "machine.json"
    for machine in presets().values():
        machine.save(path)
        assert load_machine(path) == machine


def test_the_example_of_the_documentation():
    text = (ROOT / "dcext/policy/MACHINE.md").read_text()
    example = text[text.index("    {\n") :]
    assert machine_from_dict(json.loads(example), "example").link_gbps == 25


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "format_version: expected 1, found 2"),
        ("kind", "guessed", "kind: expected 'measured' or 'projected', found 'guessed'"),
        ("name", "", "name: expected text"),
        ("host", {}, "host: expected processors by number of threads, found none"),
        ("host", {"many": {}}, "host: expected a count from 1 on, found 'many'"),
        ("disk_gbps", -1, "disk_gbps: expected a positive number, found -1"),
        ("disk_gbps", True, "disk_gbps: expected a positive number, found True"),
        ("link_gbps", None, "device, link_gbps: expected both or neither, found one"),
        ("speed", 1, "expected fields of .*, found 'speed'"),
        ("device.memory_gbps", None, "device: memory_gbps: expected a positive number, found None"),
        ("device.decode_gweights", {"lz4": 1}, "device: expected a codec of .*, found 'lz4'"),
        ("device.layer_s", {"raw": {"1": 0}}, "layer_s: raw: expected a positive number, found 0"),
        ("device.layer_s", {"raw": {}}, "layer_s: raw: expected seconds by tokens"),
        ("device", [], "device: expected an object, found list"),
    ],
)
def test_bad_files_are_named(tmp_path, path, value, message):
    changed = copy.deepcopy(WHOLE)
    *parents, last = path.split(".")
    place = changed
    for parent in parents:
        place = place[parent]
    place[last] = value
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(FormatError, match=f"machine.json: .*{message}|machine.json: {message}"):
        load_machine(file)


def test_a_preset_that_there_is_not():
    with pytest.raises(ValueError, match="expected a file or one of jetson, laptop"):
        preset("abacus")


@given(
    st.dictionaries(st.integers(1, 4096), st.floats(1e-6, 10), min_size=1, max_size=6),
    st.integers(1, 10000),
)
def test_interpolation(table, tokens):
    value = interpolate(table, tokens)
    assert all(interpolate(table, n) == pytest.approx(seconds) for n, seconds in table.items())
    low, high = min(table.values()), max(table.values())
    most = max(table)
    assert low * (1 - 1e-9) <= value <= high * max(1, tokens / most) * (1 + 1e-9)


def test_roofline_by_hand():
    cpu = Processor(50.0, 2.0, {"zstd": 10.0})
    # 1e9 weights: raw reads 20 ms, products of one token 1 ms, of 512 tokens 512 ms; zstd decodes for 100 ms.
    assert cpu.seconds("raw", 10**9, 10**9, 1) == pytest.approx(20e-3)
    assert cpu.seconds("raw", 10**9, 10**9, 512) == pytest.approx(512e-3)
    assert cpu.seconds("zstd", 10**9, 45 * 10**7, 1) == pytest.approx(101e-3)
    gpu = Processor(1000.0, 200.0, {"zstd": 400.0}, scratch=("zstd",))
    assert gpu.seconds("zstd", 10**9, 45 * 10**7, 1) == pytest.approx(2.5e-3 + 1e-3)
    measured = Processor(50.0, 2.0, layer_s={"raw": {1: 0.02, 100: 0.2}})
    assert measured.seconds("raw", 5 * 10**8, 0, 10) == pytest.approx(0.5 * math.sqrt(0.02 * 0.2))


def test_what_travels_takes_the_link():
    predictor = Predictor(preset("pcie4"))
    units, _ = units_of("opt-1.3b")
    layer = units[5]
    link = {
        tier: predictor.seconds(layer, tier, 1)[LINK]
        for tier in (
            Tier.parse("device/zstd"),
            Tier.parse("host/raw"),
            Tier.parse("host/zstd"),
            HOST_DECODE,
        )
    }
    assert link[Tier.parse("device/zstd")] == 0
    assert link[Tier.parse("host/raw")] == pytest.approx(layer.weights / 25e9, rel=1e-4)
    assert link[Tier.parse("host/zstd")] == pytest.approx(layer.device_nbytes("zstd") / 25e9)
    assert 1 < layer.device_nbytes("zstd") / (layer.weights * 3.64 / 8) < 1.02
    assert link[HOST_DECODE] == pytest.approx(layer.weights / 25e9)


def test_observations_correct_the_model():
    machine = preset("laptop")
    units, _ = units_of("opt-1.3b")
    layer = units[1]
    plain = Predictor(machine)
    taken = {1: 2 * plain.compute_s(layer, "raw", 1), 512: 3 * plain.compute_s(layer, "raw", 512)}
    seen = Observed(layer_s={(layer.kind, "raw"): taken}, other_s={1: 1e-3})
    corrected = Predictor(machine, observed=seen)
    assert corrected.compute_s(layer, "raw", 1) == pytest.approx(taken[1])
    assert corrected.compute_s(layer, "raw", 2048) == pytest.approx(
        3 * plain.compute_s(layer, "raw", 2048)
    )
    assert corrected.compute_s(layer, "zstd", 1) == pytest.approx(plain.compute_s(layer, "zstd", 1))
    assert corrected.other_s(1) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_have_the_published_parameters(name):
    units, others = units_of(name)
    weights = sum(unit.weights for unit in units)
    assert weights == pytest.approx(SHAPES[name].billions * 1e9, rel=0.01)
    assert 0 < others < 1e-3 * weights
    assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("name", ["laptop", "pcie4"])
def test_more_memory_is_never_slower(name):
    machine = preset(name)
    units, others = units_of("opt-1.3b")
    decider = Decider(Predictor(machine), units, {1: 1.0}, others)
    int8 = sum(unit.weights for unit in units)
    last = math.inf
    fitted = 0
    for share in (0.2, 0.35, 0.5, 0.65, 0.8, 1.1):
        where = int(share * int8) + others
        budget = Budget(where, None, others, 16 << 20)
        if machine.device is not None:
            budget = Budget(2 * int8, where, others, 16 << 20)
        try:
            tiers = decider.within(budget, quick=True)
        except BudgetError:
            assert last == math.inf
            continue
        fitted += 1
        seconds = decider.mean_s(tiers)
        assert seconds <= last * 1.001
        last = seconds
    assert fitted >= 4


@pytest.mark.parametrize("script", ["placement", "policy"])
def test_benches_run(tmp_path, script):
    pytest.importorskip("transformers")
    output = tmp_path / "results.json"
    command = [sys.executable, ROOT / f"bench/{script}.py", "--smoke", "--output", output]
    more = ["--models", "packed"] if script == "policy" else []
    result = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())["rows"]
    if script == "placement":
        assert len(rows) == 18
        assert all("gain_over" in row or "error" in row for row in rows)
    else:
        questions = {row["question"] for row in rows}
        assert {"accuracy", "choice", "pareto", "adaptation"} == questions
