"""The checkpoint folder: written whole or not at all, and every byte of it accounted for."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dcext.errors import FormatError
from dcext.format import CheckpointReader, replace, write_checkpoint
from dcext.format.manifest import canonical_json, dump_manifest
from dcext.format.safetensors_header import DTYPE_NAMES

FILES = {"config.json": b'{"a": 1}\n'}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.row_scale": torch.rand(7, generator=generator),
        "a.payload": torch.randint(0, 255, (6400,), generator=generator, dtype=torch.uint8),
        "b.payload": torch.randint(0, 255, (640,), generator=generator, dtype=torch.uint8),
        "norm.weight": torch.rand(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    write_checkpoint(tmp_path / "m", some_tensors(), FILES)
    return tmp_path / "m"


@pytest.mark.parametrize("max_shard_nbytes", [5_000_000_000, 1000])
def test_round_trip_and_stock_safetensors(tmp_path, max_shard_nbytes):
    tensors, target = some_tensors(), tmp_path / "deep" / "m"
    write_checkpoint(target, tensors, FILES, max_shard_nbytes=max_shard_nbytes)
    reader = CheckpointReader(target)
    reader.verify_all()
    assert reader.names() == sorted(tensors)
    stock = {}
    for shard in target.glob("*.safetensors"):
        stock.update(load_file(shard))
    for name, tensor in tensors.items():
        assert torch.equal(reader.get(name), tensor)
        assert torch.equal(stock[name], tensor)
        assert not name.endswith(".payload") or reader.info(name).offset % 64 == 0
    assert reader.read_file("config.json") == FILES["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["m"]


def test_shards_are_named_as_hugging_face_does(tmp_path):
    write_checkpoint(tmp_path / "m", some_tensors(), FILES, max_shard_nbytes=1000)
    index = json.loads((tmp_path / "m" / "dcext.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"dcext-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"]) == set(some_tensors())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in some_tensors().values())


def test_same_tensors_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, some_tensors(), FILES)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_every_flipped_bit_is_found(folder):
    """One bit in every byte of every file, the manifest included."""
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for at in range(0, len(original), 1 if len(original) < 4000 else 7):
            damaged = bytearray(original)
            damaged[at] ^= 1 << (at % 8)
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=r"expected .*found"):
                CheckpointReader(folder).verify_all()
        path.write_bytes(original)
    CheckpointReader(folder).verify_all()


def test_truncated_and_grown_files_are_found(folder):
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for content in (b"", original[:7], original[:-1], original + b"\0"):
            path.write_bytes(content)
            with pytest.raises(FormatError, match=path.name):
                CheckpointReader(folder).verify_all()
        path.write_bytes(original)


def test_missing_files_are_named(folder):
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(FormatError, match=path.name):
            CheckpointReader(folder)
        path.write_bytes(original)


def rewrite_manifest(folder: Path, **changes) -> None:
    body = json.loads((folder / "dcext.json").read_text())
    body.update(changes)
    body.pop("xxh3_64")
    body["xxh3_64"] = xxhash.xxh3_64_hexdigest(canonical_json(body))
    (folder / "dcext.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def test_another_version_is_refused(folder):
    rewrite_manifest(folder, format_version=2)
    with pytest.raises(FormatError, match="format_version: expected 1, found 2"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"../evil": {"nbytes": 1, "xxh3_64": ""}},
        {"x": {"nbytes": -1, "xxh3_64": ""}},
        {"x": {"nbytes": "1", "xxh3_64": ""}},
        {"x": {"nbytes": 1}},
        {"x": 5},
        {"x" * 300: {"nbytes": 1, "xxh3_64": ""}},
        {"x\0": {"nbytes": 1, "xxh3_64": ""}},
        {"x": {"nbytes": 2**63, "xxh3_64": ""}},
        {"x": {"nbytes": True, "xxh3_64": ""}},
    ],
)
def test_manifests_of_another_form_are_refused(folder, files):
    rewrite_manifest(folder, files=files)
    with pytest.raises(FormatError, match=r"dcext\.json: (files|checksum): expected"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"nonsense", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000]
)
def test_manifests_that_are_not_json_objects_are_refused(folder, content):
    (folder / "dcext.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"dcext\.json: expected"):
        CheckpointReader(folder)


def entry(dtype: object, shape: object, begin: object, end: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (2**60, "header length"),
        (b"[]", "expected a JSON object"),
        ({"t": entry("U8", [2**63, 2**63], 0, 8)}, "shape"),
        ({"t": entry("U8", [2**62, 2**62], 0, 8)}, "for shape"),
        ({"t": entry("U8", [2**63 - 1] * 64, 0, 8)}, "for shape"),
        ({"t": entry("U8", [2**63] * 400, 0, 8)}, "shape"),
        ({"t": entry("U8", [0, 2**63], 0, 0), "u": entry("U8", [8], 0, 8)}, "shape"),
        ({"t": entry("U8", [0, 2**62, 2**62], 0, 0), "u": entry("U8", [8], 0, 8)}, "for shape"),
        ({"t": entry("U8", [1] * 64 + [8], 0, 8)}, "shape"),
        ({"t": entry("U8", [8], 0, 2**64)}, "shape"),
        ({"t": entry("U8", [8], 10**4299, 10**4299 + 8)}, "data_offsets"),
        ({"t": entry([], [8], 0, 8)}, "dtype"),
        ({"t": entry("U8", ["long" * 100_000], 0, 8)}, "shape"),
        ({"__metadata__": {"a": 1}, "t": entry("U8", [8], 0, 8)}, "metadata"),
        (json.dumps({"t": entry("U8", [8], 0, 8)}).encode("utf-16"), "expected JSON"),
        ({"t": entry("U8", [8], 8, 16)}, "expected data at byte"),
        ({"t": entry("U8", [4], 0, 4)}, "expected .* bytes, found"),
        ({"t": entry("U8", [4], 0, 4), "u": entry("U8", [5], 3, 8)}, "tensor 'u'"),
        ({"t": entry("U7", [8], 0, 8)}, "dtype"),
        ({"t": entry("U8", [-8], 0, 8)}, "shape"),
        ({"t": entry("U8", [True], 0, 1)}, "shape"),
        ({"t": entry("U8", [8.0], 0, 8)}, "shape"),
        ({"t": 7}, "dtype"),
    ],
)
def test_crafted_headers_are_refused(tmp_path, header, message):
    """Hashes that fit the data do not make sizes that lie acceptable."""
    folder = tmp_path / "m"
    folder.mkdir()
    text = b"{}" if isinstance(header, int) else header
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    length = header if isinstance(header, int) else len(text)
    data = struct.pack("<Q", length) + text + bytes(8)
    (folder / "dcext.safetensors").write_bytes(data)
    write_fitting_manifest(folder, list(header) if isinstance(header, dict) else [])
    with pytest.raises(FormatError, match=message) as error:
        CheckpointReader(folder)
    assert len(str(error.value)) < 2000


def write_fitting_manifest(folder: Path, names: list[str], hashes: dict | None = None) -> None:
    data = (folder / "dcext.safetensors").read_bytes()
    manifest = {
        "nbytes": len(data),
        "header_xxh3_64": xxhash.xxh3_64_hexdigest(data[:-8]),
        "tensors": dict.fromkeys(names, "") | (hashes or {}),
    }
    (folder / "dcext.json").write_bytes(dump_manifest({"dcext.safetensors": manifest}))


def test_an_empty_shard_that_the_manifest_agrees_with(tmp_path):
    (tmp_path / "dcext.safetensors").write_bytes(b"")
    write_fitting_manifest(tmp_path, [])
    with pytest.raises(FormatError, match="expected at least 8 bytes, found 0"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_lies_unaligned_is_copied(tmp_path):
    value = torch.tensor([1.5]).view(torch.uint8).numpy().tobytes()
    header = {
        "a": entry("U8", [1], 0, 1),
        "f": entry("F32", [1], 1, 5),
        "z": entry("U8", [3], 5, 8),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + b"\0" + value + bytes(3)
    (tmp_path / "dcext.safetensors").write_bytes(data)
    write_fitting_manifest(tmp_path, list(header))
    tensor = CheckpointReader(tmp_path).get("f")
    assert tensor.data_ptr() % 4 == 0
    assert tensor.tolist() == [1.5]


@pytest.mark.parametrize("depth", [100, 990, 5000])
def test_deep_manifests_are_refused(folder, depth):
    body = b'{"files": %s, "format_version": 1, "xxh3_64": "0"}' % (b"[" * depth + b"]" * depth)
    (folder / "dcext.json").write_bytes(body)
    with pytest.raises(FormatError, match=r"dcext\.json: "):
        CheckpointReader(folder)


def test_targets_that_are_not_ours_are_not_touched(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not dcext's"):
        write_checkpoint(target, some_tensors(), FILES, overwrite=True)
    assert (target / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(target)
    target.mkdir()
    write_checkpoint(target, some_tensors(), FILES)
    with pytest.raises(FileExistsError, match="overwrite"):
        write_checkpoint(target, some_tensors(), FILES)


def test_a_failure_leaves_nothing(tmp_path):
    def fail(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "m", some_tensors(), FILES, progress=fail)
    with pytest.raises(ValueError, match="expected a CPU tensor"):
        write_checkpoint(tmp_path / "m", {"t": torch.empty(1, device="meta")}, FILES)
    for name in ("dcext.json", "dcext.safetensors.index.json", "a/b", "", "x" * 256):
        with pytest.raises(ValueError, match="plain name"):
            write_checkpoint(tmp_path / "m", some_tensors(), {name: b""}, progress=fail)
    with pytest.raises(ValueError, match="__metadata__"):
        write_checkpoint(tmp_path / "m", {"__metadata__": torch.zeros(1)}, FILES)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, torch
from dcext.format import write_checkpoint
generation = 0
while True:
    generation += 1
    tensors = {"generation": torch.tensor(generation), "a.payload": torch.full((64 << 14,), generation % 256, dtype=torch.uint8)}
    write_checkpoint(sys.argv[1], tensors, {}, overwrite=True, max_shard_nbytes=1 << 19)
    print(generation, flush=True)
"""


