"""How a model is to be compressed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dcext.checks import check_type, shown
from dcext.codec import CODECS
from dcext.quantize.recipe import Recipe, one_of, recipe_named, recipe_names, recipes

GRANULARITIES = ("row", "tensor")
ACTIVATIONS = ("int8", "none")
DEFAULT_RATIO = 2.2
# Least and most stored bits per weight that may be asked for, where a recipe has no limits of its own.
BITS_LIMITS = (0.0, 8.0)
_NUMBERS = {
    "target_bits": (int, float, type(None)),
    "target_ratio": (int, float, type(None)),
    "target_nbytes": (int, type(None)),
    "alpha": (int, float, str),
    "sparsity": (int, float),
    "level": (int, type(None)),
    "seed": (int,),
}


@dataclass(frozen=True)
class CompressionConfig:
    """The choices of ``compress_`` and of ``dcext compress``.

    Attributes:
        recipe: how the weights of linear layers become integers. ``"rate"``: steps and rounding of least loss at a given
            size, needs calibration text; ``"data-free"``: row-wise steps at a given size, needs none; ``"paper"``:
            scaling by activations, INT8 per tensor, pruning (arXiv:2502.15443); ``"int8"``: rounded to nearest, absmax
            scales. Embeddings, and ``lm_head``, are INT8 per row (with ``"int8"``: of its granularity).
        target_bits: of ``"rate"`` and ``"data-free"``: stored bits per weight of the layers that they quantize, every
            byte counted.
        target_ratio: the same as a ratio over INT8, ``8 / target_bits``. Where no target is given, 2.2; for ``"rate"`` with codec
            ``"packed"`` 4.25 bits, which lose as little.
        target_nbytes: the same as a size of all tensors of the model.
        alpha: of ``"paper"``: exponent of the scaling, or ``"model"`` or ``"layer"`` to search 0, 0.1 .. 1.
        sparsity: of ``"paper"``: share of the weights that are zero after pruning.
        granularity: empty for the recipe's own. Of ``"int8"``: a scale per output ``"row"`` (most accurate) or per
            ``"tensor"`` (compresses much
            better); ``"row"`` unless told otherwise. Of ``"paper"``: what the sparsity is a share of, ``"tensor"`` unless
            told otherwise.
        codec: ``"auto"``, ``"raw"``, ``"zstd"`` or ``"packed"``; see ``dcext.encode``. Recipe ``"rate"`` rounds to few
            values for ``"packed"``, to what has short codes for the others.
        level: Zstandard level 1 to 22, or None for literals only.
        activations: ``"int8"`` quantizes each token dynamically (W8A8), ``"none"`` keeps them (W8A16).
        seed: of what recipe ``"rate"`` draws.

    Raises:
        TypeError: a number that is none.
        ValueError: a choice that does not exist, a number out of reach, or more than one target.
    """

    recipe: str = "rate"
    target_bits: float | None = None
    target_ratio: float | None = None
    target_nbytes: int | None = None
    alpha: float | str = "model"
    sparsity: float = 0.0
    granularity: str = ""
    codec: str = "auto"
    level: int | None = None
    activations: str = "int8"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe in recipe_names() and not self.granularity:
            object.__setattr__(self, "granularity", self.method.granularity)
        for field, known in (
            ("recipe", recipe_names()),
            ("granularity", GRANULARITIES),
            ("codec", CODECS),
            ("activations", ACTIVATIONS),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(
                    f"CompressionConfig: {field}: expected {one_of([*known])}, got {shown(value)}"
                )
        for field, kinds in _NUMBERS.items():
            expected = "a whole number" if float not in kinds else "a number"
            check_type(f"CompressionConfig: {field}", getattr(self, field), kinds, expected)
        if self.level is not None and (self.codec != "zstd" or not 1 <= self.level <= 22):
            raise ValueError(
                "CompressionConfig: level: expected 1..22 with codec 'zstd', or none, "
                f"got {self.level} with codec {self.codec!r}"
            )
        self._check_target()
        self._check_pruning()

    @property
    def method(self) -> Recipe:
        """The recipe itself."""
        return recipe_named(self.recipe)

    def _check_taken(self, fields: str, group: str) -> None:
        """Raises where the recipe takes nothing of a group of fields, of which some are given."""
        if group not in self.method.takes:
            takers = one_of([recipe.name for recipe in recipes() if group in recipe.takes])
            raise ValueError(
                f"CompressionConfig: {fields}: expected recipe {takers}, got {self.recipe!r}"
            )

    def _check_target(self) -> None:
        targets = {
            name: getattr(self, name)
            for name in ("target_bits", "target_ratio", "target_nbytes")
            if getattr(self, name) is not None
        }
        if targets:
            self._check_taken(", ".join(targets), "target")
        if len(targets) > 1:
            raise ValueError(
                f"CompressionConfig: {', '.join(targets)}: expected only one of them, got {list(targets.values())}"
            )
        for name, value in targets.items():
            least, most = self.bits_limits
            if name == "target_ratio":
                least, most = 8 / most, 8 / least if least else math.inf
            if name == "target_nbytes":
                least, most = 1, math.inf
            if not least <= value <= most or value in (0, math.inf):
                raise ValueError(
                    f"CompressionConfig: {name}: expected {least:.4g} to {most:.4g} with recipe {self.recipe!r} and codec "
                    f"{self.codec!r}, got {value}"
                )

    def _check_pruning(self) -> None:
        given = ["alpha"] * (self.alpha != "model") + ["sparsity"] * (self.sparsity != 0)
        if given:
            self._check_taken(", ".join(given), "pruning")
        if isinstance(self.alpha, str):
            if self.alpha not in ("model", "layer"):
                raise ValueError(
                    f"CompressionConfig: alpha: expected a number, 'model' or 'layer', got {self.alpha!r}"
                )
        elif not 0 <= self.alpha <= 1:
            raise ValueError(f"CompressionConfig: alpha: expected 0 to 1, got {self.alpha}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"CompressionConfig: sparsity: expected 0 to 1, got {self.sparsity}")

    @property
    def bits_limits(self) -> tuple[float, float]:
        """Least and most stored bits per weight that may be asked for."""
        return self.method.limits.get(self.codec, BITS_LIMITS)

    @property
    def bits(self) -> float:
        """Stored bits per weight to aim at, from ``target_bits`` or ``target_ratio``.

        Raises:
            ValueError: the target is a size, which takes a model to become bits.
        """
        if self.target_nbytes is not None:
            raise ValueError("bits: expected target_bits or target_ratio, got target_nbytes")
        if self.target_bits is not None:
            return self.target_bits
        if self.target_ratio is not None:
            return 8 / self.target_ratio
        return self.method.default_bits.get(self.codec, 8 / DEFAULT_RATIO)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)
