"""What products share that split their columns between the warps of a program. Importing this imports triton."""

import triton
import triton.language as tl


@triton.jit
def spread(offsets, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """The same offsets for every split, each STEP behind the one before; a single split adds no dimension.

    Plain matrices are what wgmma takes.
    """
    if SPLITS == 1:
        return offsets
    else:
        return (tl.arange(0, SPLITS) * STEP)[:, None, None] + offsets[None, :, :]
