"""Where a layer's weights are, and in which codec."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY, DISK, DEVICE, HOST = "memory", "disk", "device", "host"
_DECODED_BY_HOST = ", decoded there"


@dataclass(frozen=True, order=True)
class Tier:
    """A place and a codec; as text ``"memory/packed"``, ``"disk/zstd"``, ``"host/zstd, decoded there"``.

    Attributes:
        place: without a device ``"memory"`` or ``"disk"``; with one ``"device"``, or ``"host"`` or ``"disk"``, from which
            weights are copied to the device ahead of their use.
        codec: ``"raw"``, ``"packed"`` or ``"zstd"``.
        decoded_by_host: whether the host's threads decode what is copied to the device.
    """

    place: str
    codec: str
    decoded_by_host: bool = False

    @classmethod
    def parse(cls, text: str) -> Tier:
        """The inverse of ``str``; whether there is such a place and codec is not asked.

        Raises:
            ValueError: not of the form ``PLACE/CODEC``.
        """
        head = text.removesuffix(_DECODED_BY_HOST)
        place, slash, codec = head.partition("/")
        if not (place and slash and codec):
            raise ValueError(f"tier: expected PLACE/CODEC, such as 'memory/packed', got {text!r}")
        return cls(place, codec, decoded_by_host=head != text)

    def __str__(self) -> str:
        return f"{self.place}/{self.codec}{_DECODED_BY_HOST if self.decoded_by_host else ''}"


HOST_DECODE = Tier(HOST, "zstd", decoded_by_host=True)
