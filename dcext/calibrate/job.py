"""What a recipe is given to compress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dcext.calibrate.coded import CodedLayer
from dcext.calibrate.inputs import Calibration
from dcext.calibrate.resume import ResumeFolder
from dcext.calibrate.source import BlockSource
from dcext.calibrate.stacks import find_blocks, linear_layers
from dcext.config import CompressionConfig
from dcext.nn.matrix import matrix_of

EmitFn = Callable[[str, CodedLayer], None]
ProgressFn = Callable[[str, float], None]


@dataclass
class Job:
    """One compression: what is compressed, how, and where its steps are kept.

    Attributes:
        model: possibly on the meta device.
        source: gives the weights of its blocks.
        calibration: as for ``model_inputs``; None for recipes that take none.
        config: names the recipe.
        names: the layers to compress; other layers in the blocks stay.
        emit: called with each layer's name and what became of it, once no more of its blocks is to run. Layers that
            share a weight are given the same.
        progress: called with a label and the share of this job that was just done.
        resume: where steps are kept, or None.
    """

    model: nn.Module
    source: BlockSource
    calibration: Calibration | None
    config: CompressionConfig
    names: set[str]
    emit: EmitFn
    progress: ProgressFn
    resume: ResumeFolder | None = None

    def layers(self) -> Iterator[tuple[str, Tensor]]:
        """Name and matrix ``(N, K)`` of each layer to compress; one block is in memory at a time."""
        for block in find_blocks(self.model):
            with self.source.weights(block):
                weights = {
                    name: matrix_of(layer)
                    for name, layer in linear_layers(block).items()
                    if name in self.names
                }
            yield from weights.items()

    def num_weights(self) -> int:
        """Of all layers to compress."""
        return sum(matrix_of(self.model.get_submodule(name)).numel() for name in self.names)
