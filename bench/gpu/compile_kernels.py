"""Compiles the Triton kernels that gemm.py and model.py measure, many at a time, into Triton's cache on disk.

    python bench/gpu/compile_kernels.py [--smoke]

Triton compiles one choice of tiles after the other, which takes minutes; nothing is tuned or timed here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch
from common import DEVICE
from triton.runtime.autotuner import Autotuner
from whole.drawn import levels

import dcext
from dcext.config import ACTIVATIONS
from dcext.kernels.int8_gemm import int8_linear
from dcext.kernels.packed import PackedWeight, packed_linear

TOKENS = (1, 16, 256, 4096)
SIZE = 1024  # of the matrix: a multiple of 16 like those of real layers
MOST_PROCESSES = 12


def _compile_only(self, *args, grid, **kwargs):
    """In place of ``Autotuner.run``: compiles all choices and launches none."""
    kwargs.pop("warmup", None)
    return self.warmup(*args, grid=grid, **kwargs)


def compile_one(task: tuple[str, int, str]) -> str:
    """Compiles the kernels of one layer type, number of tokens and type of activations; says how long it took."""
    kind, tokens, activations = task
    begin = time.perf_counter()
    size = SIZE if DEVICE.type == "cuda" else 32
    if DEVICE.type == "cuda":
        Autotuner.run = _compile_only
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    qweight = levels(size * size, torch.Generator().manual_seed(0)).view(size, size)
    row_scale = torch.ones(size, device=DEVICE)
    x = torch.ones(tokens, size, dtype=dtype, device=DEVICE)
    if kind == "int8":
        int8_linear(x, qweight.to(DEVICE), row_scale, activations=activations)
    else:
        packed = PackedWeight.from_payload(dcext.encode(qweight, "packed"), DEVICE)
        packed_linear(x, packed, row_scale, activations=activations)
    return (
        f"{kind}, {tokens} tokens, activations {activations}: {time.perf_counter() - begin:.1f} s"
    )


def main() -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="without a GPU: runs a few in this process"
    )
    arguments = parser.parse_args()
    if DEVICE.type != "cuda":
        if not arguments.smoke:
            sys.exit("compile_kernels.py: expected a CUDA GPU, found none")
        for kind in ("int8", "packed"):
            print(compile_one((kind, 1, "int8")))
        return
    # Those that take longest first.
    tasks = sorted(product(("int8", "packed"), TOKENS, ACTIVATIONS), key=lambda task: -task[1])
    workers = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(tasks))
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawning) as pool:
        for line in pool.map(compile_one, tasks):
            print(line)


if __name__ == "__main__":
    main()
