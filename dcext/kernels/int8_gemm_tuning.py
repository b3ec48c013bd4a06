"""How ``int8_linear`` cuts its products into tiles, and how it finds the fastest way. Importing this imports triton.

Tokens fall into classes, with a few choices of tiles each. Which one is fastest is measured once for every new key of

    (tokens rounded up to a power of two from 8 to 4096, N, K, dtypes of all tensors, which optional ones there are)

by running the choices that fit on the device (Triton leaves out those that take too much shared memory), about a second
for each key, in the first call with it. What was measured is kept in Triton's cache on disk (``TRITON_CACHE_DIR``), for
this version of the kernel, of Triton, and this architecture. So a call before a CUDA graph is captured is all that it
needs; ``torch.compile`` measures the choices in its own way, once for each class. Devices of one process share what was
measured first. The outputs of W8A8 do not depend on the choice; the last
bits of float sums (W8A16, outlier columns) do.

``DCEXT_AUTOTUNE=0`` in the environment, read when this is imported, and Triton's interpreter take the first choice of
the class without measuring, which fits on every device from sm_80 on.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import triton

from dcext.kernels.int8_gemm_kernels import multiply


class _Tile(NamedTuple):
    rows: int
    tokens: int
    cols: int  # of int8 activations; half as many of 16 bits, which take as much space
    splits: int
    num_warps: int
    num_stages: int
    group: int = 8


# By the largest number of tokens. Weights in flight of a program are rows x cols x splits x (stages - 1) bytes; an H200
# wants 29 KB for each of its 132 multiprocessors (4.8 TB/s x 0.8 us).
_TILES: dict[int, tuple[_Tile, ...]] = {
    8: (
        _Tile(16, 8, 128, 4, 4, 5),
        _Tile(16, 8, 256, 2, 2, 4),
        _Tile(32, 8, 128, 4, 4, 4),
        _Tile(64, 8, 256, 1, 4, 4),
    ),
    16: (
        _Tile(16, 16, 128, 4, 4, 5),
        _Tile(16, 16, 256, 2, 2, 4),
        _Tile(32, 16, 128, 4, 4, 4),
        _Tile(64, 16, 256, 1, 4, 4),
    ),
    32: (
        _Tile(32, 32, 128, 2, 4, 4),
        _Tile(64, 32, 128, 1, 4, 5),
        _Tile(64, 32, 256, 1, 4, 4),
    ),
    64: (
        _Tile(64, 64, 128, 1, 4, 4),
        _Tile(32, 64, 128, 2, 4, 4),
        _Tile(128, 64, 128, 1, 4, 4),
    ),
    256: (
        _Tile(64, 128, 128, 1, 4, 4),
        _Tile(128, 64, 128, 1, 4, 4),
        _Tile(128, 128, 128, 1, 8, 3),
        _Tile(128, 128, 128, 1, 8, 4),
    ),
    2**31: (
        _Tile(128, 128, 128, 1, 8, 3),  # two programs on a Hopper multiprocessor
        _Tile(128, 128, 128, 1, 8, 4),
        _Tile(128, 256, 128, 1, 8, 3),
        _Tile(128, 256, 128, 1, 8, 4),
        _Tile(256, 128, 128, 1, 8, 4),
    ),
}
_SMALLEST_BUCKET, _LARGEST_BUCKET = 8, 4096


def _is_tuned() -> bool:
    """Whether to measure."""
    value = os.environ.get("DCEXT_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"DCEXT_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1" and not triton.knobs.runtime.interpret


def token_class(tokens: int) -> int:
    """The most tokens of the class that so many belong to."""
    return next(most for most in _TILES if tokens <= most)


def token_bucket(tokens: int) -> int:
    """Tokens as the key has them."""
    bucket = _SMALLEST_BUCKET
    while bucket < min(tokens, _LARGEST_BUCKET):
        bucket *= 2
    return bucket


def choices(most_tokens: int, itemsize: int) -> list[triton.Config]:
    """Of a class, for activations of ``itemsize`` bytes; the first one needs no measuring."""
    return [
        triton.Config(
            {
                "ROWS": tile.rows,
                "TOKENS": tile.tokens,
                "COLS": tile.cols // itemsize,
                "SPLITS": tile.splits,
                "GROUP": tile.group,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for tile in _TILES[most_tokens]
    ]


@functools.cache
def _tuners(kernel: Any) -> dict[tuple[int, int], Any]:
    """``kernel`` for every class and size of activations."""
    count = None if _is_tuned() else 1
    tune = functools.partial(triton.autotune, key=["bucket", "N", "K"], cache_results=True)
    return {
        (most, itemsize): tune(choices(most, itemsize)[:count])(kernel)
        for most in _TILES
        for itemsize in (1, 2)
    }


def tuned_multiply(tokens: int, itemsize: int) -> Any:
    """``multiply`` with the choices for so many tokens of ``itemsize`` bytes."""
    # torch looks for the names of kernels in what is returned here, for the keys of its caches.
    return _tuners(multiply)[token_class(tokens), itemsize]
