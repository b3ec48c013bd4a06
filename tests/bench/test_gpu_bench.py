"""bench/gpu: each script runs on tiny sizes, without a GPU in Triton's interpreter, and the shell scripts say what is wrong.

Figures are not looked at.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcext
from conftest import ROOT

triton = pytest.importorskip("triton")
pytest.importorskip("transformers", reason="requires transformers")
pytest.importorskip("accelerate", reason="requires accelerate")

from triton_modes import INTERPRETED, requires_interpreter  # noqa: E402

GPU = ROOT / "bench/gpu"
sys.path[:0] = [str(GPU), str(ROOT / "bench")]

import common  # noqa: E402
import decode  # noqa: E402
import frames  # noqa: E402
import hardware  # noqa: E402
import libzstd  # noqa: E402
import nvcomp_peer  # noqa: E402

HAS_GPU = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(HAS_GPU, reason="requires a machine without a GPU")
CPU_ONLY = pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="replaces nvCOMP on the CPU")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(GPU / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def smoke(script: str, tmp_path: Path) -> tuple[dict, str]:
    output = tmp_path / "out.json"
    result = python(script, "--smoke", "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(output.read_text())
    assert report["kind"] == "smoke, means nothing"
    assert report["hardware"]["line"] in result.stdout
    assert "a smoke run: these figures mean nothing" in result.stdout
    return report, result.stdout


def test_link(tmp_path):
    report, printed = smoke("link.py", tmp_path)
    assert report["ratio"] > 2
    assert (tmp_path / "out.png").stat().st_size > 0
    assert "decoded on the host, ahead" in printed


def test_offload(tmp_path):
    report, _ = smoke("offload.py", tmp_path)
    for row in report["rows"][:3]:
        assert row["statistics"]["blocks"] > 0
        assert row["traveling_nbytes"] > 0
        assert (tmp_path / row["trace"]).stat().st_size > 0


@requires_interpreter
def test_policy(tmp_path):
    report, printed = smoke("policy.py", tmp_path)
    assert len(report["rows"]) == 3
    for row in report["rows"]:
        assert row["1"]["predicted_ms"] > 0, row
        assert row["1"]["device_nbytes"] <= row["1"]["planned_device_nbytes"]
    assert "drawn 0" in printed


def test_decode(tmp_path):
    report, output = smoke("decode.py", tmp_path)
    single, block = report["rows"]
    for row in (single, block):
        assert row["decode"].keys() >= {"median_ms", "p20_ms", "p80_ms", "gbps"}
        assert row["copy"]["gbps"] > 0
        assert row["stored_bits"] > row["entropy_bits"] > 1
        if not HAS_GPU:
            assert row["nvcomp_zstd"] == row["nvcomp_ans"] == {"not_measured": "requires a GPU"}
    assert "decode_one_by_one" in block
    assert "nvCOMP" in output


@requires_interpreter
def test_gemm(tmp_path):
    report, output = smoke("gemm.py", tmp_path)
    assert len(report["rows"]) == 2
    for row in report["rows"]:
        for column in ("w8a8", "w8a16", "packed_w8a8", "packed_w8a16", "int_mm", "bfloat16"):
            assert row[column]["median_ms"] > 0, row[column]
            assert row[column]["first_call_s"] > 0
    assert "first calls, which compile and tune" in output


@requires_interpreter
def test_model(tmp_path):
    report, _ = smoke("model.py", tmp_path)
    rows = {row["name"]: row for row in report["rows"]}
    zstd, raw = rows["device/zstd, blocks together"], rows["device/raw"]
    assert zstd["eager"]["tokens"] == raw["eager"]["tokens"]
    packed, same = rows["device/packed"], rows["device/raw, integers of packed"]
    assert packed["eager"]["tokens"] == same["eager"]["tokens"]
    assert all(len(row["eager"]["tokens"]) == report["new"] + 1 for row in rows.values())


def test_what_compute_sanitizer_runs():
    result = python("sanitize.py", "--smoke")
    assert result.returncode == 0, result.stderr
    assert "matrices decoded" in result.stdout


@requires_interpreter
@without_gpu
def test_kernels_to_compile():
    result = python("compile_kernels.py", "--smoke")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens, activations") == 2


@without_gpu
@pytest.mark.parametrize("script", ["decode.py", "sanitize.py"])
def test_no_gpu_is_said(script):
    result = python(script)
    assert result.returncode == 1
    assert f"{script}: expected a CUDA GPU, found none" in result.stderr
    assert "Traceback" not in result.stderr


def matrix(rows: int, cols: int, sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    qweight = (torch.randn(rows, cols, generator=generator) * sigma).round().clamp(-127, 127)
    qweight[torch.rand(rows, cols, generator=generator) < 3e-4] = -128
    return qweight.to(torch.int8)


def content(payload: torch.Tensor, chunk: dict) -> torch.Tensor:
    out = torch.empty(frames.content_nbytes(chunk), dtype=torch.uint8)
    frame = payload[chunk["offset"] : chunk["offset"] + chunk["frame_nbytes"]]
    libzstd.decompress_into(bytes(frame.numpy()), out.data_ptr(), out.numel())
    return out


@pytest.mark.parametrize("slab_cols", [None, 300])
def test_weights_of_what_frames_hold(slab_cols):
    seen = set()
    for sigma in (0.2, 0.5, 6.0, 20.0, 40.0):
        qweight = matrix(600, 1024, sigma)
        payload = dcext.encode(qweight, "zstd", slab_cols=slab_cols)
        for chunk in filter(frames.has_frame, dcext.payload_info(payload)["chunks"]):
            seen.add((bool(chunk["pairs"]), chunk["low_bits"]))
            row, col = chunk["row"], chunk["col"]
            expected = qweight[row : row + chunk["shape"][0], col : col + chunk["shape"][1]]
            found = frames.weights_of(content(payload, chunk), payload, chunk)
            assert torch.equal(found, expected)
    assert seen == {(False, 0), (False, 2), (True, 0), (True, 4)}


class FakeLibrary(nvcomp_peer.Library):
    """Does on the CPU what nvCOMP does: its calls have the signatures of nvcomp/zstd.h and nvcomp/ans.h."""

    version = "6.fake"

    def __init__(self, fails: bool = False):
        self.fails = fails

    def call(self, name, types, *arguments):
        assert len(types) == len(arguments)
        if name.endswith(("GetTempSize", "GetMaxOutputChunkSize")):
            (pointer,) = (a for a in arguments if hasattr(a, "_obj"))
            pointer._obj.value = 70_000
            return
        if name == "nvcompBatchedANSCompressAsync":
            sources, sizes, _, count, _, _, outs, found, _, statuses, _ = arguments
            copy = ctypes.memmove
        else:
            sources, sizes, capacities, found, count, _, _, outs, _, statuses, _ = arguments
            copy = ctypes.memmove if "ANS" in name else self.decompress
            self.capacities = (ctypes.c_int64 * count).from_address(capacities)
        words = [(ctypes.c_int64 * count).from_address(at) for at in (sources, sizes, outs, found)]
        for i, (source, size, out) in enumerate(zip(*words[:3], strict=True)):
            self.number = i
            copy(out, source, size)
            words[3][i] = size if copy is ctypes.memmove else self.capacities[i]
            (ctypes.c_int32 * count).from_address(statuses)[i] = 12 if self.fails else 0

    def decompress(self, out, source, size):
        libzstd.decompress_into(ctypes.string_at(source, size), out, self.capacities[self.number])


@CPU_ONLY
@pytest.mark.parametrize("bits", [1.5, 3.6, 6.6])
def test_nvcomp_is_given_the_frames(bits, monkeypatch):
    monkeypatch.setattr(nvcomp_peer, "stream", lambda: 0)
    clock = common.Clock(smoke=True)
    coded = decode.Coded(decode.Case("case", ((200, 700), (33, 64)), bits))
    found, joined = decode.timed_zstd(coded, FakeLibrary(), clock)
    assert found["frames"] == 2
    assert found["content_nbytes"] == joined.numel()
    ans = decode.timed_ans(coded, joined, FakeLibrary(), clock)
    assert ans["content_ratio"] == 1
    with pytest.raises(RuntimeError, match="nvCOMP Zstd: 2 of 2 streams failed"):
        decode.timed_zstd(coded, FakeLibrary(fails=True), clock)


def test_without_nvcomp(monkeypatch, tmp_path):
    monkeypatch.delenv("DCEXT_NVCOMP", raising=False)
    monkeypatch.setattr(nvcomp_peer, "ROOT", tmp_path)
    if nvcomp_peer.importlib.util.find_spec("nvidia") is None:
        with pytest.raises(nvcomp_peer.UnavailableError, match="no nvCOMP"):
            nvcomp_peer.find_library()
    with pytest.raises(nvcomp_peer.UnavailableError, match="nowhere"):
        nvcomp_peer.Library(tmp_path / "nowhere.so")


def report_in(tmp_path: Path, seconds: float = 60) -> common.Report:
    deadline = common.time.monotonic() + seconds
    return common.Report(common.Settings(True, tmp_path / "rows.json", deadline))


def test_one_failure_does_not_hide_others(tmp_path, capsys):
    report = report_in(tmp_path)
    assert report.attempt("row", "good", lambda: {"median_ms": 1.0})
    assert not report.attempt("row", "bad", lambda: 1 / 0)
    assert not report.attempt("row", "peer", lambda: 1 / 0, peer=True)
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert row["good"] == {"median_ms": 1.0}
    assert row["bad"] == row["peer"] == {"not_measured": "ZeroDivisionError: division by zero"}
    with pytest.raises(SystemExit, match="1 failed: row: bad: ZeroDivisionError"):
        report.finish([], [])
    assert "peer: not measured: ZeroDivisionError" in capsys.readouterr().out


def test_nothing_begins_after_the_deadline(tmp_path):
    report = report_in(tmp_path, seconds=-1)
    assert not report.attempt("row", "late", lambda: pytest.fail("began"))
    assert report.rows.rows["row"]["late"] == {"not_measured": "out of time"}


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = common.time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@CPU_ONLY
def test_rounds_between_events(monkeypatch):
    slept, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = common.Clock(smoke=False)
    clock.other, clock.sum = torch.ones(9, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    times = clock.measure(lambda: calls.append(common.time.sleep(1e-3)))
    assert int(clock.sum) == 9
    assert 1 <= times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]
    assert common.ROUNDS[0] <= times["rounds"] <= common.ROUNDS[1]
    assert len(calls) == times["rounds"] + 4  # two to warm up, two to learn how many
    assert all(1e-3 < cycles / common.HZ <= 0.1 for cycles in slept)


@without_gpu
def test_clocks_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert set(hardware.nvidia_smi("").values()) == {None}
    assert hardware.git("status") == ""


def bash(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("script", sorted(GPU.glob("*.sh")), ids=lambda path: path.name)
def test_shell(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert bash("-n", str(script)).returncode == 0
    shown = bash(str(script), "--help")
    assert shown.returncode == 0
    assert f"bench/gpu/{script.name}" in shown.stdout
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


RUN_ALL = str(GPU / "run_all.sh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nothing"], "unknown argument '--nothing'"),
        (["--limit", "soon"], "--limit: expected seconds, got 'soon'"),
        (["--limit"], "--limit: expected a value"),
        (["--steps", "decode lunch"], "got 'lunch'"),
    ],
)
def test_wrong_arguments_of_run_all(arguments, message):
    result = bash(RUN_ALL, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@without_gpu
def test_run_all_without_a_gpu(tmp_path):
    result = bash(RUN_ALL, "--output", str(tmp_path / "out"), PYTHON=sys.executable)
    assert result.returncode == 2
    assert "expected a Python whose torch sees a CUDA GPU, found none" in result.stderr
    assert f"torch {torch.__version__} sees no GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def summary(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "summary.json").read_text())
    assert report["hardware"]["line"]
    return {step["name"]: step["state"] for step in report["steps"]}


@without_gpu
def test_run_all_of_what_needs_no_gpu(tmp_path):
    arguments = ["--smoke", "--output", str(tmp_path), "--steps", "build memcheck decode"]
    result = bash(RUN_ALL, *arguments, "--limit", "300", PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    states = summary(tmp_path)
    assert list(states) == ["memcheck", "decode"]
    assert states["memcheck"].startswith("ok, but not watched")
    assert states["decode"] == "ok"
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"run.log", "sanitizer.log", "decode.json", "summary.json"}


@without_gpu
def test_run_all_goes_on_after_a_failure(tmp_path):
    pretends = tmp_path / "python"
    pretends.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$*" = - ]; then cat > /dev/null; echo 9.0 pretended; exit; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    pretends.chmod(0o755)
    arguments = ["--output", str(tmp_path / "out"), "--steps", "memcheck decode"]
    result = bash(RUN_ALL, *arguments, PYTHON=str(pretends))
    assert result.returncode == 1
    assert summary(tmp_path / "out") == {
        "memcheck": "FAILED: exit status 1",
        "decode": "FAILED: exit status 1",
    }
    assert result.stdout.count("expected a CUDA GPU, found none") == 2


@without_gpu
def test_run_all_leaves_out_what_does_not_fit(tmp_path):
    arguments = ["--smoke", "--output", str(tmp_path), "--steps", "decode model", "--limit", "5"]
    result = bash(RUN_ALL, *arguments, PYTHON=sys.executable)
    assert result.returncode == 1
    assert set(summary(tmp_path).values()) == {"left out: out of time"}


def test_kit_goes_on_without_nvcomp(tmp_path):
    import fetch

    environment = {
        "PYTHON": sys.executable,
        "DCEXT_ZSTD_DIR": str(fetch.zstd_lib_dir()),
        "DCEXT_XXHASH_DIR": str(fetch.xxhash_dir()),
        "DCEXT_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    result = bash(str(GPU / "kit.sh"), str(tmp_path / "kit"), **environment)
    assert result.returncode == 0, result.stderr
    assert "goes on without nvCOMP" in result.stderr
    assert (tmp_path / "kit/zstd/zstd.h").is_file()
    assert (tmp_path / "kit/xxhash/xxhash.h").is_file()
    assert not (tmp_path / "kit/nvcomp").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("kit")] == ["kit"]
