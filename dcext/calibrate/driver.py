"""A model compressed block by block: each is calibrated, replaced, and run on to feed the next."""

from __future__ import annotations

from collections.abc import Callable

from dcext.calibrate.inputs import ModelInputs, calibrating, model_inputs
from dcext.calibrate.kept import pack_sensitivity, unpack_sensitivity
from dcext.calibrate.recipes import PaperRecipe, RateRecipe, rate_statistics
from dcext.calibrate.repeated import later_statistics
from dcext.calibrate.run import SENSITIVITY_TOKENS, BlockRun, Job, stream_dtype
from dcext.calibrate.sensitivity import Sensitivity, measure_sensitivity
from dcext.calibrate.stacks import find_blocks
from dcext.calibrate.trace import Trace, trace_calls
from dcext.quantize.statistics import InputStatistics

__all__ = ["Job", "compress_blocks"]

SENSITIVITY_SHARE = 0.35  # of all work with recipe ``rate``


def compress_blocks(job: Job) -> list[dict[str, float]]:
    """Compresses the layers ``job.names``, in the order in which the model calls the blocks that hold them.

    Each block is calibrated on what the compressed blocks before it give, whatever lies between them; so a decoder
    attends to the compressed encoder. Layers that the calibration set does not reach are rounded without data.

    Returns:
        Recipe ``paper``'s table of alphas; empty for ``rate``.

    Raises:
        ValueError: a calibration set that the model does not take, weights that are not finite, a model that calls its
            blocks now and then differently.
    """
    inputs = model_inputs(job.model, job.calibration)
    with calibrating(job.model):
        trace = trace_calls(job.model, find_blocks(job.model), job.source, inputs, stream_dtype())
        recipe: RateRecipe | PaperRecipe
        if job.config.recipe == "rate":
            later = _later(job, inputs, trace, rate_statistics)
            sensitivity = _sensitivity(job, inputs, trace, later, SENSITIVITY_SHARE)
            recipe = RateRecipe(job.config, sensitivity)
            BlockRun(job, inputs, trace, recipe, later, 1 - SENSITIVITY_SHARE).run()
            return []
        recipe = PaperRecipe(job.config)
        later = _later(job, inputs, trace, InputStatistics)
        if job.config.alpha == "model":
            BlockRun(job, inputs, trace, recipe, later, 0.5, trial=True).run()
            recipe.choose_alpha()
            BlockRun(job, inputs, trace, recipe, later, 0.5).run()
        else:
            BlockRun(job, inputs, trace, recipe, later, 1.0).run()
        return recipe.alphas()


def _later(
    job: Job, inputs: ModelInputs, trace: Trace, make: Callable[[int], InputStatistics]
) -> dict[str, InputStatistics]:
    """``later_statistics``, on the windows of the sensitivity pass."""
    some = inputs.spread(SENSITIVITY_TOKENS)
    return later_statistics(job.model, job.source, some, trace, stream_dtype(), make)


def _sensitivity(
    job: Job,
    inputs: ModelInputs,
    trace: Trace,
    later: dict[str, InputStatistics],
    share: float,
) -> Sensitivity:
    """The sensitivity pass, or what an interrupted job kept of it; layers not to be compressed are left out."""
    loaded = None if job.resume is None else job.resume.load("sensitivity")
    if loaded is not None:
        job.progress("sensitivity", share)
        return unpack_sensitivity(*loaded)
    step = share / (2 * len(trace.sequence))
    found = measure_sensitivity(
        job.model,
        trace.blocks,
        job.source,
        inputs.spread(SENSITIVITY_TOKENS).tensors,
        dtype=stream_dtype(),
        seed=job.config.seed,
        progress=lambda steps: job.progress("sensitivity", steps * step),
        trace=trace,
        later=later,
    )
    names = {trace.owners.get(name, name) for name in job.names}
    groups = [[name for name in group if name in names] for group in found.groups]
    result = Sensitivity(
        {name: value for name, value in found.output.items() if name in names},
        [group for group in groups if group],
        {name: value for name, value in found.samples.items() if name in names},
    )
    if job.resume is None:
        return result
    job.resume.save("sensitivity", *pack_sensitivity(result))
    loaded = job.resume.load("sensitivity")  # mapped from the file: memory is left to the blocks
    return result if loaded is None else unpack_sensitivity(*loaded)
