"""Models that stream what does not fit from their files: equal bits, bounded memory, errors where they belong."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import dcext
from dcext.compress import compressed_modules
from dcext.nn.compressed import CompressedModule
from dcext.offloading.apply import move_weights
from dcext.offloading.state import LEAST_SLOTS_NBYTES
from dcext.offloading.weights import weights_of
from dcext.policy.tier import Tier
from dcext.sizes import format_nbytes, parse_nbytes
from dcext.weights.host_stream import StreamedWeight

pytest.importorskip("transformers")

from models import grouped_llama

CODECS = ("raw", "zstd", "packed")
# Everything is streamed: room for what is not compressed, and the least to read into.
LEAST = LEAST_SLOTS_NBYTES + 200_000


def model(tie: bool = True) -> nn.Module:
    """Some layers of one piece and, with embedding and ``lm_head``, some of many."""
    return grouped_llama(512, 1536, vocabulary=16384, tie=tie)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of one model, by codec; "untied" has an ``lm_head`` of its own."""
    parent = tmp_path_factory.mktemp("models")
    for name in (*CODECS, "untied"):
        config = dcext.CompressionConfig(recipe="int8", codec=name if name in CODECS else "zstd")
        made = dcext.compress_(model(tie=name != "untied"), config)
        dcext.save_pretrained(made, parent / name, max_shard_nbytes=6_000_000)
    return {name: parent / name for name in (*CODECS, "untied")}


def ids(count: int) -> torch.Tensor:
    return (torch.arange(count) * 997 % 16384)[None]


def logits(model: nn.Module, count: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids(count)).logits


def streamed(folder: Path, host_memory: int | str = LEAST, **options) -> nn.Module:
    return dcext.from_pretrained(folder, host_memory=host_memory, **options)


def disk_modules(model: nn.Module) -> list[CompressedModule]:
    return [m for m in compressed_modules(model).values() if isinstance(m.backing, StreamedWeight)]


@pytest.mark.parametrize("page_cache", [False, True])
@pytest.mark.parametrize("name", [*CODECS, "untied"])
def test_streamed_models_compute_the_same_bits(folders, name, page_cache):
    resident = dcext.from_pretrained(folders[name])
    model = streamed(folders[name], page_cache=page_cache)
    assert set(model.dcext_offload.tiers.values()) == {"disk"}
    for count in (1, 16, 3, 200, 1):
        assert torch.equal(logits(model, count), logits(resident, count))
    statistics = model.dcext_offload.statistics()
    assert statistics.peak_nbytes <= statistics.slots_nbytes <= LEAST
    assert statistics.page_cache == ("used" if page_cache else "bypassed")


def test_more_tokens_than_one_pass_takes(folders):
    layer = dcext.from_pretrained(folders["zstd"]).model.layers[0].mlp.up_proj
    same = streamed(folders["zstd"]).model.layers[0].mlp.up_proj
    x = torch.randn(4500, 512)
    assert torch.equal(same(x), layer(x))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_budget_is_used_and_never_passed(folders, share):
    folder = folders["untied"]
    resident = dcext.from_pretrained(folder)
    payloads = sum(m.payload.nbytes for m in compressed_modules(resident).values())
    budget = int(LEAST + share * payloads)
    model = streamed(folder, budget)
    offload = model.dcext_offload
    assert offload.memory_nbytes <= budget
    assert torch.equal(logits(model, 5), logits(resident, 5))
    # What is only looked up leaves memory first.
    assert share > 0.5 or offload.tiers["model.embed_tokens"] == "disk"
    assert sum(offload.nbytes.values()) == payloads
    largest = max(offload.nbytes.values())
    if share not in (0.0, 1.0):
        assert offload.memory_nbytes > budget - largest


def test_everything_in_memory_needs_no_stream(folders):
    model = streamed(folders["zstd"], "1GiB")
    assert model.dcext_offload.stream is None
    assert model.dcext_offload.statistics() is None
    assert "all 15 weights in memory" in str(model.dcext_offload)
    assert not disk_modules(model)