def test_kill_leaves_nothing_or_a_complete_checkpoint(tmp_path):
    target = tmp_path / "m"
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True
        )
        if attempt > 0:
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if target.exists():
            reader = CheckpointReader(target)
            reader.verify_all()
            generation = int(reader.get("generation"))
            assert (reader.get("a.payload") == generation % 256).all()
    assert target.exists()
    write_checkpoint(target, some_tensors(), FILES, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "stale folders are removed"


def test_without_exchange_the_old_folder_is_renamed_away(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", some_tensors(), FILES)
    monkeypatch.setattr(replace, "_exchange", lambda first, second: False)
    write_checkpoint(tmp_path / "m", {"new": torch.zeros(3)}, FILES, overwrite=True)
    assert CheckpointReader(tmp_path / "m").names() == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", some_tensors(), FILES)
    monkeypatch.setattr(replace, "_exchange", lambda first, second: False)
    rename, target = os.rename, tmp_path / "m"

    def refuse_the_new_one(old, new):
        if new == target and not str(old).endswith("-old"):
            raise OSError("disk trouble")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match="disk trouble"):
        write_checkpoint(target, {"new": torch.zeros(3)}, FILES, overwrite=True)
    CheckpointReader(target).verify_all()
    assert CheckpointReader(target).names() == sorted(some_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


KILLED_EVERYWHERE = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from dcext.format import CheckpointReader, replace, write_checkpoint

root, mode = Path(sys.argv[1]), sys.argv[2]
target = root / "m"
if mode == "renames":
    replace._exchange = lambda first, second: False
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock", "ctypes.dlsym"}
left = None

def step(event):
    global left
    if left is not None and event in EVENTS:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sync = os.fsync
def counted_sync(descriptor):
    step("open")
    sync(descriptor)
os.fsync = counted_sync
sys.addaudithook(lambda event, arguments: step(event))

def write(generation, progress=None):
    tensors = {"generation": torch.tensor(generation), "a": torch.full((4096,), generation, dtype=torch.uint8)}
    write_checkpoint(target, tensors, {"f": b"x"}, overwrite=True, max_shard_nbytes=4096, progress=progress)

def check(generations):
    reader = CheckpointReader(target)
    reader.verify_all()
    assert int(reader.get("generation")) in generations
    assert (reader.get("a") == int(reader.get("generation"))).all()
    return int(reader.get("generation"))

def interrupted(nbytes):
    raise KeyboardInterrupt

seen, missing = set(), 0
for kill_at in itertools.count(1):
    write(1)
    child = os.fork()
    if child == 0:
        left = kill_at
        write(2)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if mode == "exchange" or target.exists():
        check((1, 2))
    else:
        missing += 1
    try:
        write(3, interrupted)  # cleans up, puts back, and fails
    except KeyboardInterrupt:
        pass
    seen.add(check((1, 2)))
    assert [path.name for path in root.iterdir()] == ["m"], sorted(root.iterdir())
    if not killed:
        break
assert seen == {1, 2} and kill_at > 20, (seen, kill_at)
assert missing == (1 if mode == "renames" else 0), missing
"""


@pytest.mark.parametrize("mode", ["exchange", "renames"])
def test_kill_before_every_single_step(tmp_path, mode):
    """SIGKILL before each call that touches the file system: the old or the new checkpoint is there, complete."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED_EVERYWHERE, str(tmp_path), mode]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


def test_leftovers_are_told_from_living_writers_by_a_lock(tmp_path):
    """Process ids are reused, and names may hold what a pattern would take for its own."""
    dead = tmp_path / f".m[1].tmp-{os.getpid()}-x"
    living = tmp_path / ".m[1].tmp-999999999-x"
    other = tmp_path / ".m[1].tmp-notes"
    for path in (dead, living, other):
        path.mkdir()
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_checkpoint(tmp_path / "m[1]", some_tensors(), FILES)
    os.close(descriptor)
    assert sorted(tmp_path.iterdir()) == sorted([living, other, tmp_path / "m[1]"])


def test_the_folder_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    write_checkpoint(tmp_path / "disk" / "m", some_tensors(), FILES)
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    write_checkpoint(tmp_path / "m", {"new": torch.zeros(3)}, FILES, overwrite=True)
    assert (tmp_path / "m").is_symlink()
    assert CheckpointReader(tmp_path / "disk" / "m").names() == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "m"]


def test_a_target_that_changed_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "m"

    def put_something_there(nbytes: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "thesis.tex").write_text("years of work")

    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        write_checkpoint(target, some_tensors(), FILES, progress=put_something_there)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]


