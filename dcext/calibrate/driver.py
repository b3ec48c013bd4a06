"""A model compressed block by block: each is calibrated, replaced, and run on to feed the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dcext.calibrate.group_recipe import GroupRecipe
from dcext.calibrate.inputs import ModelInputs, calibrating, model_inputs
from dcext.calibrate.job import Job
from dcext.calibrate.kept import pack_sensitivity, unpack_sensitivity
from dcext.calibrate.repeated import later_statistics
from dcext.calibrate.run import SENSITIVITY_TOKENS, BlockRun, stream_dtype
from dcext.calibrate.sensitivity import Sensitivity, measure_sensitivity
from dcext.calibrate.stacks import find_blocks
from dcext.calibrate.trace import Trace, trace_calls
from dcext.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class Calibrated:
    """A model whose calls of blocks are known, for the passes that a recipe makes over them.

    Layers are compressed in the order in which the model calls the blocks that hold them. Each block is calibrated on
    what the blocks before it give, whatever lies between them; so a decoder attends to the compressed encoder. Layers
    that the calibration set does not reach are rounded without data.

    Attributes:
        job: what is compressed.
        inputs: that the model is called with.
        trace: of the calls of its blocks.
    """

    job: Job
    inputs: ModelInputs
    trace: Trace

    @classmethod
    @contextmanager
    def of(cls, job: Job) -> Iterator[Calibrated]:
        """The model of a job, which has a calibration set.

        Raises:
            ValueError: a calibration set that the model does not take, weights that are not finite, a model that calls
                its blocks now and then differently.
        """
        assert job.calibration is not None
        inputs = model_inputs(job.model, job.calibration)
        with calibrating(job.model):
            blocks = find_blocks(job.model)
            yield cls(
                job, inputs, trace_calls(job.model, blocks, job.source, inputs, stream_dtype())
            )

    def run(
        self,
        recipe: GroupRecipe,
        later: dict[str, InputStatistics],
        share: float = 1.0,
        *,
        trial: bool = False,
    ) -> None:
        """One pass over all blocks.

        Args:
            recipe: quantizes their layers.
            later: of ``later``.
            share: of the job's work that this pass is.
            trial: whether the recipe only learns from the layers (``try_group``).
        """
        BlockRun(self.job, self.inputs, self.trace, recipe, later, share, trial).run()

    def later(
        self, make: Callable[[int], InputStatistics] = InputStatistics
    ) -> dict[str, InputStatistics]:
        """``later_statistics``, on the windows of the sensitivity pass; ``make`` is called with a layer's columns."""
        some = self.inputs.spread(SENSITIVITY_TOKENS)
        return later_statistics(
            self.job.model, self.job.source, some, self.trace, stream_dtype(), make
        )

    def sensitivity(self, later: dict[str, InputStatistics], share: float) -> Sensitivity:
        """The sensitivity pass, or what an interrupted job kept of it; layers not to be compressed are left out."""
        loaded = None if self.job.resume is None else self.job.resume.load("sensitivity")
        if loaded is not None:
            self.job.progress("sensitivity", share)
            return unpack_sensitivity(*loaded)
        step = share / (2 * len(self.trace.sequence))
        found = measure_sensitivity(
            self.job.model,
            self.trace.blocks,
            self.job.source,
            self.inputs.spread(SENSITIVITY_TOKENS).tensors,
            dtype=stream_dtype(),
            seed=self.job.config.seed,
            progress=lambda steps: self.job.progress("sensitivity", steps * step),
            trace=self.trace,
            later=later,
        )
        names = {self.trace.owners.get(name, name) for name in self.job.names}
        groups = [[name for name in group if name in names] for group in found.groups]
        result = Sensitivity(
            {name: value for name, value in found.output.items() if name in names},
            [group for group in groups if group],
            {name: value for name, value in found.samples.items() if name in names},
        )
        if self.job.resume is None:
            return result
        self.job.resume.save("sensitivity", *pack_sensitivity(result))
        loaded = self.job.resume.load(
            "sensitivity"
        )  # mapped from the file: memory is left to the blocks
        return result if loaded is None else unpack_sensitivity(*loaded)
