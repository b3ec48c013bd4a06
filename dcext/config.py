"""How a model is to be compressed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dcext.codec import CODECS

RECIPES = ("int8",)
GRANULARITIES = ("row", "tensor")
ACTIVATIONS = ("int8", "none")


@dataclass(frozen=True)
class CompressionConfig:
    """The choices of ``compress_`` and of ``dcext compress``.

    Attributes:
        recipe: how weights become integers. ``"int8"``: rounded to nearest, absmax scales.
        granularity: scale per output ``"row"`` (most accurate) or one per ``"tensor"`` (compresses much better).
        codec: ``"auto"``, ``"raw"`` or ``"zstd"``; see ``dcext.encode``.
        level: Zstandard level 1 to 22, or None for literals only.
        activations: ``"int8"`` quantizes each token dynamically (W8A8), ``"none"`` keeps them (W8A16).

    Raises:
        ValueError: a choice that does not exist.
    """

    recipe: str = "int8"
    granularity: str = "row"
    codec: str = "auto"
    level: int | None = None
    activations: str = "int8"

    def __post_init__(self) -> None:
        for field, known in (
            ("recipe", RECIPES),
            ("granularity", GRANULARITIES),
            ("codec", CODECS),
            ("activations", ACTIVATIONS),
        ):
            value = getattr(self, field)
            if value not in known:
                expected = " or ".join(repr(choice) for choice in known)
                raise ValueError(f"CompressionConfig: {field}: expected {expected}, got {value!r}")
        if self.level is not None and (self.codec != "zstd" or not 1 <= self.level <= 22):
            raise ValueError(
                "CompressionConfig: level: expected None, or 1..22 with codec 'zstd', "
                f"got {self.level} with codec {self.codec!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)
