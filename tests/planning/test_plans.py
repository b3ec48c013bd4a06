"""Plans of a loaded model: exact sizes, files, applied while it runs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading

import pytest
import torch

import dcext
from dcext.errors import FormatError
from dcext.offloading.apply import plan_of
from dcext.offloading.state import other_nbytes
from dcext.offloading.weights import weights_of
from dcext.policy.plan import load_plan
from dcext.policy.tier import Tier
from dcext.profiling.observe import describe
from policy_cases import every_tier, logits, plan_with


def test_what_is_measured_is_plausible(machine):
    for host in machine.host.values():
        assert 1 < host.memory_gbps < 2000
        assert 0.005 < host.int8_tops < 500
        assert all(0.01 < speed < 1e4 for speed in host.decode_gweights.values())
        assert all(seconds > 0 for table in host.layer_s.values() for seconds in table.values())
    assert 0.01 < machine.disk_gbps < 200
    assert all(0 <= spread < 10 for spread in machine.uncertainty.values())


@pytest.mark.parametrize("codec", ["zstd", "packed"])
def test_sizes_are_exact(checkpoints, codec):
    model = dcext.from_pretrained(checkpoints[codec])
    units = describe(model, weights_of(model))
    for unit, weight in zip(units, weights_of(model), strict=True):
        for name in ("raw", "packed", "zstd"):
            assert unit.nbytes[name] == weight.payload(name).nbytes
    assert units[0].looked_up == 1
    assert units[0].multiplied == 1


@pytest.mark.parametrize("codec", ["zstd", "packed"])
def test_every_tier_computes_the_same_bits(checkpoints, codec):
    model = dcext.from_pretrained(checkpoints[codec])
    before = logits(model)
    tiers = every_tier(model)
    for shift in range(4):
        names = list(tiers)
        shifted = dict(
            zip(names, [*tiers.values()][shift:] + [*tiers.values()][:shift], strict=True)
        )
        plan = plan_with(model, shifted)
        offload = dcext.apply(model, plan)
        assert {w.name: w.tier for w in weights_of(model)} == shifted
        assert torch.equal(logits(model), before)
        assert offload is model.dcext_offload
        assert plan_of(model) is plan
        assert plan.host_nbytes == offload.memory_nbytes - other_nbytes(model)
    back = plan_with(model, dict.fromkeys(tiers, Tier("memory", codec)))
    assert dcext.apply(model, back).stream is None
    assert torch.equal(logits(model), before)


def test_a_plan_is_a_file_that_can_be_edited(checkpoints, tmp_path):
    model = dcext.from_pretrained(checkpoints["zstd"])
    path = tmp_path / "plan.json"
    plan = plan_with(model, every_tier(model))
    plan.save(path)
    assert load_plan(path) == plan
    edited = json.loads(path.read_text())
    edited["layers"][0]["tier"] = "memory/packed"
    path.write_text(json.dumps(edited))
    loaded = dcext.from_pretrained(checkpoints["zstd"], plan=load_plan(path))
    assert weights_of(loaded)[0].tier == Tier.parse("memory/packed")
    assert torch.equal(logits(loaded), logits(model))
    copied = copy.deepcopy(loaded)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        (Tier.parse("memory/gzip"), "expected memory/CODEC or disk/CODEC"),
        (Tier.parse("device/raw"), "as the model runs on the CPU, found 'device/raw'"),
        (Tier.parse("disk/raw"), "expected codec 'raw' in the model's file, found 'zstd'"),
    ],
)
def test_tiers_that_do_not_exist(checkpoints, tier, message):
    model = dcext.from_pretrained(checkpoints["zstd"])
    plan = plan_with(model, every_tier(model))
    object.__setattr__(plan.layers[3], "tier", tier)
    tiers = [weight.tier for weight in weights_of(model)]
    with pytest.raises(ValueError, match=message):
        dcext.apply(model, plan)
    assert [weight.tier for weight in weights_of(model)] == tiers


def test_files_that_are_no_plans(checkpoints, tmp_path):
    model = dcext.from_pretrained(checkpoints["zstd"])
    path = tmp_path / "plan.json"
    plan_with(model, every_tier(model)).save(path)
    good = json.loads(path.read_text())
    for change, message in [
        ({"format_version": 9}, "format_version: expected 1, found 9"),
        ({"layers": [{"name": "a"}]}, "expected the fields of a plan"),
        ({"layers": [good["layers"][0]] * 2}, "expected each once"),
        ({"more": 1}, "expected the fields of a plan"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(FormatError, match=message):
            load_plan(path)


def test_layers_move_while_the_model_runs(checkpoints):
    model = dcext.from_pretrained(checkpoints["zstd"])
    before = logits(model)
    plans = [
        plan_with(model, every_tier(model)),
        plan_with(model, dict.fromkeys(every_tier(model), Tier.parse("memory/raw"))),
    ]
    dcext.apply(model, plans[0])
    stop, wrong, ran = threading.Event(), [], []

    def run() -> None:
        while not stop.is_set():
            ran.append(1)
            if not torch.equal(logits(model), before):
                wrong.append(len(ran))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(12):
        dcext.apply(model, plans[turn % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert ran
    assert not wrong


def test_damage_leaves_a_model_that_computes_the_same(checkpoints, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints["zstd"], folder)
    model = dcext.from_pretrained(folder)
    before = logits(model)
    dcext.apply(model, plan_with(model, every_tier(model)))
    weight = next(w for w in weights_of(model) if w.module.is_in_file)
    info = weight.origin.reader.info(weight.origin.name)
    path = folder / info.file
    good, times = path.read_bytes(), path.stat()
    bad = bytearray(good)
    bad[info.offset + info.nbytes // 2] ^= 1
    path.write_bytes(bad)
    plan = plan_with(
        dcext.from_pretrained(checkpoints["zstd"]),
        dict.fromkeys(every_tier(model), Tier.parse("memory/raw")),
    )
    with pytest.raises(FormatError):
        dcext.apply(model, plan)
    path.write_bytes(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(logits(model), before)
    dcext.apply(model, plan)
    assert torch.equal(logits(model), before)


def test_plans_for_this_machine(checkpoints, machine):
    model = dcext.from_pretrained(checkpoints["zstd"])
    before = {w.name: w.tier for w in weights_of(model)}
    done = []
    plan = dcext.plan(
        model,
        host_memory="30MB",
        mix={1: 10, 16: 1},
        machine=machine,
        progress=lambda what, share: done.append(share),
    )
    assert {w.name: w.tier for w in weights_of(model)} == before
    assert plan.host_nbytes <= 30_000_000
    assert set(plan.tiers) == set(before)
    assert sum(done) == pytest.approx(1)
    assert any("plain INT8 fits" in note for note in plan.notes)
    smaller = dcext.plan(model, slowdown=10.0, machine=machine)
    assert smaller.host_nbytes <= plan.host_nbytes
