"""bench/offload.py: what it compares, how it limits memory and disk, and a run of each kind of row on a small model."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "third_party")]

pytest.importorskip("transformers", reason="requires transformers")

import offload  # noqa: E402
from whole import disk, limits, offload_cases, offload_tables  # noqa: E402
from whole.offload_worker import since  # noqa: E402

MIB = 1 << 20
ALLOCATE = "import sys; data = bytearray(int(sys.argv[1])); print(len(data))"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(5 * MIB + 4096))
    return path


def allocate(confinement, nbytes):
    command = [*confinement.prefix, sys.executable, "-c", ALLOCATE, str(nbytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode == 0 and result.stdout.strip() == str(nbytes)


@pytest.mark.parametrize("make", [None, limits._resource_limit])
def test_memory_is_limited(tmp_path, make, monkeypatch):
    if make is not None:
        monkeypatch.setattr(limits, "_control_groups", lambda limit, stack: make(limit))
    before = set(limits.CGROUPS.glob("memory/**/dcext-offload-*"))
    with limits.confined(limits.Limits(128 * MIB, None, tmp_path)) as confinement:
        assert allocate(confinement, 32 * MIB)
        assert not allocate(confinement, 256 * MIB)
        peak = confinement.peak_nbytes()
        assert peak is None or 32 * MIB < peak <= 128 * MIB
    assert set(limits.CGROUPS.glob("memory/**/dcext-offload-*")) == before


def test_without_limits_nothing_is_done(tmp_path):
    with limits.confined(limits.Limits(None, None, tmp_path)) as confinement:
        assert (confinement.prefix, confinement.means) == ([], "nothing")


def test_disk_that_cannot_be_limited(tmp_path):
    with pytest.raises(RuntimeError, match="--disk-limit: expected control groups"):
        limits._resource_limit(limits.Limits(None, 1e9, tmp_path))


def test_disk_is_limited(file):
    limit = 40e6
    script = "import sys; sys.path.insert(0, sys.argv[1]); from whole.disk import bytes_per_s; "
    script += "from pathlib import Path; print(bytes_per_s([Path(sys.argv[2])], 0.5))"
    command = [sys.executable, "-c", script, str(ROOT / "bench"), str(file)]
    try:
        with limits.confined(limits.Limits(None, limit, file.parent)) as confinement:
            text = subprocess.check_output([*confinement.prefix, *command], text=True)
    except RuntimeError as error:
        pytest.skip(f"requires a disk that can be limited: {error}")
    if text.strip() == "None":
        pytest.skip("requires O_DIRECT")
    assert 0.3 * limit < float(text) < 1.5 * limit


def test_reads_of_a_file(file):
    rate = disk.bytes_per_s([file], 0.05)
    if rate is None:
        pytest.skip("requires O_DIRECT")
    assert rate > 1e6
    places = disk._places([os.open(file, os.O_RDONLY)])
    offsets = [next(places)[1] for _ in range(4)]
    assert offsets == [0, 2 * MIB, 4 * MIB, 0]


def test_statistics_of_passes():
    before = {"used_nbytes": 10, "stall_s": 1.0, "peak_nbytes": 7, "page_cache": "bypassed"}
    after = {"used_nbytes": 30, "stall_s": 1.5, "peak_nbytes": 8, "page_cache": "bypassed"}
    assert since(before, after) == {**after, "used_nbytes": 20, "stall_s": 0.5}
    assert since({}, {}) == {}


def row(name, speed, limit=None, engine="stream", resident="little", **fields):
    passes = [{"length": 1, "tokens_per_s": speed, "tokens": [1], "logits_hash": "a"}]
    codec = name.partition(",")[0]
    common = {"model": "m", "sizes": {"lengths": [1]}, "integers": "normal"}
    kind = {"codec": codec, "engine": engine, "resident": resident, "disk_limit": limit}
    return {**common, **kind, "name": name, "passes": passes, **fields}


def test_ratios_are_taken_under_the_same_limit():
    rows = [row("raw, from disk", 2.0), row("raw, from disk", 1.0, 1e9)]
    rows += [row("zstd, from disk", 3.0), row("zstd, from disk", 4.0, 1e9)]
    rows += [row("zstd, in memory", 8.0, engine="memory", resident="all")]
    found = offload_tables.ratios(rows)["ratios"]
    assert [r["over_raw"] for r in found] == [[1.0], [1.0], [1.5], [4.0], None]
    assert [r["over_memory"] for r in found] == [None, None, [0.375], [0.5], [1.0]]
    assert [r["over_accelerate"] for r in found] == [None] * 5


def test_share_of_the_disks_bound():
    streamed = {"statistics": {"used_nbytes": 200}, "storage_nbytes": 120, "seconds": [1.0, 2.0]}
    other = {"statistics": {}, "storage_nbytes": 150, "seconds": [1.0, 1.0]}
    memory = {"statistics": {}, "storage_nbytes": 0, "seconds": [1.0, 1.0]}
    looks = [100.0, None, 200.0]
    measured = {"disk_bytes_per_s": looks, "passes": [streamed, other, memory]}
    found = offload_tables.with_bounds(measured, repeats=2)["passes"]
    assert [f["pass_nbytes"] for f in found] == [100, 150, 0]
    assert [f.get("share_of_bound") for f in found] == [pytest.approx(100 / 150 / 1.5), 1.0, None]


def test_equal_integers_must_compute_equal_logits():
    rows = [row("raw, in memory", 1.0), row("zstd, from disk", 1.0)]
    rows += [
        row("packed, from disk", 1.0, integers="levels"),
        row("accelerate", 1.0, integers=None),
    ]
    for other in rows[2:]:
        other["passes"][0]["logits_hash"] = "b"
    assert offload.disagreements(rows) == []
    bad = row("zstd, no overlap", 1.0)
    bad["passes"][0]["logits_hash"] = "c"
    assert offload.disagreements([*rows, bad]) == [
        "m: zstd, no overlap and raw, in memory compute other logits in passes of 1 tokens"
    ]


def test_limits_on_the_command_line():
    assert [offload.disk_limit(text) for text in ("1GB/s", "500MB/s", "none")] == [1e9, 5e8, None]
    for text in ("fast", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            offload.disk_limit(text)


def test_smoke(tmp_path):
    output = tmp_path / "out.json"
    chosen = re.compile("zstd, (in|from|no)|raw, from|accelerate")  # one of each kind
    command = [sys.executable, str(ROOT / "bench/offload.py"), "--smoke"]
    command += ["--rows", chosen.pattern, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(output.read_text())
    rows = {r["name"]: r for r in report["rows"]}
    cases = offload_cases.memory_cases("small") + offload_cases.offload_cases("small")
    assert rows.keys() == {c.name for c in cases if chosen.search(c.name)}
    hashes = {tuple(p["logits_hash"] for p in r["passes"]) for r in rows.values() if r["integers"]}
    assert len(hashes) == 1
    for found in rows.values():
        assert [p["length"] for p in found["passes"]] == [1, 4]
        assert all(p["tokens_per_s"] > 0 for p in found["passes"])
        assert (found["confined_by"] == "nothing") == (found["engine"] == "memory")
    for name in ("zstd, from disk", "raw, from disk", "zstd, no overlap"):
        for figures in rows[name]["passes"]:
            assert 0.5 < figures["pass_nbytes"] / rows[name]["weights_nbytes"] <= 1
    assert [r["name"] for r in report["ratios"]] == list(rows)
    assert "of disk's bound" in result.stdout
    assert "zstd 1.5.7" in result.stdout
