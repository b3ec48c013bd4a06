"""Plans: nearly the best in small cases, applied while a model runs, and followed as conditions change."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dcext
from dcext.compress import compressed_modules
from dcext.errors import FormatError
from dcext.policy import measure
from dcext.policy.decide import Budget, BudgetError, Decider
from dcext.policy.machine import PROJECTED, Machine, Processor
from dcext.policy.plan import Plan, load_plan
from dcext.policy.predict import Observed, ObservedDisk, Predictor, Unit
from dcext.policy.timeline import SLOTS, anneal, pass_s, slots_of
from dcext.runtime.adapt import REST, SETTLING, Adapter, Drift
from dcext.runtime.host_stream import HostStream
from dcext.runtime.observe import Seen, Streaming, StreamMeter, describe, forward_of
from dcext.runtime.placement import LEAST_SLOTS_NBYTES, offload_of, other_nbytes
from dcext.runtime.planning import Study, _disk_of
from dcext.runtime.retier import plan_of
from dcext.runtime.weights import weights_of

pytest.importorskip("transformers")

from test_compress import grouped_llama

CPU = Machine(
    name="a CPU",
    kind=PROJECTED,
    host={2: Processor(30.0, 0.7, {"zstd": 5.0, "packed": 80.0})},
    disk_gbps=2.0,
    verify_gbps=30.0,
)
GPU = Machine(
    name="a GPU",
    kind=PROJECTED,
    host={8: Processor(60.0, 3.0, {"zstd": 20.0})},
    disk_gbps=3.0,
    verify_gbps=100.0,
    device=Processor(900.0, 250.0, {"zstd": 300.0}, scratch=("zstd",)),
    link_gbps=25.0,
)


# Everything is streamed: room for what is not compressed, and the least to read into.
LEAST = LEAST_SLOTS_NBYTES + 200_000


def drawn_units(draw: np.random.Generator, count: int) -> list[Unit]:
    """Layers of a few sizes, and perhaps an embedding."""
    units = []
    for i in range(count):
        rows, cols = (int(n) for n in draw.choice([256, 1024, 4096, 20000], 2))
        weights = rows * cols
        looked_up = int(i == 0 and draw.random() < 0.3)
        units.append(
            Unit(
                name=f"layer {i}",
                shape=(rows, cols),
                multiplied=1 - looked_up if draw.random() < 0.5 else 1,
                looked_up=looked_up,
                nbytes={
                    "raw": weights + 64,
                    "packed": int(weights * draw.uniform(0.5, 0.8)),
                    "zstd": int(weights * draw.uniform(0.4, 0.6)),
                },
                index_nbytes={"packed": weights >> 6, "zstd": weights >> 8},
                block=None if looked_up or draw.random() < 0.1 else f"block {i % 2}",
                file_codec="zstd",
                panels=max(1, weights >> 17),
            )
        )
    return units


def drawn_case(seed: int, machine: Machine) -> tuple[Decider, Budget]:
    """A model of up to five layers, and a budget that may be too small."""
    draw = np.random.default_rng(seed)
    units = drawn_units(draw, int(draw.integers(1, 6 if machine is CPU else 4)))
    observed = Observed(
        other_s={1: float(draw.exponential(1e-3))}, disk={1 << 20: ObservedDisk(2.0, 2e-5)}
    )
    mix = {1: 1.0} if draw.random() < 0.5 else {1: 100.0, 512: 1.0}
    slots = 1 << 20
    decider = Decider(Predictor(machine, observed=observed, slots_nbytes=slots), units, mix, 1000)
    int8 = sum(unit.nbytes["raw"] for unit in units)
    host = int(draw.uniform(0, 1.2) * int8) + slots
    device = None if machine is CPU else int(draw.uniform(0.2, 1.2) * int8) + 1000
    return decider, Budget(host, device, 1000, slots)


def exhaustive(decider: Decider, budget: Budget) -> float:
    """Seconds of the fastest tiers; infinity where none fit."""
    best = np.inf
    names = [unit.name for unit in decider.units]
    for choice in itertools.product(*decider.tiers):
        tiers = dict(zip(names, choice, strict=True))
        host, device = decider.nbytes(tiers, budget)
        fits = budget.host is None or host <= budget.host
        if fits and (budget.device is None or device <= budget.device):
            best = min(best, decider.mean_s(tiers))
    return best


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(25))
def test_plans_are_nearly_the_best(seed, machine):
    decider, budget = drawn_case(seed, machine)
    best = exhaustive(decider, budget)
    try:
        tiers = decider.within(budget)
    except BudgetError:
        assert best == np.inf
        return
    host, device = decider.nbytes(tiers, budget)
    assert host <= budget.host
    assert budget.device is None or device <= budget.device
    assert decider.mean_s(tiers) <= 1.03 * best


@pytest.mark.parametrize("seed", range(8))
def test_least_memory_within_a_bound_of_time(seed):
    decider, budget = drawn_case(seed, CPU)
    free = Budget(None, None, budget.others, budget.slots)
    bound = 1.2 * decider.mean_s(decider.int8())
    tiers = decider.smallest_within(bound, free)
    assert decider.mean_s(tiers) <= bound
    least = min(
        decider.nbytes(dict(zip((u.name for u in decider.units), choice, strict=True)), free)[0]
        for choice in itertools.product(*decider.tiers)
        if decider.mean_s(dict(zip((u.name for u in decider.units), choice, strict=True))) <= bound
    )
    assert decider.nbytes(tiers, free)[0] <= 1.03 * least


def test_a_budget_that_nothing_fits_says_by_how_much():
    decider, budget = drawn_case(0, CPU)
    least = decider.smallest(Budget(0, None, budget.others, budget.slots))
    with pytest.raises(BudgetError, match=f"expected at least {least} bytes"):
        decider.within(Budget(least - 1, None, budget.others, budget.slots))
    assert decider.within(Budget(least, None, budget.others, budget.slots))


def test_reads_overlap_as_far_as_slots_allow():
    piece, disk = 1 << 20, 2e9
    slots = SLOTS * piece
    even = pass_s([1e-3] * 20, [piece] * 20, disk, slots)
    assert even == pytest.approx(20e-3)  # computing hides the disk
    slow = pass_s([1e-4] * 20, [piece] * 20, disk, slots)
    assert slow == pytest.approx(20 * piece / disk, rel=0.1)  # the disk binds
    # As many bytes in the last layer: slots hold so much of it, the rest is waited for.
    last = pass_s([1e-3] * 19 + [1e-4], [0] * 19 + [40 * piece], disk, slots)
    assert last == pytest.approx(19e-3 + (40 - SLOTS) * piece / disk, rel=0.02)
    assert pass_s([1e-3, 2e-3], [0, 0], disk, slots) == pytest.approx(3e-3)


def test_slots_are_those_of_streams(folders):
    weights = weights_of(dcext.from_pretrained(folders["packed"]))
    origins = {weight.name: weight.origin for weight in weights}
    for nbytes in (1 << 20, 2 << 20, 3_000_000, 4 << 20, 8 << 20, 16 << 20, 100 << 20):
        count, slot_nbytes = slots_of(nbytes)
        slot_nbytes = slot_nbytes // 4096 * 4096
        stream = HostStream(origins, nbytes)
        assert stream.slots_nbytes == nbytes // slot_nbytes * slot_nbytes
        assert count <= nbytes // slot_nbytes
        stream.close()


@pytest.mark.parametrize("seed", range(20))
def test_times_of_passes_are_those_of_the_formula(seed):
    """dcext.policy.timeline's, written out."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 30))
    compute = draw.exponential(1e-3, count)
    read = draw.integers(0, 8 << 20, count) * (draw.random(count) < 0.5)
    slots_nbytes, disk = int(draw.choice([1 << 20, 2 << 20, 16 << 20])), 1e9
    slots, slot_nbytes = slots_of(slots_nbytes)
    pieces = []
    for seconds, nbytes in zip(compute, read, strict=True):
        parts = max(1, -(-int(nbytes) // slot_nbytes))
        pieces += [(seconds / parts, nbytes / parts)] * parts
    used, read_end, ends = 0.0, 0.0, []
    released = [0.0] * slots  # when each of the last pieces that were read was used
    for _ in range(3):
        for seconds, nbytes in pieces:
            if nbytes:
                read_end = max(read_end, released[-slots]) + nbytes / disk
                used = max(used, read_end)
            used += seconds
            if nbytes:
                released.append(used)
        ends.append(used)
    expected = pytest.approx(ends[2] - ends[1])
    assert pass_s(compute, read, disk, slots_nbytes) == expected


@pytest.mark.parametrize("seed", range(20))
def test_annealing_keeps_the_budget_and_is_never_slower(seed):
    draw = np.random.default_rng(seed)
    units, tiers, disk, slots = int(draw.integers(1, 9)), 3, 1e9, 2 << 20
    rows = np.arange(units)
    compute = draw.exponential(1e-3, (units, tiers, 2))
    compute[draw.random((units, tiers)) < 0.2] = np.inf
    compute[:, 2] = draw.exponential(1e-3, (units, 2))  # a tier that all have, on the disk
    memory = draw.integers(1 << 18, 4 << 20, (units, tiers))
    read = memory * [0, 0, 1]
    memory[:, 2] = 0
    weights = np.array([3.0, 1.0])
    budget = int(draw.uniform(0, 1) * memory.max(axis=1).sum())

    def seconds(choice: np.ndarray) -> float:
        taken = [pass_s(compute[rows, choice, w], read[rows, choice], disk, slots) for w in (0, 1)]
        return float(weights @ taken)

    start = np.full(units, 2)
    found = [
        anneal(compute, read, memory, weights, budget, disk, slots, start, steps)
        for steps in (300_000, 300_000, 0)
    ]
    assert (found[0] == found[1]).all()
    assert (found[2] == start).all()
    assert memory[rows, found[0]].sum() <= budget
    every = (np.array(choice) for choice in itertools.product(range(tiers), repeat=units))
    exist = (choice for choice in every if np.isfinite(compute[rows, choice]).all())
    fit = [choice for choice in exist if memory[rows, choice].sum() <= budget]
    assert seconds(found[0]) <= 1.03 * min(map(seconds, fit))
    with pytest.raises(ValueError, match="choice: expected 0 to 2, got 3"):
        anneal(compute, read, memory, weights, budget, disk, slots, start + 1, 1)
    with pytest.raises(ValueError, match="of them, got 3 and"):
        anneal(compute, read, memory, np.ones(3), budget, disk, slots, start, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of one model by codec."""
    parent = tmp_path_factory.mktemp("models")
    for codec in ("zstd", "packed"):
        compressed = dcext.CompressionConfig(recipe="int8", codec=codec)
        made = dcext.compress_(grouped_llama(256, 1024, vocabulary=4096), compressed)
        dcext.save_pretrained(made, parent / codec)
    return {codec: parent / codec for codec in ("zstd", "packed")}


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    """This one, measured in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCEXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measure, "SECONDS_OF_A_FIGURE", 1e-3)
        patch.setattr(measure, "DISK_NBYTES", 32 << 20)
        machine = measure.tune()
        assert measure.tune().to_dict() == machine.to_dict()  # from the cache
        assert measure.tune(refresh=True).identity == machine.identity
    return machine


def study_of(model: nn.Module, machine: Machine) -> Study:
    return Study(describe(model, weights_of(model)), machine, Observed(), 0)


def logits(model: nn.Module, count: int = 5) -> torch.Tensor:
    with torch.inference_mode():
        return model((torch.arange(count) * 97 % 4096)[None]).logits


def every_tier(model: nn.Module) -> dict[str, str]:
    """All tiers that there are, in turns."""
    weights = weights_of(model)
    tiers = ["memory/raw", "memory/packed", "memory/zstd", f"disk/{weights[0].file_codec}"]
    return {weight.name: tiers[i % len(tiers)] for i, weight in enumerate(weights)}


def plan_with(model: nn.Module, tiers: dict[str, str]) -> Plan:
    decider = Decider(Predictor(CPU), describe(model, weights_of(model)), {1: 1.0}, 0)
    return decider.plan(tiers, Budget(None, None, slots=16 << 20), "a test")


def test_what_is_measured_is_plausible(machine):
    for host in machine.host.values():
        assert 1 < host.memory_gbps < 2000
        assert 0.005 < host.int8_tops < 500
        assert all(0.01 < speed < 1e4 for speed in host.decode_gweights.values())
        assert all(seconds > 0 for table in host.layer_s.values() for seconds in table.values())
    assert 0.01 < machine.disk_gbps < 200
    assert all(0 <= spread < 10 for spread in machine.uncertainty.values())


@pytest.mark.parametrize("codec", ["zstd", "packed"])
def test_sizes_are_exact(folders, codec):
    model = dcext.from_pretrained(folders[codec])
    units = describe(model, weights_of(model))
    for unit, weight in zip(units, weights_of(model), strict=True):
        for name in ("raw", "packed", "zstd"):
            assert unit.nbytes[name] == weight.payload(name).nbytes
    assert units[0].looked_up == 1
    assert units[0].multiplied == 1


@pytest.mark.parametrize("codec", ["zstd", "packed"])
def test_every_tier_computes_the_same_bits(folders, codec):
    model = dcext.from_pretrained(folders[codec])
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
    back = plan_with(model, dict.fromkeys(tiers, f"memory/{codec}"))
    assert dcext.apply(model, back).stream is None
    assert torch.equal(logits(model), before)


def test_a_plan_is_a_file_that_can_be_edited(folders, tmp_path):
    model = dcext.from_pretrained(folders["zstd"])
    path = tmp_path / "plan.json"
    plan = plan_with(model, every_tier(model))
    plan.save(path)
    assert load_plan(path) == plan
    edited = json.loads(path.read_text())
    edited["layers"][0]["tier"] = "memory/packed"
    path.write_text(json.dumps(edited))
    loaded = dcext.from_pretrained(folders["zstd"], plan=load_plan(path))
    assert weights_of(loaded)[0].tier == "memory/packed"
    assert torch.equal(logits(loaded), logits(model))
    copied = copy.deepcopy(loaded)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ("memory/gzip", "expected memory/CODEC or disk/CODEC"),
        ("device/raw", "as the model runs on the CPU, found 'device/raw'"),
        ("disk/raw", "expected codec 'raw' in the model's file, found 'zstd'"),
    ],
)
def test_tiers_that_do_not_exist(folders, tier, message):
    model = dcext.from_pretrained(folders["zstd"])
    plan = plan_with(model, every_tier(model))
    object.__setattr__(plan.layers[3], "tier", tier)
    tiers = [weight.tier for weight in weights_of(model)]
    with pytest.raises(ValueError, match=message):
        dcext.apply(model, plan)
    assert [weight.tier for weight in weights_of(model)] == tiers