def test_a_loaded_model_is_offloaded_and_brought_back(folders):
    model = dcext.from_pretrained(folders["packed"])
    expected = logits(model, 7)
    for budget in (LEAST, "14MB", "1GB", LEAST):
        result = dcext.offload(model, host_memory=budget)
        assert result is model.dcext_offload
        assert torch.equal(logits(model, 7), expected)
    assert len(disk_modules(model)) == 16
    assert "disk/packed" in repr(model.lm_head)


def test_too_small_a_budget_says_by_how_much(folders):
    with pytest.raises(ValueError, match=r"host_memory: expected at least \d+ bytes .*; got 1000"):
        streamed(folders["zstd"], 1000)
    model = dcext.from_pretrained(folders["zstd"])
    expected = logits(model, 3)
    with pytest.raises(ValueError, match="host_memory: expected at least"):
        dcext.offload(model, host_memory=LEAST_SLOTS_NBYTES)
    assert torch.equal(logits(model, 3), expected)


def test_a_model_that_is_in_no_file_is_refused():
    made = dcext.compress_(model(), dcext.CompressionConfig(recipe="int8", codec="raw"))
    with pytest.raises(ValueError, match="expected a payload from a checkpoint"):
        dcext.offload(made, host_memory="1GiB")
    with pytest.raises(ValueError, match="expected compressed layers, found none"):
        dcext.offload(nn.Linear(2, 2), host_memory="1GiB")


def test_budgets_are_for_the_devices_that_there_are(folders):
    with pytest.raises(ValueError, match="device_memory: expected a size beside host_memory"):
        dcext.from_pretrained(folders["raw"], device="cuda", host_memory="1GiB")
    with pytest.raises(ValueError, match="device_memory: expected None with device 'cpu'"):
        dcext.from_pretrained(folders["raw"], device_memory="1GiB")
    with pytest.raises(ValueError, match="expected host_memory or device_memory, got neither"):
        dcext.offload(dcext.from_pretrained(folders["raw"]))


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    shutil.copytree(folders["zstd"], tmp_path / "copy")
    return tmp_path / "copy"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_file_that_shrinks_is_an_error_and_not_a_crash(copied):
    model = streamed(copied)
    logits(model, 2)
    for path in shards(copied):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(dcext.FormatError, match=r"layer '.*' in .*safetensors: file changed"):
        logits(model, 2)


def test_a_file_that_is_written_to_is_an_error(copied):
    model = streamed(copied)
    logits(model, 2)
    for path in shards(copied):
        with path.open("r+b") as file:
            file.seek(-10_000, os.SEEK_END)
            file.write(b"x")
    with pytest.raises(dcext.FormatError, match="file changed: time of modification"):
        logits(model, 2)


