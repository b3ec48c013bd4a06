"""Units of weights that are copied from host memory to a device ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dcext import _C
from dcext.codec import payload_info
from dcext.weights.host_stream import HostStream
from dcext.weights.origin import Origin

READS_NBYTES = 64 << 20
_ALIGNMENT = 256  # of parts in a slot: what kernels load at once, and more
# Bytes of a buffer that weights are decoded into; two of them keep the link and the decoder busy.
_RING_NBYTES = 8 << 20
_RING_BUFFERS = 2


@dataclass(frozen=True)
class HostDecoded:
    """A part that is decoded by the host's threads on its way, and arrives as ``(out_features, in_features)`` int8.

    Attributes:
        payload: 1-D uint8 on the CPU, of codec raw or zstd; verified before (``dcext.verify_payload``).
    """

    payload: Tensor


@dataclass(frozen=True)
class FromFile:
    """A payload that is read from its file, and compared with its checksums, whenever the unit is copied.

    It arrives as ``(nbytes,)`` uint8 without its header and chunk table, which stay undefined.

    Attributes:
        origin: of the payload.
    """

    origin: Origin


@dataclass(frozen=True)
class _Place:
    """Where a part lies in its slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape)


class DeviceStream:
    """Static slots on a device, and units in pinned host memory that are copied there ahead of their use.

    A unit's parts are used between ``fetch`` and ``fetched``, on torch's current stream; what is enqueued there finds
    them, and nothing waits for the device. Unit u always lies in slot u % ``num_slots``. The order in which units are
    used is learnt; another order costs copies, never correctness. A thread may have several units in use if their slots
    differ; where other threads do so too, it must begin them in ascending order of slots.

    ``fetch`` and ``fetched`` may be called inside what ``torch.compile`` compiles, with backend ``inductor`` (others that
    copy what is mutated, as ``aot_eager`` does, are refused); give ``fetched`` the output then. In CUDA graphs,
    units are copied by the graph itself; once there was one, nothing is copied ahead outside graphs. A graph that ends
    before the last unit needs ``join``.
    Units with ``HostDecoded`` parts cannot be captured, and graphs must not be replayed once the stream is gone.

    Nothing here has run on a GPU yet; on the CPU a thread copies.

    Attributes:
        handle: by which operators find the stream.
        disk: who reads files, or None.
        ring_nbytes: host memory that weights are decoded into on their way.
        slots: ``num_slots`` 1-D uint8 tensors on the device, all of the size of the largest unit.
    """

    def __init__(
        self,
        units: Iterable[Sequence[Tensor | HostDecoded | FromFile]],
        device: torch.device | str,
        *,
        num_slots: int = 2,
        reads_nbytes: int = READS_NBYTES,
        max_ahead_nbytes: int | None = None,
        ahead_in_captures: bool = True,
    ) -> None:
        """Copies all parts to pinned memory of their exact size, and allocates the slots.

        Args:
            units: the parts of each unit: contiguous uint8 or int8 on the CPU, such as a payload and its seek index, or
                what is decoded on its way. Taken one by one, so that they need not be in memory together.
            device: where they are copied to.
            reads_nbytes: pinned memory to read files into, where there are ``FromFile`` parts.
            num_slots: at least 1; with 1, nothing is copied while another unit is used.
            max_ahead_nbytes: bound on the bytes of copies ahead of use that are not done yet; one unit is always
                copied ahead.
            ahead_in_captures: whether CUDA graphs copy ahead.

        Raises:
            ValueError: there are no units, no parts or no slots.
            TypeError: a part is neither uint8 nor int8.
            RuntimeError: dcext was built without the device, or it refused.
        """
        if num_slots < 1:
            raise ValueError(f"DeviceStream: num_slots: expected at least 1, got {num_slots}")
        self._places: list[list[_Place]] = []
        host = []
        decoded: list[list[tuple[Tensor, int]]] = []
        panel_nbytes = 0
        disk: list[list[int]] = []
        origins: dict[str, Origin] = {}
        groups: list[int] = []
        for parts in units:
            if not parts:
                raise ValueError("DeviceStream: units: expected at least 1 part in each, got none")
            places = _places(parts)
            self._places.append(places)
            host.append(_pin_parts(parts, places))
            decoded.append([])
            disk.append([])
            for part, place in zip(parts, places, strict=True):
                if isinstance(part, FromFile):
                    disk[-1].append(place.offset)
                    origins[f"{len(groups)} {part.origin.name}"] = part.origin
                    groups.append(sum(map(bool, disk)) - 1)
                if isinstance(part, HostDecoded):
                    decoded[-1].append((part.payload, place.offset))
                    panel_rows = payload_info(part.payload)["panel_rows"]
                    panel_nbytes = max(panel_nbytes, panel_rows * place.shape[1])
        if not self._places:
            raise ValueError("DeviceStream: units: expected at least 1, got none")
        nbytes = max(places[-1].end for places in self._places)
        self.slots = [
            torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(num_slots)
        ]
        has_decoded = panel_nbytes > 0
        ring = torch.empty(0, 0, dtype=torch.uint8)
        if has_decoded:
            size = max(panel_nbytes, min(_RING_NBYTES, nbytes))
            ring = _C.empty_weights(_RING_BUFFERS * size).view(_RING_BUFFERS, size)
        self.ring_nbytes = ring.nbytes
        self.disk: HostStream | None = None
        if origins:
            self.disk = HostStream(origins, reads_nbytes, units=groups)
        self._stream = _C.DeviceStream(
            host,
            decoded,
            self.slots,
            ring,
            None if self.disk is None else self.disk.native,
            disk,
            2**63 - 1 if max_ahead_nbytes is None else max_ahead_nbytes,
            ahead_in_captures,
        )
        self.handle: int = self._stream.handle

    def __len__(self) -> int:
        return len(self._places)

    def slot(self, unit: int) -> Tensor:
        """The whole slot of a unit."""
        return self.slots[unit % len(self.slots)]

    def parts(self, unit: int) -> list[Tensor]:
        """Views of the unit's parts in its slot, with the shapes and dtypes that they were given."""
        slot = self.slot(unit)
        return [
            slot[place.offset : place.end].view(place.dtype).view(place.shape)
            for place in self._places[unit]
        ]

    def fetch(self, unit: int) -> list[Tensor]:
        """Begins to use a unit: what is enqueued from now on finds its parts.

        Raises:
            RuntimeError: the stream is closed, the device refused, or the thread uses another unit of the same slot.
            FormatError: a payload is damaged.
        """
        torch.ops.dcext.fetch_(self.handle, unit, self.slot(unit))
        return self.parts(unit)

    def fetched(self, unit: int, after: Tensor | None = None) -> None:
        """Ends it: all that reads the parts has been enqueued.

        Args:
            unit: that was fetched.
            after: what was computed from all that reads the parts, such as a layer's output. Only ``torch.compile``
                needs it, which would else move reads behind this call, and fail.
        """
        torch.ops.dcext.fetched_(self.handle, unit, self.slot(unit), after)

    @contextmanager
    def using(self, unit: int) -> Iterator[list[Tensor]]:
        """``fetch`` and ``fetched`` around a block."""
        parts = self.fetch(unit)
        try:
            yield parts
        finally:
            self.fetched(unit)

    def join(self) -> None:
        """Has torch's current stream, if it is being captured, wait for all copies ahead: before such a capture ends."""
        self._stream.join()

    def statistics(self) -> dict[str, int]:
        """Counts so far.

        Returns:
            ``begins``; ``hits`` (uses whose bytes were in the slot or on their way); ``late`` (hits whose bytes were still
            on their way); ``copied_nbytes`` (outside graphs); ``stall_ns`` (time spent in ``fetch``).
        """
        return self._stream.statistics()

    def close(self) -> None:
        """Lets all who fetch, waiting or to come, fail; waits for copies under way."""
        self._stream.close()


