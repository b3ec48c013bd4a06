"""Layers whose payloads stay in their files and are read, ahead of their use, while the model runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcext import _C
from dcext.weights.origin import Origin


@dataclass(frozen=True)
class StreamStatistics:
    """What a stream has done since it was made.

    Attributes:
        read_nbytes: bytes read from files.
        used_nbytes: bytes read that layers multiplied.
        dropped_nbytes: bytes read for nothing, because layers ran in another order than expected.
        layers: calls of layers.
        pieces: reads that layers asked for.
        stalls: reads that a layer had to wait for.
        stall_s: seconds in which a layer waited.
        reading_s: seconds in which the files were read.
        peak_nbytes: most memory in use for reads at a time.
        slots_nbytes: memory that there is for them.
        page_cache: ``"bypassed"``, ``"dropped"`` (the file system cannot bypass it) or ``"used"``.
    """

    read_nbytes: int
    used_nbytes: int
    dropped_nbytes: int
    layers: int
    pieces: int
    stalls: int
    stall_s: float
    reading_s: float
    peak_nbytes: int
    slots_nbytes: int
    page_cache: str

    @property
    def overlap(self) -> float:
        """Share of the reading time during which no layer waited: 1 where computing hides the disk."""
        return 1 - min(self.stall_s / self.reading_s, 1.0) if self.reading_s > 0 else 1.0

    @property
    def read_gbps(self) -> float:
        """GB/s while files were read."""
        return self.read_nbytes / self.reading_s / 1e9 if self.reading_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "overlap": self.overlap, "read_gbps": self.read_gbps}

    def __str__(self) -> str:
        return (
            f"read {self.read_nbytes / 1e9:.2f} GB at {self.read_gbps:.2f} GB/s ({self.dropped_nbytes / 1e6:.0f} MB "
            f"for nothing), {self.layers} layers, waited {self.stall_s:.2f} of {self.reading_s:.2f} s "
            f"(overlap {100 * self.overlap:.0f} %), at most {self.peak_nbytes / 1e6:.0f} MB in flight"
        )


class HostStream:
    """Reads payloads into memory of fixed size, a few huge pages each, in the order in which layers use them."""

    def __init__(
        self,
        origins: Mapping[str, Origin],
        slots_nbytes: int,
        *,
        page_cache: bool = False,
        units: Sequence[int] | None = None,
    ) -> None:
        """Opens the files.

        Args:
            origins: of each layer's payload, by the layer's name, in the order in which layers are used at first.
            slots_nbytes: memory to read into.
            units: the unit of each payload, ascending from 0, where several are read together and copied to a device; None
                for layers that run on the CPU.
            page_cache: whether the system may keep what was read in memory that is not counted here.

        Raises:
            FormatError: a payload's header is corrupt.
            RuntimeError: a file cannot be opened.
            ValueError: ``slots_nbytes`` has no room for two reads.
        """
        paths: dict[str, int] = {}
        payloads = []
        numbers = [-1] * len(origins) if units is None else units
        for (name, origin), unit in zip(origins.items(), numbers, strict=True):
            info = origin.reader.info(origin.name)
            path = str(origin.reader.directory / info.file)
            file = paths.setdefault(path, len(paths))
            payloads.append((name, file, info.offset, origin.view(), unit))
        self.page_cache = page_cache
        self.native = _C.HostStream(list(paths), payloads, slots_nbytes, page_cache)
        self.handle: int = self.native.handle
        self.names: Sequence[str] = tuple(origins)
        self.slots_nbytes: int = self.native.slots_nbytes
        self._requested_nbytes = slots_nbytes

    def is_for(self, names: Sequence[str], slots_nbytes: int, page_cache: bool) -> bool:
        """Whether a stream that is made anew for these layers of the same model would be equal."""
        wanted = (tuple(names), slots_nbytes, page_cache)
        same = (self.names, self._requested_nbytes, self.page_cache) == wanted
        return same and self.native.is_usable  # a forked child makes its own

    def statistics(self) -> StreamStatistics:
        """What was done so far."""
        dropped = "bypassed" if self.native.is_direct else "dropped"
        return StreamStatistics(
            **self.native.statistics(),
            slots_nbytes=self.slots_nbytes,
            page_cache="used" if self.page_cache else dropped,
        )

    def read_all(self) -> float:
        """Reads all layers once and computes nothing: what streaming can reach at best, with the same reads.

        Returns:
            Bytes per second.
        """
        before = self.native.statistics()["used_nbytes"]
        begin = time.perf_counter()
        self.native.read_all()
        seconds = time.perf_counter() - begin
        return (self.native.statistics()["used_nbytes"] - before) / seconds

    def close(self) -> None:
        """Drops what was read ahead. Layers that run, or are called later, raise ``RuntimeError``."""
        self.native.close()


class StreamedWeight:
    """A layer's weights on the disk: what takes the place of a payload that is resident on a device.

    Attributes:
        stream: who reads them.
        unit: their number there.
    """

    def __init__(self, stream: HostStream, unit: int) -> None:
        self.stream = stream
        self.unit = unit
        self.handle = stream.handle
