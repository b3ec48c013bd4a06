"""How a model is to be compressed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dcext.codec import CODECS
from dcext.quantize.recipe import Recipe, one_of, recipe_named, recipe_names, recipes

GRANULARITIES = ("row", "tensor")
ACTIVATIONS = ("int8", "none")
DEFAULT_RATIO = 2.2


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
        granularity: empty for the recipe's own. Of ``"int8"``: a scale per output ``"row"`` (most accurate) or per ``"tensor"`` (compresses much
            better); ``"row"`` unless told otherwise. Of ``"paper"``: what the sparsity is a share of, ``"tensor"`` unless
            told otherwise.
        codec: ``"auto"``, ``"raw"``, ``"zstd"`` or ``"packed"``; see ``dcext.encode``. Recipe ``"rate"`` rounds to few
            values for ``"packed"``, to what has short codes for the others.
        level: Zstandard level 1 to 22, or None for literals only.
        activations: ``"int8"`` quantizes each token dynamically (W8A8), ``"none"`` keeps them (W8A16).
        seed: of what recipe ``"rate"`` draws.

    Raises:
        ValueError: a choice that does not exist, or more than one target.
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
                    f"CompressionConfig: {field}: expected {one_of([*known])}, got {value!r}"
                )
        if self.level is not None and (self.codec != "zstd" or not 1 <= self.level <= 22):
            raise ValueError(
                "CompressionConfig: level: expected None, or 1..22 with codec 'zstd', "
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
            self._check_taken(next(iter(targets)), "target")
        if len(targets) > 1 or any(not 0 < value < math.inf for value in targets.values()):
            raise ValueError(
                f"CompressionConfig: target: expected one of bits, ratio and nbytes, positive, got {targets}"
            )

    def _check_pruning(self) -> None:
        if self.alpha != "model" or self.sparsity != 0:
            self._check_taken("alpha, sparsity", "pruning")
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