def test_damage_is_found_in_the_layer_that_needs_the_data(copied):
    info = streamed(copied).model.layers[1].mlp.down_proj.origin
    where = info.reader.info(info.name)
    with (copied / where.file).open("r+b") as file:
        file.seek(where.offset + where.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    model = streamed(copied)  # layers are not read yet
    place = r"layer 'model.layers.1.mlp.down_proj' in .*: checksum mismatch in chunk"
    for _ in range(2):
        with pytest.raises(dcext.FormatError, match=place):
            logits(model, 2)
    x = torch.randn(3, 512)
    resident = dcext.from_pretrained  # refuses to load it at all
    with pytest.raises(dcext.FormatError, match="down_proj"):
        resident(copied)
    assert model.model.layers[1].mlp.up_proj(x).isfinite().all()


def test_a_missing_file_is_an_error(copied):
    model = dcext.from_pretrained(copied)
    for path in shards(copied):
        path.unlink()
    with pytest.raises(RuntimeError, match="read error: No such file"):
        dcext.offload(model, host_memory=LEAST)


def test_a_file_that_is_replaced_is_read_to_its_end(copied, folders):
    model = streamed(copied)
    expected = logits(model, 4)
    shutil.rmtree(copied)
    shutil.copytree(folders["raw"], copied)
    assert torch.equal(logits(model, 4), expected)


def test_closed_streams_say_so(folders):
    model = streamed(folders["zstd"])
    model.dcext_offload.stream.close()
    with pytest.raises(RuntimeError, match="closed: expected a stream that is open"):
        logits(model, 1)
    dcext.offload(model, host_memory="1GiB")
    assert torch.equal(logits(model, 1), logits(dcext.from_pretrained(folders["zstd"]), 1))


def test_threads_share_a_stream(folders):
    resident = dcext.from_pretrained(folders["zstd"])
    model = streamed(folders["zstd"])
    counts = (1, 4, 9, 2)
    expected = {count: logits(resident, count) for count in counts}
    wrong: list[int] = []

    def work(count: int) -> None:
        for _ in range(5):
            if not torch.equal(logits(model, count), expected[count]):
                wrong.append(count)

    threads = [threading.Thread(target=work, args=(count,)) for count in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_running_model_is_offloaded_again(folders):
    model = dcext.from_pretrained(folders["zstd"])
    expected = logits(model, 3)
    done = threading.Event()
    results: list[bool] = []

    def work() -> None:
        while not done.is_set():
            results.append(torch.equal(logits(model, 3), expected))

    thread = threading.Thread(target=work)
    thread.start()
    for budget in (LEAST, "1GiB", "14MB", LEAST, "1GiB") * 3:
        dcext.offload(model, host_memory=budget)
    done.set()
    thread.join()
    assert results
    assert all(results)


def test_layers_in_another_order(folders):
    resident = dict(compressed_modules(dcext.from_pretrained(folders["raw"])))
    model = streamed(folders["raw"])
    modules = compressed_modules(model)
    linear = [name for name, module in modules.items() if isinstance(module, dcext.DCLinear)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for index in torch.randperm(len(linear), generator=generator).tolist():
            x = torch.randn(2, modules[linear[index]].in_features, generator=generator)
            assert torch.equal(modules[linear[index]](x), resident[linear[index]](x))


def test_generation_and_the_learnt_order(folders):
    model = streamed(folders["packed"])
    prompt = ids(6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    same = dcext.from_pretrained(folders["packed"])
    assert torch.equal(model.generate(prompt, **options), same.generate(prompt, **options))
    before = model.dcext_offload.statistics()
    model.generate(prompt, **options)
    after = model.dcext_offload.statistics()
    # Only look-ups, which are not foreseen, take a slot of what was.
    assert after.dropped_nbytes - before.dropped_nbytes < 0.05 * (
        after.used_nbytes - before.used_nbytes
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="requires two processors")
def test_reads_keep_off_the_processor_that_runs_a_model_which_never_waits(folders):
    every = os.sched_getaffinity(0)
    model = dcext.from_pretrained(folders["zstd"])
    weights = weights_of(model)
    few = {weight.name: Tier.parse("disk/zstd") for weight in weights if "down_proj" in weight.name}
    tiers = {weight.name: weight.tier for weight in weights} | few
    stream = move_weights(model, weights, tiers, LEAST).stream

    def readers() -> dict[int, set[int]]:
        """Threads that do not run where all may, and where they do."""
        threads = {int(name) for name in os.listdir("/proc/self/task")} - {
            threading.get_native_id()
        }
        return {t: cpus for t in threads if (cpus := os.sched_getaffinity(t)) != every}

    try:
        for cpu in sorted(every)[:2]:
            os.sched_setaffinity(0, {cpu})
            deadline = time.monotonic() + 60  # others may slow the disk down
            while every - {cpu} not in readers().values() and time.monotonic() < deadline:
                logits(model, 200)
            assert 1 <= len(readers()) <= 4
            assert every - {cpu} in readers().values()
        # Whoever confines them is obeyed, but in the moment in which they confine themselves: they must be idle.
        for _ in range(3):  # each of them is woken, and does now what it was told before
            logits(model, 200)
        before = -1.0
        while (now := stream.statistics().reading_s) > before:
            before = now
            time.sleep(0.5)
        for thread in readers():
            os.sched_setaffinity(thread, {cpu})
        confined = set(readers())
        logits(model, 1)
        assert all(os.sched_getaffinity(thread) == {cpu} for thread in confined)
    finally:
        os.sched_setaffinity(0, every)
        for thread in readers():
            os.sched_setaffinity(thread, every)


def test_reading_without_computing(folders):
    model = streamed(folders["zstd"])
    stream = model.dcext_offload.stream
    assert stream.read_all() > 0
    statistics = stream.statistics()
    assert statistics.used_nbytes >= 0.99 * model.dcext_offload.streamed_nbytes
    expected = logits(dcext.from_pretrained(folders["zstd"]), 2)
    assert torch.equal(logits(model, 2), expected)


def test_compiled_models_stream(folders):
    layer = streamed(folders["zstd"]).model.layers[0].mlp
    same = dcext.from_pretrained(folders["zstd"]).model.layers[0].mlp
    x = torch.randn(1, 3, 512)
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            assert torch.equal(compiled(x), same(x))


def test_operators_keep_their_contract(folders):
    model = streamed(folders["zstd"])
    layer, embedding = model.model.layers[0].mlp.up_proj, model.model.embed_tokens
    weight = layer.backing
    x = torch.randn(3, 512)
    arguments = (x, weight.handle, weight.unit, layer.row_scale, layer.col_scale, None, "int8")
    torch.library.opcheck(torch.ops.dcext.linear_streamed.default, arguments)
    weight = embedding.backing
    rows = (ids(4), weight.handle, weight.unit, embedding.row_scale, None, 512, torch.float32)
    torch.library.opcheck(torch.ops.dcext.embedding_streamed.default, rows)
    with pytest.raises(ValueError, match=r"stream: expected the handle of one that lives, got -1"):
        torch.ops.dcext.linear_streamed(x, -1, 0, layer.row_scale, None, None, "int8")
    with pytest.raises(ValueError, match=r"unit: expected one in \[0, 15\), got 15"):
        torch.ops.dcext.linear_streamed(x, weight.handle, 15, layer.row_scale, None, None, "int8")


def test_copies_casts_and_state_dicts(folders, tmp_path):
    model = streamed(folders["zstd"])
    expected = logits(model, 3)
    same = copy.deepcopy(model)
    assert same.dcext_offload is None
    assert not disk_modules(same)
    assert same.lm_head.payload is same.model.embed_tokens.payload
    assert torch.equal(logits(same, 3), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), 3), expected)
    resident = dcext.from_pretrained(folders["zstd"])
    half = resident.to(torch.bfloat16)
    assert torch.equal(logits(copy.deepcopy(model).to(torch.bfloat16), 3), logits(half, 3))
    dcext.save_pretrained(model, tmp_path / "again")
    assert torch.equal(logits(dcext.from_pretrained(tmp_path / "again"), 3), expected)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(
        layer.decode_qweight(), resident.model.layers[0].mlp.up_proj.decode_qweight()
    )
    layer.load_state_dict(layer.state_dict())  # comes to rest in memory
    assert layer.backing is None
    assert layer.origin is None
    assert torch.equal(logits(model, 3), expected)


def test_a_child_process_is_told(folders):
    model = streamed(folders["raw"])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            logits(model, 1)
            message = "no error"
        except RuntimeError as error:
            message = str(error)
        os.write(write, message.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert b"expected the process that made the stream" in os.read(read, 10_000)


def test_a_deleted_model_frees_its_memory(folders):
    for _ in range(20):
        model = streamed(folders["raw"])
        logits(model, 1)
        del model
    # Threads are shared by all streams, those that are gone included.
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(0, 0), (123, 123), ("8GiB", 8 << 30), ("1.5 kb", 1500), ("500MB", 5 * 10**8), ("7", 7)],
)
def test_sizes(size, nbytes):
    assert parse_nbytes("size", size) == nbytes


@pytest.mark.parametrize("size", ["", "8 XB", "-1", -1, 1.5, True, "GiB", None])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="size: expected bytes or a size such as"):
        parse_nbytes("size", size)


def test_sizes_to_read():
    assert [format_nbytes(n) for n in (0, 1023, 1536, 10 << 20, 1 << 50)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "10.0 MiB",
        "1024 TiB",
    ]


def test_files_that_were_copied_take_no_memory(folders):
    model = dcext.from_pretrained(folders["raw"])
    origin = model.lm_head.origin
    mapped = Path("/proc/self/smaps").read_text().split("\n\n")[0]
    resident = 0
    for entry in mapped.split("VmFlags:"):
        if str(folders["raw"]) in entry:
            resident += int(entry.split("Rss:")[1].split()[0])
    assert 1024 * resident < 0.5 * origin.nbytes
    assert torch.equal(origin.view(), model.lm_head.payload)  # read again
