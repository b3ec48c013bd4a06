"""A model compressed block by block: each is calibrated, replaced, and run on to feed the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcext.calibrate.blocks import (
    Block,
    block_inputs,
    find_blocks,
    input_hooks,
    linear_layers,
    run_block,
)
from dcext.calibrate.recipes import CodedLayer, PaperRecipe, RateRecipe
from dcext.calibrate.resume import ResumeFolder
from dcext.calibrate.sensitivity import Sensitivity, measure_sensitivity
from dcext.calibrate.source import BlockSource
from dcext.config import CompressionConfig
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.rate import WeightSample
from dcext.quantize.report import LayerReport

SENSITIVITY_TOKENS = 8192

EmitFn = Callable[[str, CodedLayer], None]
ProgressFn = Callable[[str, float], None]


@dataclass
class Job:
    """One compression: what is compressed, how, and where its steps are kept.

    Attributes:
        model: possibly on the meta device.
        source: gives the weights of its blocks.
        calibration: ``(windows, tokens)`` int64, or float inputs.
        config: recipe ``rate`` or ``paper``.
        names: the layers to compress; other linear layers in the blocks stay.
        emit: called with each layer's name and what became of it, once its block is done.
        progress: called with a label and the share of this job that was just done.
        resume: where steps are kept, or None.
    """

    model: nn.Module
    source: BlockSource
    calibration: Tensor
    config: CompressionConfig
    names: set[str]
    emit: EmitFn
    progress: ProgressFn
    resume: ResumeFolder | None = None


def stream_dtype() -> torch.dtype:
    """What activations are computed in: bfloat16 where the CPU multiplies it fast, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def compress_blocks(job: Job) -> list[dict[str, float]]:
    """Compresses the linear layers of all blocks, in order.

    Returns:
        Recipe ``paper``'s table of alphas; empty for ``rate``.

    Raises:
        ValueError: the model does not call its blocks one after the other.
    """
    blocks = find_blocks(job.model)
    recipe: RateRecipe | PaperRecipe
    if job.config.recipe == "rate":
        share = 0.35
        sensitivity = _sensitivity(job, blocks, share)
        recipe = RateRecipe(job.config, sensitivity)
        _run(job, blocks, recipe, 1 - share)
        return []
    recipe = PaperRecipe(job.config)
    if job.config.alpha == "model":
        _run(job, blocks, recipe, 0.5, trial=True)
        recipe.choose_alpha()
        _run(job, blocks, recipe, 0.5)
    else:
        _run(job, blocks, recipe, 1.0)
    return recipe.alphas()


def _run(
    job: Job,
    blocks: list[Block],
    recipe: RateRecipe | PaperRecipe,
    share: float,
    trial: bool = False,
) -> None:
    """Passes over all blocks; with ``trial`` only the recipe's alphas are tried, and nothing is quantized."""
    resume = None if trial else job.resume
    dtype = stream_dtype()
    with job.source.skeleton():
        hidden = block_inputs(job.model, blocks, job.calibration)
    hidden = hidden.to(dtype) if hidden.is_floating_point() else hidden
    done = 0
    loaded = None if resume is None else resume.load("hidden")
    if resume is not None and loaded is not None:
        hidden, done = loaded[0]["hidden"], loaded[1]["blocks"]
        coded_names = []
        for i in range(done):
            coded = _load_block(resume, i)
            coded_names += list(coded)
            _emit(job, coded, share / len(blocks))
        recipe.restore(loaded[1]["recipe"], coded_names)
    for i, block in enumerate(blocks[done:], done):
        coded, hidden = _run_block(job, block, recipe, hidden, dtype, trial)
        if resume is not None:
            _save_block(resume, i, coded)
            meta = {"blocks": i + 1, "recipe": recipe.state()}
            resume.save("hidden", {"hidden": hidden}, meta)
            coded = _load_block(resume, i)  # mapped from the file: memory holds one block
        _emit(job, coded, share / len(blocks))


def _emit(job: Job, coded: dict[str, CodedLayer], share: float) -> None:
    for name, layer in coded.items():
        job.emit(name, layer)
    job.progress(next(iter(coded), ""), share)


@torch.no_grad()
def _run_block(
    job: Job,
    block: Block,
    recipe: RateRecipe | PaperRecipe,
    hidden: Tensor,
    dtype: torch.dtype,
    trial: bool,
) -> tuple[dict[str, CodedLayer], Tensor]:
    """Quantizes a block's layers as their inputs come by; returns them and the block's output."""
    with job.source.weights(block):
        weights = {
            name: layer.weight.detach().float()
            for name, layer in linear_layers(block).items()
            if name in job.names
        }
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: weight: expected finite values, got NaN or inf")
    coded: dict[str, CodedLayer] = {}
    with job.source.working_copy(block, dtype) as module:
        layers = linear_layers(Block(block.name, module))

        def quantize(names: list[str], x: Tensor) -> None:
            statistics = recipe.statistics(x.shape[-1])
            statistics.update(x)
            group = {name: weights[name] for name in names}
            if trial and isinstance(recipe, PaperRecipe):
                recipe.try_alphas(group, statistics)
                return
            result = recipe.quantize_group(group, statistics)
            coded.update(result)
            if recipe.feeds_back:
                for name, layer in result.items():
                    layers[name].weight.copy_(layer.quantized.dequantize())

        visitor = _GroupVisitor(set(weights), recipe.groups, quantize)
        with input_hooks(layers, visitor.visit):
            hidden = run_block(block, module, hidden)
        visitor.flush()
    if not trial:
        for name in [name for name in weights if name not in coded]:
            reason = "no calibration token reached the layer"
            coded[name] = recipe.fall_back(name, weights[name], reason)
    return {name: coded[name] for name in weights if name in coded}, hidden