def _places(parts: Sequence[Tensor | HostDecoded | FromFile]) -> list[_Place]:
    places: list[_Place] = []
    for part in parts:
        end = places[-1].end if places else 0
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        if isinstance(part, FromFile):
            places.append(_Place(offset, (part.origin.nbytes,), torch.uint8))
            continue
        if isinstance(part, HostDecoded):
            places.append(_Place(offset, payload_info(part.payload)["shape"], torch.int8))
            continue
        if part.dtype not in (torch.uint8, torch.int8):
            raise TypeError(
                f"DeviceStream: units: expected torch.uint8 or torch.int8, got {part.dtype}"
            )
        places.append(_Place(offset, tuple(part.shape), part.dtype))
    return places


def _pin_parts(
    parts: Sequence[Tensor | HostDecoded | FromFile], places: list[_Place]
) -> list[tuple[Tensor, int]]:
    """Neighbouring parts as one tensor each, laid out as in the slot, with their places there."""
    runs: list[list[tuple[Tensor, _Place]]] = [[]]
    for part, place in zip(parts, places, strict=True):
        if isinstance(part, (HostDecoded, FromFile)):
            runs.append([])
        elif part.numel() > 0:
            runs[-1].append((part, place))
    pinned = []
    for run in filter(None, runs):
        begin = run[0][1].offset
        memory = _C.empty_weights(run[-1][1].end - begin)
        for part, place in run:
            target = memory[place.offset - begin : place.end - begin]
            target.view(place.dtype).view(place.shape).copy_(part)
        pinned.append((memory, begin))
    return pinned
