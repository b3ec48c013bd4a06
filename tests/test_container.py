"""The checkpoint folder: written whole or not at all, and every byte of it accounted for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from dcext.errors import FormatError
from dcext.format import CheckpointReader, write_checkpoint
from dcext.format.manifest import canonical_json, dump_manifest

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
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
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
        ({"t": entry("U8", [2**63, 2**63], 0, 8)}, "for shape"),
        ({"t": entry("U8", [8], 0, 2**64)}, "for shape"),
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
    (folder / "model.safetensors").write_bytes(data)
    names = list(header) if isinstance(header, dict) else []
    manifest = {
        "nbytes": len(data),
        "header_xxh3_64": xxhash.xxh3_64_hexdigest(data[:-8]),
        "tensors": dict.fromkeys(names, ""),
    }
    (folder / "dcext.json").write_bytes(dump_manifest({"model.safetensors": manifest}))
    with pytest.raises(FormatError, match=message):
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
    with pytest.raises(ValueError, match="plain name"):
        write_checkpoint(tmp_path / "m", some_tensors(), {"dcext.json": b""})
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
    from dcext.format import writer

    write_checkpoint(tmp_path / "m", some_tensors(), FILES)
    monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    write_checkpoint(tmp_path / "m", {"new": torch.zeros(3)}, FILES, overwrite=True)
    assert CheckpointReader(tmp_path / "m").names() == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