def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "m", some_tensors(), FILES)
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_that_are_not_checkpoints_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="dcext compress"):
        CheckpointReader(tmp_path / "missing")
    with pytest.raises(FormatError, match=r"dcext\.json: .*dcext compress"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_as_the_stock_package_reads_it(tmp_path, dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    write_checkpoint(tmp_path / "m", {"t": tensor.T}, {})
    reader = CheckpointReader(tmp_path / "m")
    for found in (reader.get("t"), load_file(tmp_path / "m" / "dcext.safetensors")["t"]):
        assert found.dtype == dtype
        assert torch.equal(found.float(), tensor.T.float())


@given(st.data())
def test_any_damage_gives_one_kind_of_error(data):
    """Bytes overwritten anywhere, also with hashes made to fit: a FormatError, or what was written."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "m"
        write_checkpoint(folder, {"t": torch.zeros(8, dtype=torch.uint8)}, {})
        shard = folder / "dcext.safetensors"
        original = shard.read_bytes()
        at = data.draw(st.integers(0, len(original) - 9))
        patch = data.draw(
            st.binary(min_size=1, max_size=12) | st.sampled_from([b"9" * 12, b"[" * 9])
        )
        damaged = (original[:at] + patch + original[at + len(patch) :])[: len(original)]
        shard.write_bytes(damaged)
        write_fitting_manifest(folder, ["t"], {"t": xxhash.xxh3_64_hexdigest(damaged[-8:])})
        try:
            reader = CheckpointReader(folder)
            reader.verify_all()
            assert reader.get("t").nbytes == 8
        except FormatError:
            pass
