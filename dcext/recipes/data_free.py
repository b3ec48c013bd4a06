"""Recipe ``data-free``: row-wise steps at a target size, without calibration text."""

from __future__ import annotations

from dcext.calibrate.coded import code_layer
from dcext.calibrate.job import Job
from dcext.quantize.control import FIRST_EXCESS_BITS
from dcext.quantize.data_free import round_data_free
from dcext.quantize.recipe import Recipe, register

NAME = "data-free"


def compress(job: Job) -> list[dict[str, float]]:
    """Rounds every layer at the entropy that fills what is left of the target."""
    total = remaining = job.num_weights()
    budget = job.config.bits * remaining
    excess = FIRST_EXCESS_BITS
    for name, weight in job.layers():
        try:
            quantized = round_data_free(weight, budget / remaining - excess)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        coded = code_layer(name, quantized, job.config, NAME)
        excess = coded.report.bits_per_weight - coded.report.entropy_bits
        budget -= 8 * coded.report.stored_nbytes
        remaining -= weight.numel()
        job.emit(name, coded)
        job.progress(name, weight.numel() / total)
    return []


register(Recipe(NAME, compress, takes=frozenset({"target"})))
