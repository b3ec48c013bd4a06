"""Runs our CUDA kernels on small cases, for compute-sanitizer to watch, and compares what they give.

    compute-sanitizer --tool memcheck python bench/gpu/sanitize.py [--smoke]

Matrices of every filter, with slabs, exceptions, raw and constant tiles, alone and together; damaged payloads and
indices, which must be reported and must not reach outside; quantization and scales of activations. Without a GPU,
--smoke runs the operators of the CPU. With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` each tensor is an allocation of its own,
so that memcheck sees what is outside of it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from common import DEVICE
from frames import has_frame
from torch import Tensor
from whole.drawn import normal

import dcext
from dcext.codec import seek_index

SHAPES = ((1, 1), (5, 129), (40, 576), (300, 257), (128, 1100))
SIGMAS = (0.2, 0.5, 1.0, 3.2, 6.0, 12.0, 40.0)
SLABS = (None, 100)
RARE = 5e-4  # share of weights far from the others, which become exceptions
# (pairs, low_bits) that the sigmas must have led to.
FILTERS = {(False, 0), (False, 2), (True, 0), (True, 4)}
TRIALS = 24  # of damage
ops = torch.ops.dcext


def matrices() -> list[Tensor]:
    """Small ones of all kinds."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, cols in SHAPES:
        for sigma in SIGMAS:
            qweight = normal(rows * cols, sigma, generator).view(rows, cols)
            qweight[torch.rand(rows, cols, generator=generator) < RARE] = -128
            found.append(qweight)
    found.append(torch.full((300, 700), -5, dtype=torch.int8))
    found.append(torch.randint(-128, 128, (300, 700), dtype=torch.int8, generator=generator))
    return found


def decode(
    payloads: list[Tensor], indices: list[Tensor], shapes: list[torch.Size]
) -> tuple[list[Tensor], int]:
    """Decodes together; matrices on the CPU, and failures."""
    outs = [torch.full(shape, 99, dtype=torch.int8, device=DEVICE) for shape in shapes]
    failures = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ops.decode_indexed_(
        [payload.to(DEVICE) for payload in payloads],
        [index.to(DEVICE) for index in indices],
        outs,
        failures,
    )
    return [out.cpu() for out in outs], int(failures)


def index_of(payload: Tensor) -> Tensor:
    """Of a payload of ours, which has one."""
    index = seek_index(payload)
    if index is None:
        raise RuntimeError("a payload of literals has no seek index")
    return index


def check_decoding() -> int:
    """Whole payloads, one by one and together; returns how many."""
    sources = matrices()
    filters, count = set(), 0
    for slab_cols in SLABS:
        payloads = [dcext.encode(qweight, "zstd", slab_cols=slab_cols) for qweight in sources]
        indices = [index_of(payload) for payload in payloads]
        for payload in payloads:
            chunks = dcext.payload_info(payload)["chunks"]
            filters |= {(bool(c["pairs"]), c["low_bits"]) for c in chunks if has_frame(c)}
        shapes = [qweight.shape for qweight in sources]
        for some in (slice(0, 1), slice(1, 8), slice(None)):
            found, failures = decode(payloads[some], indices[some], shapes[some])
            same = all(map(torch.equal, found, sources[some]))
            if failures or not same:
                raise RuntimeError(f"slab_cols {slab_cols}: other weights, failures {failures}")
            count += len(found)
    if not filters >= FILTERS:
        raise RuntimeError(f"filters: expected {sorted(FILTERS)} among them, got {sorted(filters)}")
    return count


def check_damage() -> int:
    """Bytes of payloads and indices replaced at random; returns how many such were reported."""
    generator = torch.Generator().manual_seed(1)
    reported = 0
    for trial in range(TRIALS):
        qweight = normal(200 * 300, (0.5, 3.0, 12.0)[trial % 3], generator).view(200, 300)
        qweight[0, :3] = -128
        payload = dcext.encode(qweight, "zstd")
        index = index_of(payload)
        damaged = (payload, index.view(-1))[trial % 2]
        begin = 128 if trial % 2 == 0 else 0  # the header is not read
        places = torch.randint(begin, damaged.numel(), (1 + trial,), generator=generator)
        damaged[places] = torch.randint(0, 256, places.shape, generator=generator).to(torch.uint8)
        reported += decode([payload], [index], [qweight.shape])[1] != 0
    if not reported:
        raise RuntimeError("damage was never reported")
    return reported


def check_activations() -> int:
    """The two kernels beside the products; returns the number of cases."""
    count = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 1), (3, 7), (5, 64), (2, 3, 1000), (2, 11008)):
            x = torch.randn(shape).to(dtype)
            expected = ops.quantize_activations(x, None)
            found = ops.quantize_activations(x.to(DEVICE), None)
            acc = torch.randint(-(2**30), 2**30, shape, dtype=torch.int32)
            scales = (torch.rand(shape[-1]) * 1e-6, expected[1], torch.randn(shape[-1]))
            y = ops.dequantize(acc, *scales, dtype)
            y_found = ops.dequantize(acc.to(DEVICE), *(s.to(DEVICE) for s in scales), dtype)
            pairs = zip((*expected, y), (*found, y_found), strict=True)
            if not all(torch.equal(a, b.cpu()) for a, b in pairs):
                raise RuntimeError(
                    f"activations of shape {shape} {dtype}: other bits than the CPU's"
                )
            count += 1
    return count


def main() -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="also without a GPU, on the CPU")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda" and not arguments.smoke:
        sys.exit("sanitize.py: expected a CUDA GPU, found none; --smoke runs on the CPU")
    print(f"{check_decoding()} matrices decoded on {DEVICE.type}")
    print(f"{check_damage()} of {TRIALS} damaged ones reported")
    print(f"{check_activations()} shapes of activations")


if __name__ == "__main__":
    main()
