"""Plans for a machine with a device, applied: the bits of the model in memory, and no more memory than planned."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("transformers")

import dcext
from dcext.nn.placement import compressed_blocks
from dcext.offloading.device import place_on_device
from dcext.offloading.prefetched_block import PrefetchedBlock
from dcext.offloading.weights import all_weights, weights_of
from dcext.policy.decide import Budget, BudgetError, Decider, device_reserves
from dcext.policy.machine import PROJECTED, Machine, Processor
from dcext.policy.plan import Plan
from dcext.policy.predict import Predictor, Unit
from dcext.policy.tier import HOST_DECODE, Tier
from dcext.profiling import measure, measure_device
from dcext.profiling.observe import describe
from models import tiny_llama
from triton_modes import DEVICE, on_device, requires_interpreter, run_in_interpreter

GPU = Machine(
    name="a GPU",
    kind=PROJECTED,
    host={8: Processor(60.0, 3.0, {"zstd": 20.0})},
    disk_gbps=3.0,
    device=Processor(900.0, 250.0, {"zstd": 300.0}, scratch=("zstd",)),
    link_gbps=25.0,
)
SLOTS_NBYTES = 1 << 20
TIERS = (
    Tier.parse("device/raw"),
    Tier.parse("host/zstd"),
    Tier.parse("device/packed"),
    Tier.parse("disk/zstd"),
    Tier.parse("host/packed"),
    Tier.parse("device/zstd"),
    HOST_DECODE,
    Tier.parse("host/raw"),
)


@requires_interpreter
def test_this_file_in_the_interpreter():
    assert run_in_interpreter(__file__) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = tiny_llama(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        attention_bias=False,
    )
    dcext.compress_(model, dcext.CompressionConfig(recipe="int8", codec="zstd"))
    path = tmp_path_factory.mktemp("model") / "zstd"
    dcext.save_pretrained(model, path)
    return path


@pytest.fixture(scope="module")
def expected(folder) -> torch.Tensor:
    resident = dcext.from_pretrained(folder)
    return logits(resident.to("cuda") if DEVICE == "cuda" else resident)


def logits(model: nn.Module) -> torch.Tensor:
    device = next(model.buffers()).device
    with torch.inference_mode():
        return model(torch.arange(2, device=device)[None]).logits.cpu()


def decider_of(model: nn.Module) -> Decider:
    units = describe(model, weights_of(model))
    return Decider(Predictor(GPU, slots_nbytes=SLOTS_NBYTES), units, {1: 1.0}, 0)


def in_turns(model: nn.Module, tiers: tuple[Tier, ...], outside: Tier) -> dict[str, Tier]:
    """Tiers of layers in blocks, in turns; one for what lies outside."""
    blocks = tuple(f"{name}." for name in compressed_blocks(model))
    names = [weight.name for weight in all_weights(model)]
    inside = [name for name in names if name.startswith(blocks)]
    turns = {name: tiers[i % len(tiers)] for i, name in enumerate(inside)}
    return {name: turns.get(name, outside) for name in names}


def plan_of(decider: Decider, tiers: dict[str, Tier]) -> Plan:
    return decider.plan(tiers, Budget(None, None, slots=SLOTS_NBYTES), "a test")


@on_device
def test_every_tier_at_once_and_then_others(folder, expected):
    """Blocks in which some layers rest and others travel; a second plan finds the model on the device."""
    model = dcext.from_pretrained(folder)
    decider = decider_of(model)
    others = sum(b.nbytes for n, b in model.named_buffers() if "payload" not in n)
    others += sum(p.nbytes for p in model.parameters())
    done: list[int] = []
    for tiers, outside in [
        (TIERS, Tier.parse("device/zstd")),
        (TIERS[3:] + TIERS[:3], Tier.parse("device/packed")),
        ((Tier.parse("device/packed"), Tier.parse("device/zstd")), Tier.parse("device/raw")),
        ((Tier.parse("host/zstd"), Tier.parse("device/zstd")), Tier.parse("device/raw")),
    ]:
        chosen = in_turns(model, tiers, outside)
        plan = plan_of(decider, chosen)
        offload = dcext.apply(model, plan, device=DEVICE, progress=done.append)
        assert offload is model.dcext_offload
        assert {n: f"{t}/" for n, t in offload.tiers.items()} == {
            name: f"{tier.place}/" for name, tier in chosen.items()
        }
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        assert offload.device_nbytes <= plan.device_nbytes + others
        assert sum(done) == sum(w.module.num_weights for w in all_weights(model))
        done.clear()
    assert offload.device_stream.disk is None
    assert offload.statistics().hits > 0


@on_device
def test_layers_that_stay_are_not_made_again(folder, expected):
    model = dcext.from_pretrained(folder)
    decider = decider_of(model)
    rested = in_turns(model, (Tier.parse("device/packed"),), Tier.parse("device/raw"))
    dcext.apply(model, plan_of(decider, rested), device=DEVICE)
    before = {w.name: id(w.module.backing) for w in all_weights(model)}
    changed = next(name for name in rested if "layers.1" in name)
    plan = plan_of(decider, rested | {changed: Tier.parse("host/packed")})
    with torch.inference_mode():
        assert dcext.apply(model, plan, device=DEVICE).device_stream is not None
    after = {w.name: id(w.module.backing) for w in all_weights(model)}
    assert [name for name in after if after[name] != before[name]] == [changed]
    with torch.no_grad():  # slots were not made in inference mode
        found = model(torch.arange(2, device=DEVICE)[None]).logits.cpu()
    assert torch.equal(found, expected)
    assert "host/packed" in repr(model.get_submodule(changed))


@on_device
def test_payloads_that_are_in_no_file_come_from_the_device(folder, expected):
    model = dcext.from_pretrained(folder)
    decider = decider_of(model)
    for weight in all_weights(model):
        for module in weight.modules:
            module.origin = None
    for codec in ("packed", "zstd"):
        plan = plan_of(decider, in_turns(model, (Tier("device", codec),), Tier.parse("device/raw")))
        dcext.apply(model, plan, device=DEVICE)
        assert torch.equal(logits(model), expected)
    plan = plan_of(decider, in_turns(model, (Tier.parse("host/zstd"),), Tier.parse("device/raw")))
    with pytest.raises(ValueError, match="expected a payload from a checkpoint"):
        dcext.apply(model, plan, device=DEVICE)


@on_device
def test_what_fails_is_mended_by_the_next_plan(folder, expected, monkeypatch):
    from dcext.weights.origin import Origin

    model = dcext.from_pretrained(folder)
    decider = decider_of(model)
    dcext.apply(
        model, plan_of(decider, in_turns(model, TIERS, Tier.parse("device/raw"))), device=DEVICE
    )
    plan = plan_of(decider, in_turns(model, TIERS[::-1], Tier.parse("device/raw")))

    def damaged(self: Origin, progress: object = None) -> torch.Tensor:
        raise dcext.FormatError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(Origin, "load", damaged)
        with pytest.raises(dcext.FormatError, match="damaged"):
            dcext.apply(model, plan, device=DEVICE)
    dcext.apply(model, plan, device=DEVICE)
    assert torch.equal(logits(model), expected)


def test_tiers_that_cannot_be(folder):
    model = dcext.from_pretrained(folder)
    decider = decider_of(model)
    good = in_turns(model, TIERS, Tier.parse("device/raw"))
    outside, inside = next(iter(good)), next(name for name in good if "layers.1" in name)
    for name, tier, message in [
        (outside, Tier.parse("host/zstd"), "expected device/CODEC outside of decoder blocks"),
        (
            inside,
            Tier.parse("disk/packed"),
            "expected codec 'packed' in the model's file, found 'zstd'",
        ),
        (inside, Tier.parse("device/gzip"), "as the model runs on a device, found 'device/gzip'"),
        (inside, Tier.parse("host/packed, decoded there"), "found 'host/packed, decoded there'"),
        (inside, Tier.parse("memory/raw"), "as the model runs on the CPU"),
    ]:
        plan = plan_of(decider, good)
        layer = next(layer for layer in plan.layers if layer.name == name)
        object.__setattr__(layer, "tier", tier)
        with pytest.raises(ValueError, match=message):
            dcext.apply(model, plan, device="cpu")
    plan = plan_of(decider, good)
    del plan.layers[2]
    with pytest.raises(ValueError, match="expected a tier of every layer"):
        dcext.apply(model, plan, device="cpu")


def test_a_missing_gpu_is_an_error(folder):
    if torch.cuda.is_available():
        pytest.skip("requires a machine without GPU")
    model = dcext.from_pretrained(folder)
    plan = plan_of(decider_of(model), in_turns(model, TIERS, Tier.parse("device/raw")))
    with pytest.raises(RuntimeError, match="apply: device: expected a GPU for a plan for one"):
        dcext.apply(model, plan)
    with pytest.raises(RuntimeError, match="expected a GPU for a plan for one"):
        dcext.from_pretrained(folder, plan=plan, device="cuda")
    with pytest.raises(ValueError, match="expected a device beside a plan for one, got 'cpu'"):
        dcext.from_pretrained(folder, plan=plan)


def test_a_build_without_cuda_is_an_error_before_anything_moves(folder, monkeypatch):
    monkeypatch.setattr("dcext._C.with_cuda", False)
    model = dcext.from_pretrained(folder)
    tiers = in_turns(model, TIERS, Tier.parse("device/raw"))
    with pytest.raises(RuntimeError, match="expected a build with DCEXT_CUDA=1"):
        place_on_device(model, tiers, torch.device("cuda"), 0, read=print, moved=print)
    assert all(weight.module.backing is None for weight in weights_of(model))


@on_device
@pytest.mark.parametrize("tier", [Tier.parse("host/zstd"), Tier.parse("host/packed")])
def test_what_travels_is_in_host_memory_once(folder, tier):
    """Beside the copy that travels, neither payload nor index stays."""
    made: list[weakref.ref[torch.Tensor]] = []
    model = dcext.from_pretrained(folder)
    plan = plan_of(decider_of(model), in_turns(model, (tier,), Tier.parse("device/raw")))
    with pytest.MonkeyPatch.context() as patch:
        add = PrefetchedBlock._add

        def noted(self, layer, codec, parts, rebuild):
            made.extend(weakref.ref(part) for part in parts)
            return add(self, layer, codec, parts, rebuild)

        patch.setattr(PrefetchedBlock, "_add", noted)
        dcext.apply(model, plan, device=DEVICE)
    gc.collect()
    assert made
    assert not [ref for ref in made if ref() is not None]


def test_plans_for_a_device_keep_to_its_memory(folder):
    model = dcext.from_pretrained(folder)
    int8 = sum(weight.module.num_weights for weight in weights_of(model))
    plan = dcext.plan(model, device_memory=3 * int8, machine=GPU)
    assert plan.on_device
    assert plan.device_nbytes <= 3 * int8
    with pytest.raises(BudgetError, match="expected room for the smallest tiers"):
        dcext.plan(model, device_memory=1000, machine=GPU)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="tune: device: expected a GPU"):
            dcext.plan(model, device_memory=3 * int8)


def test_room_on_the_device_follows_the_tiers():
    """Two slots for what travels, the largest block; and a block's matrices where some are decoded."""
    units = [
        Unit(f"{i}", (10, 100), 1, 0, {"raw": 1000, "packed": 600, "zstd": 500}, block=block)
        for i, block in enumerate(["a", "a", "b", None])
    ]
    found = {(room.arrives, room.decodes): room.nbytes for room in device_reserves(units)}
    assert found == {
        ((), False): 0,
        ((), True): 2000,
        (("packed",), False): 2 * 1200,
        (("packed",), True): 2 * 1200 + 2000,
        (("zstd",), True): 2 * 1000 + 2000,
        (("packed", "zstd"), True): 2 * 1200 + 2000,
        (("packed", "zstd", "raw"), False): 2 * 2000,
        (("packed", "zstd", "raw"), True): 2 * 2000 + 2000,
    }


