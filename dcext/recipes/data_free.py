"""Recipe ``data-free``: row-wise steps at a target size, without calibration text."""

from __future__ import annotations

from dcext.calibrate.coded import code_layer
from dcext.calibrate.job import Job
from dcext.quantize.control import Excess
from dcext.quantize.data_free import round_data_free
from dcext.quantize.recipe import Recipe, register

NAME = "data-free"


def compress(job: Job) -> list[dict[str, float]]:
    """Rounds every layer at the entropy that fills what is left of the target."""
    total = remaining = job.num_weights()
    budget = job.config.bits * remaining
    excess = Excess()
    for name, weight in job.layers():
        try:
            quantized = round_data_free(weight, budget / remaining - excess.expected)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        coded = code_layer(name, quantized, job.config, NAME)
        stored = 8 * coded.report.stored_nbytes
        excess.record(stored - coded.report.entropy_bits * weight.numel(), weight.numel())
        budget -= stored
        remaining -= weight.numel()
        job.emit(name, coded)
        job.progress(name, weight.numel() / total)
    return []


register(Recipe(NAME, compress, takes=frozenset({"target"})))
