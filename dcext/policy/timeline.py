"""A forward pass that reads some of its layers from the disk, step by step.

Pieces of at most a slot are read one after the other, ahead of their use, each as soon as the disk is free and the piece
that lay in its slot before has been multiplied:

    read_end[j] = max(read_end[j - 1], used[j - slots]) + nbytes[j] / disk
    used[j] = max(used[j - 1], read_end[j]) + compute[j]

which is ``max(sum compute, sum nbytes / disk)`` when layers on the disk lie evenly, and more where many follow each other:
no more is read ahead than the slots hold. Passes follow each other, so that the first layers of one are read in the last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dcext import _C

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Memory to read into, where there is enough: 16 reads of 1.5 MiB, which fit in a last-level cache. With 64 MiB layers were
# read 10 to 15 % slower at 2.6 GB/s; with 16, 8 % slower at 4 GB/s.
SLOTS_NBYTES = 24 << 20
SLOTS, FEW_SLOTS = 16, 4
SLOT_NBYTES, SMALL_SLOT_NBYTES = 2 << 20, 512 << 10


def slots_of(nbytes: int) -> tuple[int, int]:
    """How many reads a stream has memory for, and their bytes: ``slot_nbytes_of`` in ``csrc/torch/ops_stream.cpp``."""
    small = min(SMALL_SLOT_NBYTES, nbytes // FEW_SLOTS)
    slot_nbytes = min(SLOT_NBYTES, max(nbytes // SLOTS, small))
    return nbytes // slot_nbytes, slot_nbytes


def pass_s(
    compute_s: Floats, read_nbytes: Integers, disk_bytes_per_s: float, slots_nbytes: int
) -> float:
    """Seconds of a pass among equal ones.

    Args:
        compute_s: seconds of each layer, in order; what is not a layer may be a layer too.
        read_nbytes: of it that are read from the disk; 0 for what is in memory.
        disk_bytes_per_s: of the disk.
        slots_nbytes: memory to read into.
    """
    return _C.pass_seconds(compute_s, read_nbytes, disk_bytes_per_s, *slots_of(slots_nbytes))


def anneal(
    compute_s: Floats,
    read_nbytes: Integers,
    memory_nbytes: Integers,
    weights: Floats,
    budget_nbytes: int,
    disk_bytes_per_s: float,
    slots_nbytes: int,
    choice: Integers,
    steps: int,
) -> Integers:
    """Tiers, ``(units,)``, that take no more time than those given, and less where so many steps find any.

    Simulated annealing, by the time of whole passes; equal arguments give equal tiers.

    Args:
        compute_s: seconds of each unit in each tier, in the order of a pass, for each number of tokens: ``(units, tiers,
            workloads)``; infinite where there is no such tier.
        read_nbytes: bytes that each unit reads from the disk in each tier, ``(units, tiers)``.
        memory_nbytes: bytes of host memory that each unit takes in each tier, ``(units, tiers)``.
        weights: how many passes there are of each number of tokens, ``(workloads,)``.
        budget_nbytes: of memory for all units.
        disk_bytes_per_s: of the disk.
        slots_nbytes: memory to read into.
        choice: tiers, ``(units,)``, that exist and keep the budget.
        steps: reads and layers gone through, of some nanoseconds each.

    Raises:
        ValueError: shapes differ from these.
    """
    disk = disk_bytes_per_s, *slots_of(slots_nbytes)
    tables = compute_s, read_nbytes, memory_nbytes, weights, budget_nbytes
    return _C.anneal_tiers(*tables, *disk, choice, steps, seed=0)
