"""Where payloads come from, and the memory that they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dcext import _C
from dcext.codec import verify_payload
from dcext.format import CheckpointReader

HUGE_PAGE_NBYTES = 2 << 20


def to_weight_memory(payload: Tensor) -> Tensor:
    """A copy of a payload in memory of its own, in huge pages where the system gives them and it fills one."""
    if payload.numel() < HUGE_PAGE_NBYTES:
        return payload.clone()
    return _C.empty_weights(payload.numel()).copy_(payload)


@dataclass(frozen=True)
class Origin:
    """Where a payload comes from: a tensor of a checkpoint."""

    reader: CheckpointReader
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.reader.info(self.name).nbytes

    def view(self) -> Tensor:
        """Its bytes as mapped memory, not verified: pages that the system reads when they are touched, and may drop."""
        return self.reader.get(self.name)

    def load(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """A verified copy in weight memory.

        Raises:
            FormatError: it is damaged.
        """
        self.reader.verify(self.name, progress)
        payload = to_weight_memory(self.view())
        self.reader.release(self.name)  # it stays mapped, and would count as memory of this process
        verify_payload(payload)
        return payload
