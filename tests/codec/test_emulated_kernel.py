"""The CUDA kernel's file on threads of a CPU: its bits are those of ``decode``, and sanitizers find nothing.

The barriers of these threads order memory only where the kernel has one of its own, so that a missing one is a data
race for ThreadSanitizer. That it would be found is tested too: by taking each away.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dcext
from conftest import ROOT
from emulated_kernel import SANITIZERS, Job, Launch, build, require_sanitizer, run

KERNEL = Path("cuda") / "decode_indexed_kernel.cuh"
FILTERS = [(False, 0), (True, 0), (False, 2), (True, 2), (True, 4)]  # pairs, low_bits
HUFFMAN, RAW, REPEATED = range(3)
KIND, NUM_STREAMS = 60, 61  # bytes of a row of the index


def weights(pairs: bool, low_bits: int, shape: tuple[int, int], outliers: int = 3) -> Tensor:
    """A matrix for which that filter is the best: narrow or wide highs, with random bits below."""
    generator = torch.Generator().manual_seed(1 + pairs + 2 * low_bits + shape[1])
    deviation = 6 if not pairs else 1.2 if low_bits else 0.6
    highs = (torch.randn(shape, generator=generator) * deviation).round()
    highs = highs.clamp(-5, 5) if pairs else highs.clamp(-30, 30)
    q = highs * 2**low_bits + torch.randint(0, 2**low_bits, shape, generator=generator)
    places = torch.randint(0, q.numel(), (outliers,), generator=generator)
    q.view(-1)[places] = 125.0 + torch.arange(outliers) % 3
    return q.to(torch.int8)


def job_of(qweight: Tensor, codec: str = "zstd", slab_cols: int | None = None) -> Job:
    payload = dcext.encode(qweight, codec=codec, slab_cols=slab_cols)
    index = dcext.codec.seek_index(payload)
    assert index is not None
    assert torch.equal(dcext.decode(payload), qweight)
    return Job(payload, index, tuple(qweight.shape))


def filters_of(job: Job) -> set[tuple[bool, int]]:
    chunks = dcext.payload_info(job.payload)["chunks"]
    return {(chunk["pairs"], chunk["low_bits"]) for chunk in chunks if chunk["encoding"] == "zstd"}


def has_exceptions(job: Job) -> bool:
    return any(chunk["exceptions"] for chunk in dcext.payload_info(job.payload)["chunks"])


def kinds_of(job: Job) -> set[tuple[int, int]]:
    return {(int(row[KIND]), int(row[NUM_STREAMS])) for row in job.index}


def corner_jobs() -> list[Job]:
    """Raw tiles, constants, one stream, one weight, several blocks, slabs, and no block at all."""
    zeros, narrow = torch.zeros(64, 640, dtype=torch.int8), weights(True, 0, (3, 1), 0)
    nothing = Job(
        torch.zeros(64, dtype=torch.uint8), torch.zeros(0, 448, dtype=torch.uint8), (1, 1)
    )
    return [
        job_of(weights(False, 0, (7, 333)), "raw"),
        job_of(weights(False, 0, (400, 340)), "raw"),
        nothing,
        job_of(zeros),
        job_of(zeros - 128),
        job_of((zeros + 5)[:, :331]),
        job_of(weights(True, 0, (2, 101), 0)),
        job_of(narrow),
        nothing,
        job_of(torch.randint(-128, 128, (30, 99)).to(torch.int8)),
        job_of(weights(False, 0, (260, 601), 8)),
        *(job_of(weights(*f, (150, 333), 5), slab_cols=100) for f in FILTERS),
        job_of(weights(False, 2, (96, 1024)), slab_cols=512),
    ]


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """Every filter on a matrix of round and one of odd shape; then what is unusual, all in one launch."""
    launches = []
    for shape in ((64, 640), (111, 333)):
        jobs = [job_of(weights(*f, shape)) for f in FILTERS]
        assert [filters_of(job) for job in jobs] == [{f} for f in FILTERS]
        assert [has_exceptions(job) for job in jobs] == [low != 4 for _, low in FILTERS]
        assert all(kinds_of(job) == {(HUFFMAN, 4)} for job in jobs)
        launches.append(Launch(jobs))
    launches.append(Launch(corner_jobs()))
    kinds = set.union(*map(kinds_of, launches[-1].jobs))
    assert {(HUFFMAN, 1), (HUFFMAN, 4), (RAW, 0), (REPEATED, 0)} <= kinds
    return launches


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest) -> Path:
    require_sanitizer(request.param)
    return build(request.param)


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_bits_are_those_of_decode(
    program: Path, tmp_path: Path, launches: list[Launch], order: str
):
    assert run(program, tmp_path, launches, order) == ""
    for launch in launches:
        assert launch.failures == 0
        for i, (job, out) in enumerate(zip(launch.jobs, launch.outs, strict=True)):
            if job.index.shape[0] == 0:
                assert out.eq(0x5A).all()
            else:
                assert torch.equal(out, dcext.decode(job.payload)), i


@pytest.mark.parametrize("barrier", range(7))
def test_each_barrier_is_needed(barrier: int, tmp_path: Path, launches: list[Launch]):
    """Without it ThreadSanitizer reports a race; so it would if a change lost it."""
    require_sanitizer("thread")
    text = (ROOT / "csrc" / KERNEL).read_text()
    places = list(re.finditer(r"__sync(threads|warp)\(\);", text))
    assert len(places) == 7
    place = places[barrier]
    (tmp_path / KERNEL.parent).mkdir()
    (tmp_path / KERNEL).write_text(text[: place.start()] + text[place.end() :])
    few = [Launch([launches[0].jobs[3]])]  # pairs, low bits and exceptions
    assert "WARNING: ThreadSanitizer: data race" in run(build("thread", tmp_path), tmp_path, few)


def flip(data: Tensor, place: int, bit: int) -> Tensor:
    flipped = data.clone()
    flipped.view(-1)[place] ^= 1 << bit
    return flipped


def damaged(job: Job, count: int, generator: torch.Generator) -> list[Job]:
    """The job with a flipped bit in the frame, or in the index and there where most depends on it."""
    random = torch.randint(0, 2**31, (count, 3), generator=generator).tolist()
    jobs = []
    for part, place, bit in random:
        if part % 3 == 0:
            chunk = dcext.payload_info(job.payload)["chunks"][0]
            place = chunk["offset"] + place % chunk["nbytes"]
            jobs.append(Job(flip(job.payload, place, bit % 8), job.index, job.shape))
        else:
            place %= 64 if part % 3 == 1 else job.index.numel()
            jobs.append(Job(job.payload, flip(job.index, place, bit % 8), job.shape))
    return jobs


def decode_on_cpu(job: Job) -> tuple[int, Tensor]:
    out, failures = torch.full(job.shape, 0x5A, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    torch.ops.dcext.decode_indexed_([job.payload], [job.index], [out], failures)
    return int(failures), out


def test_the_cpu_decodes_the_same(launches: list[Launch]):
    for job in (job for launch in launches for job in launch.jobs if job.index.shape[0] > 0):
        failures, out = decode_on_cpu(job)
        assert failures == 0
        assert torch.equal(out, dcext.decode(job.payload))


def test_damage_is_reported_or_harmless(tmp_path: Path, launches: list[Launch]):
    """No bit of payload or index leads outside of them or the matrix, and the CPU sees the same."""
    require_sanitizer("address")
    generator = torch.Generator().manual_seed(0)
    sound = [job for launch in launches for job in launch.jobs if job.index.shape[0] == 1]
    flipped = [Launch([job]) for one in sound for job in damaged(one, 12, generator)]
    assert run(build("address"), tmp_path, flipped) == ""
    for i, launch in enumerate(flipped):
        failures, out = decode_on_cpu(launch.jobs[0])
        assert (launch.failures == 0) == (failures == 0), i
        if failures == 0:
            assert torch.equal(launch.outs[0], out), i
    reported = sum(launch.failures != 0 for launch in flipped)
    assert 0 < reported < len(flipped)


def test_a_tile_before_the_matrix(tmp_path: Path):
    """With one column, row + rows of the tile could wrap around to a row that there is."""
    require_sanitizer("address")
    job = job_of(weights(False, 0, (640, 1)))
    index = job.index.clone()
    index[0, 16:24] = torch.tensor([0xF8, *[0xFF] * 7], dtype=torch.uint8)  # dst = -8
    launch = Launch([Job(job.payload, index, job.shape)])
    assert run(build("address"), tmp_path, [launch]) == ""
    assert launch.failures == 1
