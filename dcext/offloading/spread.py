"""Which of several things of known sizes stay where there is not room for all."""

from __future__ import annotations

from collections.abc import Sequence


def spread_evenly(nbytes: Sequence[int], room: int) -> list[bool]:
    """Chooses things that fit in so much room, evenly spread over their order.

    All bytes cost the same to copy or to read. Spread evenly, the things that stay give time to fetch those between them.

    Args:
        nbytes: sizes, in the order of use.
        room: bytes for those that stay.

    Returns:
        Whether each stays.
    """
    share, credit, left = min(1.0, room / max(sum(nbytes), 1)), 0.0, room
    stays = []
    for size in nbytes:
        credit += share * size
        stays.append(size <= min(credit, left))
        if stays[-1]:
            credit -= size
            left -= size
    return stays