class _GroupVisitor:
    """Calls ``quantize`` once for all layers that read the same tensor.

    Where the groups are known, that is before their first layer runs, so that it runs quantized already; else when
    another tensor comes by.
    """

    def __init__(
        self,
        names: set[str],
        known: dict[str, list[str]] | None,
        quantize: Callable[[list[str], Tensor], None],
    ) -> None:
        self._waiting = set(names)
        self._known = known
        self._quantize = quantize
        self._pending: list[str] = []
        self._input: Tensor | None = None

    def visit(self, name: str, x: Tensor) -> None:
        """Takes a layer that is about to run on ``x``; a second call of the same layer is ignored."""
        if name not in self._waiting:
            return
        if self._input is not x:
            self.flush()
        members = [name] if self._known is None else self._known.get(name, [name])
        members = [member for member in members if member in self._waiting]
        self._waiting.difference_update(members)
        self._pending += members
        self._input = x
        if self._known is not None:
            self.flush()

    def flush(self) -> None:
        """Quantizes what is pending."""
        if self._pending and self._input is not None:
            self._quantize(self._pending, self._input)
        self._pending, self._input = [], None


def _sensitivity(job: Job, blocks: list[Block], share: float) -> Sensitivity:
    """The sensitivity pass, or what an interrupted job kept of it; layers not to be compressed are left out."""
    loaded = None if job.resume is None else job.resume.load("sensitivity")
    if loaded is not None:
        job.progress("sensitivity", share)
        return _unpack_sensitivity(*loaded)
    step = share / (2 * len(blocks))
    found = measure_sensitivity(
        job.model,
        blocks,
        job.source,
        _first_tokens(job.calibration, SENSITIVITY_TOKENS),
        dtype=stream_dtype(),
        seed=job.config.seed,
        progress=lambda steps: job.progress("sensitivity", steps * step),
    )
    groups = [[name for name in group if name in job.names] for group in found.groups]
    result = Sensitivity(
        {name: value for name, value in found.output.items() if name in job.names},
        [group for group in groups if group],
        {name: value for name, value in found.samples.items() if name in job.names},
    )
    if job.resume is None:
        return result
    job.resume.save("sensitivity", *_pack_sensitivity(result))
    loaded = job.resume.load("sensitivity")  # mapped from the file: memory is left to the blocks
    return result if loaded is None else _unpack_sensitivity(*loaded)


def _first_tokens(calibration: Tensor, tokens: int) -> Tensor:
    """As many windows as hold at least so many tokens, spread evenly over the calibration set."""
    per_window = 1 if calibration.is_floating_point() else calibration.shape[1]
    count = min(calibration.shape[0], -(-tokens // per_window))
    index = torch.arange(count) * calibration.shape[0] // count
    return calibration[index]


def _pack_sensitivity(value: Sensitivity) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"output/{name}": tensor for name, tensor in value.output.items()}
    for name, sample in value.samples.items():
        tensors[f"values/{name}"] = sample.values
        tensors[f"rows/{name}"] = sample.rows
        tensors[f"spread/{name}"] = sample.row_spread
        tensors[f"units/{name}"] = sample.units
        tensors[f"col_spread/{name}"] = sample.col_spread
    shapes = {name: sample.shape for name, sample in value.samples.items()}
    return tensors, {"groups": value.groups, "shapes": shapes}


def _unpack_sensitivity(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Sensitivity:
    output = {
        name.removeprefix("output/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("output/")
    }
    samples = {
        name: WeightSample(
            tensors[f"values/{name}"],
            tensors[f"rows/{name}"],
            tensors[f"spread/{name}"],
            tensors[f"units/{name}"],
            tensors[f"col_spread/{name}"],
            tuple(shape),
        )
        for name, shape in meta["shapes"].items()
    }
    return Sensitivity(output, meta["groups"], samples)


def _save_block(resume: ResumeFolder, index: int, coded: dict[str, CodedLayer]) -> None:
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, layer in coded.items():
        quantized = layer.quantized
        tensors[f"{name}/payload"] = layer.payload
        for leaf in ("row_scale", "col_scale", "outlier_index", "outlier_weight"):
            tensor = getattr(quantized, leaf)
            if tensor is None:
                continue
            owner = owners.setdefault(id(tensor), name)
            if owner == name:
                tensors[f"{name}/{leaf}"] = tensor
            else:
                shared[name] = owner  # only col_scale is ever shared
    reports = [asdict(layer.report) for layer in coded.values()]
    resume.save(f"block-{index:05d}", tensors, {"reports": reports, "shared": shared})


def _load_block(resume: ResumeFolder, index: int) -> dict[str, CodedLayer]:
    loaded = resume.load(f"block-{index:05d}")
    if loaded is None:
        raise FileNotFoundError(f"{resume.path}: expected block {index}, found none")
    tensors, meta = loaded
    coded = {}
    for row in meta["reports"]:
        report = LayerReport(**{**row, "shape": tuple(row["shape"])})
        name = report.name
        owner = meta["shared"].get(name, name)
        quantized = QuantizedWeight(
            torch.empty(0, dtype=torch.int8),
            tensors[f"{name}/row_scale"],
            tensors.get(f"{owner}/col_scale"),
            tensors.get(f"{name}/outlier_index"),
            tensors.get(f"{name}/outlier_weight"),
            report.fallback,
        )
        coded[name] = CodedLayer(tensors[f"{name}/payload"], quantized, report)
    return coded
