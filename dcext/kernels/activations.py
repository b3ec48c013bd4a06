"""How the kernels that prepare activations cut their work. Importing this imports triton."""

from __future__ import annotations

import triton

_ELEMENTS = 4096  # of a program that holds part of its tokens; 32 for each thread of four warps
_TRANSPOSED_TOKENS = 8  # of a program that also stores transposed: runs of 8 or 16 bytes
_MAX_WHOLE = 32768  # elements that a program of 16 warps holds in registers: 64 of each thread
_WARP_ELEMENTS = 1024


def scale_tile(num_tokens: int, padded: int, *, transposed: bool = False) -> dict[str, int]:
    """Constants and options of ``scale`` for so many tokens in rows of ``padded``."""
    tokens = _tokens(num_tokens, transposed)
    cols = min(_ELEMENTS // tokens, triton.next_power_of_2(padded))
    return {"TOKENS": tokens, "COLS": cols, "num_warps": 4}


def quantize_tile(num_tokens: int, padded: int, *, transposed: bool = False) -> dict[str, int]:
    """Constants and options of ``quantize`` for so many tokens in rows of ``padded``."""
    tokens = _tokens(num_tokens, transposed)
    cols = triton.next_power_of_2(padded)
    if tokens == 1 and cols <= _MAX_WHOLE:
        num_warps = min(max(cols // _WARP_ELEMENTS, 1), 16)
        return {"TOKENS": 1, "COLS": cols, "WHOLE": True, "num_warps": num_warps}
    return {"TOKENS": tokens, "COLS": _ELEMENTS // tokens, "WHOLE": False, "num_warps": 4}


def _tokens(num_tokens: int, transposed: bool) -> int:
    """Of a program. A token of its own for each, so that its row may stay in registers, but not for columns of one."""
    return min(triton.next_power_of_2(num_tokens), _TRANSPOSED_TOKENS) if transposed else 1