def test_files_that_are_no_plans(folders, tmp_path):
    model = dcext.from_pretrained(folders["zstd"])
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


def test_layers_move_while_the_model_runs(folders):
    model = dcext.from_pretrained(folders["zstd"])
    before = logits(model)
    plans = [
        plan_with(model, every_tier(model)),
        plan_with(model, dict.fromkeys(every_tier(model), "memory/raw")),
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


def test_damage_leaves_a_model_that_computes_the_same(folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["zstd"], folder)
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
        dcext.from_pretrained(folders["zstd"]), dict.fromkeys(every_tier(model), "memory/raw")
    )
    with pytest.raises(FormatError):
        dcext.apply(model, plan)
    path.write_bytes(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(logits(model), before)
    dcext.apply(model, plan)
    assert torch.equal(logits(model), before)


def test_plans_for_this_machine(folders, machine):
    model = dcext.from_pretrained(folders["zstd"])
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


def test_observing_leaves_the_model_as_it_was(folders, machine, monkeypatch):
    from dcext.runtime import observe, planning

    monkeypatch.setattr(observe, "SECONDS_OF_A_LENGTH", 0.01)
    monkeypatch.setattr(planning, "tune", lambda: machine)
    model = dcext.from_pretrained(folders["packed"])
    payloads = {name: m.payload.data_ptr() for name, m in compressed_modules(model).items()}
    studied = planning.study(model, (1, 8))
    after = {name: m.payload.data_ptr() for name, m in compressed_modules(model).items()}
    assert after == payloads
    kinds = {unit.kind for unit in studied.units}
    for codec in ("raw", "packed", "zstd"):
        assert {kind for kind, name in studied.observed.layer_s if name == codec} == kinds
    assert set(studied.observed.other_s) == {1, 8}
    assert all(disk.gbps > 0 for disk in studied.observed.disk.values())
    assert len(studied.observed.disk) == 2
    on_disk = dcext.from_pretrained(folders["packed"], host_memory=LEAST)
    tiers = [weight.tier for weight in weights_of(on_disk)]
    planning.study(on_disk, (1,))
    assert [weight.tier for weight in weights_of(on_disk)] == tiers


def test_the_plan_follows_the_machine(folders, machine):
    """Passes that take another time than predicted lead to another look; outputs stay the same bits."""
    model = dcext.from_pretrained(folders["zstd"])
    before = logits(model)
    study = study_of(model, machine)
    study.observed.other_s = {5: 10.0}  # all will be a thousand times faster than believed
    adapter = Adapter(model, study, {"host_memory": "24MB", "mix": {5: 1.0}})
    for _ in range(20):
        assert torch.equal(logits(model), before)
    assert "times as long as predicted" in adapter.looks[0].reason
    looked = len(adapter.looks)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        for _ in range(24):
            assert torch.equal(logits(model), before)
        reasons = [look.reason for look in adapter.looks[looked:]]
        assert any(f"{threads + 1} threads instead of {threads}" in reason for reason in reasons)
    finally:
        torch.set_num_threads(threads)
    adapter.stop()
    passes = adapter.passes
    logits(model)
    assert adapter.passes == passes


def test_adapting_is_for_the_cpu(folders):
    with pytest.raises(ValueError, match="machine: expected one without a device, got 'a GPU'"):
        dcext.adapt(dcext.from_pretrained(folders["zstd"]), machine=GPU)


def test_a_model_without_a_vocabulary_needs_to_be_told_how_to_run():
    with pytest.raises(ValueError, match=r"forward: expected a function"):
        forward_of(nn.Linear(2, 2))


def test_what_reads_cost_is_told_apart_from_waiting_decoding_and_the_disk():
    study = Study(drawn_units(np.random.default_rng(1), 8), CPU, Observed(), 0)
    slots, read_s, waited_s = 2 << 20, 40e-6, 3e-3
    study.observed.disk[slots] = ObservedDisk(2.0, 0.0)
    few = [unit for unit in study.units if unit.multiplied and unit.file_codec][::2]
    assert few
    predictor = study.predictor(slots)
    codecs = {unit.name: "raw" for unit in study.units}
    reads = sum(predictor.pieces(unit.nbytes[unit.file_codec]) for unit in few)
    longer_s = sum(
        predictor.compute_s(unit, unit.file_codec, 1)
        - predictor.compute_s(unit, "raw", 1)
        + unit.nbytes[unit.file_codec] / (CPU.verify_gbps * 1e9)
        for unit in few
    )
    rounds = []
    for plain_s in (0.5, 0.8, 0.5):  # whatever speed the machine has meanwhile
        some = Seen(plain_s + longer_s + waited_s + reads * read_s, waited_s)
        rounds.append((Seen(plain_s), some, Seen(1.0, 0.3, 1.7e9, 1.0)))
    names = [unit.name for unit in few]
    found = _disk_of(study, slots, 1, codecs, Streaming(names, rounds))
    assert found.read_s == pytest.approx(read_s)
    assert found.gbps == pytest.approx(1.7)
    calm = [(plain, some, Seen(1.0, 0.01, 1.2e9, 1.0)) for plain, some, _ in rounds]
    assert _disk_of(study, slots, 1, codecs, Streaming(names, calm)).gbps == 2.0


def test_what_a_stream_did_is_told_from_pass_to_pass(folders):
    model = dcext.from_pretrained(folders["zstd"])
    meter = StreamMeter(model)
    logits(model)
    assert meter.see(1.0) == Seen(1.0)
    dcext.apply(model, plan_with(model, every_tier(model)))
    stream = offload_of(model).stream
    before = stream.statistics()
    read = sum(w.nbytes for w in weights_of(model) if w.module.is_in_file and not w.is_looked_up)
    meter = StreamMeter(model)
    for _ in range(4):
        logits(model)
    seen = meter.see(10.0)
    after = stream.statistics()
    assert 4 * read <= before.read_nbytes + seen.read_nbytes
    assert seen.read_nbytes <= after.read_nbytes
    assert 0 < seen.reading_s <= after.reading_s
    assert 0 <= seen.stalled_s <= after.stall_s
    assert seen.disk_gbps == pytest.approx(seen.read_nbytes / seen.reading_s / 1e9)


def test_the_rate_of_the_disk_is_that_of_its_reads(folders, machine):
    """A disk that is believed to be faster than any is known after the next look that waits for it."""
    model = dcext.from_pretrained(folders["zstd"])
    study = study_of(model, machine)
    study.observed.disk = {LEAST_SLOTS_NBYTES: ObservedDisk(1000.0, 0.0)}
    adapter = Adapter(model, study, {"host_memory": LEAST, "mix": {5: 1.0}})
    seen = Seen(1.0, 0.5, 3e8, 0.6)
    assert adapter._with_disk_of(study.observed, seen).disk[LEAST_SLOTS_NBYTES].gbps == 0.5
    assert adapter._with_disk_of(study.observed, Seen(1.0)) is study.observed
    adapter.stop()


def test_a_disk_that_seems_faster_is_believed_later(folders, machine):
    """While layers were moved nobody read: what a throttle gives after that is not its rate."""
    model = dcext.from_pretrained(folders["zstd"])
    adapter = Adapter(model, study_of(model, machine), {"host_memory": "24MB", "mix": {5: 1.0}})
    adapter.stop()
    adapter._looked = dict.fromkeys(adapter._looked, 100)
    slower, faster = Drift(1.4, "slower"), Drift(1.4, "faster", faster=True)
    due = defaultdict(list)
    for adapter.passes in range(100, 120):
        for drift in (slower, faster):
            if adapter._is_due("disk", drift):
                due[drift.reason].append(adapter.passes)
    assert due["slower"][0] == 100 + REST
    assert due["faster"][0] == 100 + SETTLING
    assert adapter._is_due("compute", faster)
