"""A forward pass that reads some of its layers from the disk, step by step.

Pieces of at most a slot are read one after the other, ahead of their use, each as soon as the disk is free and the piece
that lay in its slot before has been multiplied:

    read_end[j] = max(read_end[j - 1], used[j - slots]) + nbytes[j] / disk
    used[j] = max(used[j - 1], read_end[j]) + compute[j]

which is ``max(sum compute, sum nbytes / disk)`` when layers on the disk lie evenly, and more where many follow each other:
no more is read ahead than the slots hold. Passes follow each other, so that the first layers of one are read in the last.
"""

from __future__ import annotations

from collections.abc import Sequence

SLOTS, FEW_SLOTS = 16, 4
SLOT_NBYTES, SMALL_SLOT_NBYTES = 2 << 20, 512 << 10
SETTLED = 3  # passes, from which on they are equal


def slots_of(nbytes: int) -> tuple[int, int]:
    """How many reads a stream has memory for, and their bytes: ``slot_nbytes_of`` in ``csrc/ops_stream.cpp``."""
    small = min(SMALL_SLOT_NBYTES, nbytes // FEW_SLOTS)
    slot_nbytes = min(SLOT_NBYTES, max(nbytes // SLOTS, small))
    return nbytes // slot_nbytes, slot_nbytes


def pass_s(
    compute: Sequence[float], nbytes: Sequence[int], disk_bytes_per_s: float, slots_nbytes: int
) -> float:
    """Seconds of a pass among equal ones.

    Args:
        compute: seconds of each layer, in order; what is not a layer may be a layer too.
        nbytes: of it that are read from the disk; 0 for what is in memory.
        disk_bytes_per_s: of the disk.
        slots_nbytes: memory to read into.
    """
    slots, slot_nbytes = slots_of(slots_nbytes)
    steps = _pieces(compute, nbytes, slot_nbytes)
    read_end, used = 0.0, 0.0
    released = [0.0] * slots  # when the last piece in each slot was used
    slot, begin = 0, 0.0
    for _ in range(SETTLED):
        begin = used
        for seconds, size in steps:
            if size:
                read_end = max(read_end, released[slot]) + size / disk_bytes_per_s
                used = max(used, read_end) + seconds
                released[slot] = used
                slot = (slot + 1) % slots
            else:
                used += seconds
    return used - begin


def _pieces(
    compute: Sequence[float], nbytes: Sequence[int], slot_nbytes: int
) -> list[tuple[float, float]]:
    """Seconds and bytes of every read, and of what is computed without."""
    steps = []
    for seconds, size in zip(compute, nbytes, strict=True):
        count = max(1, -(-size // slot_nbytes))
        steps += [(seconds / count, size / count)] * count
    return steps