@on_device
def test_what_is_measured_of_a_device(monkeypatch):
    for name, value in {
        "SHAPE": (32, 48),
        "TOKENS": (1, 2),
        "LAYERS": 2,
        "READ_NBYTES": 1 << 16,
        "COPY_NBYTES": 1 << 16,
    }.items():
        monkeypatch.setattr(measure_device, name, value)
    monkeypatch.setattr("dcext.profiling.timing.REPEATS", (1, 1))
    device = torch.device(DEVICE)
    measured, link_gbps, spread = measure_device.measure_device(measure.drawn_weights, device, 1e-3)
    assert set(measured.layer_s) == {"raw", "packed", "zstd"}
    assert all(s > 0 for table in measured.layer_s.values() for s in table.values())
    assert measured.decode_gweights["zstd"] > 0
    assert measured.scratch == ("zstd",)
    assert link_gbps > 0
    assert set(spread) >= {"memory_gbps", "link_gbps", "decode_gweights.zstd", "layer_s.raw"}


def test_figures_of_a_device_are_kept_beside_those_of_the_cpu(monkeypatch, tmp_path):
    assert GPU.device is not None
    taken: list[str] = []

    def of_host(folder: Path, identity: dict, progress: object) -> Machine:
        taken.append("host")
        return replace(GPU, device=None, link_gbps=None, identity=identity)

    def of_device(*args: object) -> tuple[Processor | None, float, dict[str, float]]:
        taken.append("device")
        return GPU.device, 25.0, {"link_gbps": 0.1, "memory_gbps": 0.2}

    monkeypatch.setenv("DCEXT_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "_measure", of_host)
    monkeypatch.setattr(measure, "measure_device", of_device)
    shares: list[float] = []
    machine = measure.tune(device="cpu", progress=lambda what, share: shares.append(share))
    assert machine.device == GPU.device
    assert machine.identity["device"] == "cpu"
    assert machine.uncertainty["device.memory_gbps"] == 0.2
    assert measure.tune(device="cpu") == machine
    assert measure.tune().device is None
    assert taken == ["host", "device"]
    # Times that were taken on the CPU say nothing of a device.
    monkeypatch.setattr("dcext.planning.plan.DEVICE", "cpu")
    model = nn.Sequential(dcext.DCLinear.from_float(nn.Linear(8, 8)))
    plan = dcext.plan(model, device_memory="1MB")
    assert plan.on_device
    assert plan.host_memory is not None
    assert [each.other_s for each in plan.passes] == [0.0]
