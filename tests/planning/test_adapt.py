"""What is observed of a model that runs, and plans that follow as conditions change."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import dcext
from dcext.compress import compressed_modules
from dcext.offloading.state import LEAST_SLOTS_NBYTES, offload_of
from dcext.offloading.weights import weights_of
from dcext.planning.adapt import COOLDOWN, SETTLING_PASSES, Adapter, Drift
from dcext.policy.predict import Observed, ObservedDisk
from dcext.profiling.observe import forward_of
from dcext.profiling.observe_disk import PassSample, Streaming, StreamMeter
from dcext.profiling.study import Study, _disk_of
from policy_cases import CPU, GPU, LEAST, drawn_units, every_tier, logits, plan_with, study_of


def test_observing_leaves_the_model_as_it_was(checkpoints, machine, monkeypatch):
    from dcext.profiling import observe, observe_disk
    from dcext.profiling import study as studying

    monkeypatch.setattr(observe, "SECONDS_OF_A_LENGTH", 0.01)
    monkeypatch.setattr(observe_disk, "STREAMING_S", 0.01)
    monkeypatch.setattr(studying, "tune", lambda: machine)
    model = dcext.from_pretrained(checkpoints["packed"])
    payloads = {name: m.payload.data_ptr() for name, m in compressed_modules(model).items()}
    studied = studying.study(model, (1, 8))
    after = {name: m.payload.data_ptr() for name, m in compressed_modules(model).items()}
    assert after == payloads
    kinds = {unit.kind for unit in studied.units}
    for codec in ("raw", "packed", "zstd"):
        assert {kind for kind, name in studied.observed.layer_s if name == codec} == kinds
    assert set(studied.observed.other_s) == {1, 8}
    assert all(disk.gbps > 0 for disk in studied.observed.disk.values())
    assert len(studied.observed.disk) == 2
    on_disk = dcext.from_pretrained(checkpoints["packed"], host_memory=LEAST)
    tiers = [weight.tier for weight in weights_of(on_disk)]
    studying.study(on_disk, (1,))
    assert [weight.tier for weight in weights_of(on_disk)] == tiers


def test_the_plan_follows_the_machine(checkpoints, machine):
    """Passes that take another time than predicted lead to another look; outputs stay the same bits."""
    model = dcext.from_pretrained(checkpoints["zstd"])
    before = logits(model)
    study = study_of(model, machine)
    study.observed.other_s = {5: 10.0}  # all will be a thousand times faster than believed
    adapter = Adapter(model, study, {"host_memory": "24MB", "mix": {5: 1.0}})
    for _ in range(20):
        assert torch.equal(logits(model), before)
    assert "times as long as predicted" in adapter.replans[0].reason
    looked = len(adapter.replans)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        for _ in range(24):
            assert torch.equal(logits(model), before)
        reasons = [look.reason for look in adapter.replans[looked:]]
        assert any(f"{threads + 1} threads instead of {threads}" in reason for reason in reasons)
    finally:
        torch.set_num_threads(threads)
    adapter.stop()
    passes = adapter.passes
    logits(model)
    assert adapter.passes == passes


def test_adapting_is_for_the_cpu(checkpoints):
    with pytest.raises(ValueError, match="machine: expected one without a device, got 'a GPU'"):
        dcext.adapt(dcext.from_pretrained(checkpoints["zstd"]), machine=GPU)


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
        some = PassSample(plain_s + longer_s + waited_s + reads * read_s, waited_s)
        rounds.append((PassSample(plain_s), some, PassSample(1.0, 0.3, 1.7e9, 1.0)))
    names = [unit.name for unit in few]
    found = _disk_of(study, slots, 1, codecs, Streaming(names, rounds))
    assert found.read_s == pytest.approx(read_s)
    assert found.gbps == pytest.approx(1.7)
    calm = [(plain, some, PassSample(1.0, 0.01, 1.2e9, 1.0)) for plain, some, _ in rounds]
    assert _disk_of(study, slots, 1, codecs, Streaming(names, calm)).gbps == 2.0


def test_what_a_stream_did_is_told_from_pass_to_pass(checkpoints):
    model = dcext.from_pretrained(checkpoints["zstd"])
    meter = StreamMeter(model)
    logits(model)
    assert meter.see(1.0) == PassSample(1.0)
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


def test_the_rate_of_the_disk_is_that_of_its_reads(checkpoints, machine):
    model = dcext.from_pretrained(checkpoints["zstd"])
    study = study_of(model, machine)
    study.observed.disk = {LEAST_SLOTS_NBYTES: ObservedDisk(1000.0, 0.0)}
    adapter = Adapter(model, study, {"host_memory": LEAST, "mix": {5: 1.0}})
    seen = PassSample(1.0, 0.5, 3e8, 0.6)
    assert adapter._with_disk_of(study.observed, seen).disk[LEAST_SLOTS_NBYTES].gbps == 0.5
    assert adapter._with_disk_of(study.observed, PassSample(1.0)) is study.observed
    adapter.stop()


def test_a_disk_that_seems_faster_is_believed_later(checkpoints, machine):
    """While layers were moved nobody read: what a throttle gives after that is not its rate."""
    model = dcext.from_pretrained(checkpoints["zstd"])
    adapter = Adapter(model, study_of(model, machine), {"host_memory": "24MB", "mix": {5: 1.0}})
    adapter.stop()
    adapter._replanned = dict.fromkeys(adapter._replanned, 100)
    slower, faster = Drift(1.4, "slower"), Drift(1.4, "faster", faster=True)
    due = defaultdict(list)
    for adapter.passes in range(100, 120):
        for drift in (slower, faster):
            if adapter._is_due("disk", drift):
                due[drift.reason].append(adapter.passes)
    assert due["slower"][0] == 100 + COOLDOWN
    assert due["faster"][0] == 100 + SETTLING_PASSES
    assert adapter._is_due("compute", faster)
