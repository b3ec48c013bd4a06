"""Compression of a whole model, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from dcext.calibrate.blocks import find_blocks, linear_layers
from dcext.calibrate.driver import Job, compress_blocks
from dcext.calibrate.recipes import CodedLayer, code_layer
from dcext.calibrate.resume import ResumeFolder, job_key
from dcext.calibrate.source import BlockSource
from dcext.config import CALIBRATED, CompressionConfig
from dcext.nn import DCEmbedding, DCLinear
from dcext.nn.compressed import CompressedModule
from dcext.quantize.control import FIRST_EXCESS_BITS
from dcext.quantize.data_free import round_data_free
from dcext.quantize.fold import READERS, fold_col_scales
from dcext.quantize.quantized import QuantizedWeight
from dcext.quantize.report import CompressionReport
from dcext.quantize.rounding import quantize_absmax

FilterFn = Callable[[str, nn.Module], bool]
ProgressFn = Callable[[str, float], None]
JOB_VERSION = 3  # of what recipes compute: raised when a change makes kept blocks useless
REPORT_ATTRIBUTE = "dcext_report"
OTHERS_SHARE = 0.05  # of all work: what lies outside the blocks


def compressible_modules(
    model: nn.Module, filter_fn: FilterFn | None = None
) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules that ``compress_`` would replace, by name, in the model's order.

    Exactly ``nn.Linear`` and ``nn.Embedding``: a subclass may compute something else and is left alone.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
        and (filter_fn is None or filter_fn(name, module))
    }


def compress_(
    model: nn.Module,
    config: CompressionConfig | None = None,
    calibration: Tensor | None = None,
    filter_fn: FilterFn | None = None,
    *,
    progress: ProgressFn | None = None,
    resume_dir: str | Path | None = None,
    source: BlockSource | None = None,
) -> nn.Module:
    """Replaces linear layers and embeddings by compressed ones.

    Recipes ``rate`` and ``paper`` run the calibration text through the model block by block and quantize the linear
    layers of its blocks; embeddings and what lies outside the blocks (``lm_head``) become INT8 per row. Modules that
    share a weight (a tied ``lm_head`` and embedding) share its payload: it is compressed and stored once; leave both
    of a tied pair out or neither. Float weights are dropped block by block, so that memory peaks at the model plus one
    block and the activations of the calibration text.

    What was done to each layer is left in ``model.dcext_report``, a ``CompressionReport``.

    Args:
        model: any module on the CPU. Modified in place, also when an exception ends the call halfway.
        config: what to do; the default is ``CompressionConfig()``, recipe ``rate``.
        calibration: for ``rate`` and ``paper``: ``(windows, tokens)`` int64 token ids (49,152 tokens serve well), or
            float inputs of a model that does not take tokens.
        filter_fn: called with name and module; False leaves a module as it is.
        progress: called with what was just done and its share of all work.
        resume_dir: folder in which calibrated blocks are kept: a call with the same model, text and settings after an
            interruption goes on there, with the same result. Removed at the end.
        source: where weights come from if the model is on the meta device (``dcext.hub.load_lazy_model``).

    Returns:
        ``model`` (a module that is itself an ``nn.Linear`` cannot be replaced in place: ValueError).

    Raises:
        ValueError: nothing to compress, a tied weight only half of which passes the filter, weights with NaN,
            a calibration set that is missing, not wanted or of the wrong kind, a target out of reach.
    """
    config = config or CompressionConfig()
    _check_calibration(config, calibration)
    modules = compressible_modules(model, filter_fn)
    if not modules or "" in modules:
        raise ValueError(
            "compress_: model: expected a module that contains nn.Linear or nn.Embedding, got "
            + (type(model).__name__ if "" in modules else "none that pass the filter")
        )
    source = source or BlockSource()
    resume = None
    if resume_dir is not None and calibration is not None:
        settings = {**config.to_dict(), "names": sorted(modules), "version": JOB_VERSION}
        key = job_key(model, calibration, {**settings, "source": source.identity()})
        resume = ResumeFolder(Path(resume_dir), key)
    _Compression(model, config, modules, source, progress or (lambda label, share: None)).run(
        calibration, resume
    )
    if resume is not None:
        resume.remove()
    return model


def _check_calibration(config: CompressionConfig, calibration: Tensor | None) -> None:
    if config.recipe not in CALIBRATED:
        if calibration is not None:
            raise ValueError(f"compress_: calibration: recipe {config.recipe!r} takes none")
        return
    if calibration is None:
        raise ValueError(
            f"compress_: calibration: recipe {config.recipe!r} needs calibration text, got none; "
            "recipe 'data-free' needs none"
        )
    is_tokens = not calibration.is_floating_point()
    if calibration.numel() == 0 or (is_tokens and calibration.dim() != 2):
        raise ValueError(
            "compress_: calibration: expected (windows, tokens) int64 or float inputs, got shape "
            f"{tuple(calibration.shape)} {calibration.dtype}"
        )


class _Compression:
    """One call of ``compress_``: first what lies outside the blocks is coded, then the blocks, then all is in place."""

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        modules: dict[str, nn.Linear | nn.Embedding],
        source: BlockSource,
        progress: ProgressFn,
    ) -> None:
        self.model = model
        self.config = config
        self.source = source
        self.progress = progress
        self.report = CompressionReport()
        _check_ties(model, modules)
        in_blocks: set[str] = set()
        self.blocks = find_blocks(model) if config.recipe != "int8" else []
        for block in self.blocks:
            in_blocks.update(name for name in linear_layers(block) if name in modules)
        self.block_names = [name for name in modules if name in in_blocks]
        self.other_names = [name for name in modules if name not in in_blocks]
        self.weights = {name: module.weight.numel() for name, module in modules.items()}

    def run(self, calibration: Tensor | None, resume: ResumeFolder | None) -> None:
        """Does all of it; a folder to resume from is only read where the recipe calibrates."""
        with self.source.skeleton():
            others = self._code_others()
        config = self._with_target(others)
        if config.recipe in ("rate", "data-free"):
            self.report.target_bits = config.bits
        share = 1 - OTHERS_SHARE
        if self.block_names and calibration is not None:
            job = Job(
                self.model,
                self.source,
                calibration,
                config,
                set(self.block_names),
                self._put,
                lambda label, part: self.progress(label, share * part),
                resume,
            )
            self.report.alphas = compress_blocks(job)
        elif self.block_names:
            self._compress_data_free(config, share)
        self.source.fill_rest()
        for name, coded in others.items():
            self._put(name, coded)
        forget_ties(self.model, set(compressed_modules(self.model)))
        if config.recipe == "paper":
            self._fold_col_scales()
        setattr(self.model, REPORT_ATTRIBUTE, self.report)

    def _code_others(self) -> dict[str, CodedLayer]:
        """What lies outside the blocks, in INT8; modules that share a weight share what it became."""
        coded: dict[str, CodedLayer] = {}
        by_weight: dict[int, CodedLayer] = {}
        granularity = self.config.granularity if self.config.recipe == "int8" else "row"
        whole = OTHERS_SHARE if self.block_names else 1.0
        total = sum(self.weights[name] for name in self.other_names)
        for name in self.other_names:
            weight = self.model.get_parameter(f"{name}.weight")
            if id(weight) not in by_weight:
                by_weight[id(weight)] = self._code_absmax(name, weight, granularity)
            coded[name] = by_weight[id(weight)]
            if not self.blocks:  # recipe int8: each float weight goes as soon as it can
                self._put(name, coded[name])
            self.progress(name, whole * self.weights[name] / total)
        return {} if not self.blocks else coded

    def _code_absmax(self, name: str, weight: Tensor, granularity: str) -> CodedLayer:
        try:
            quantized = QuantizedWeight(*quantize_absmax(weight, granularity))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return code_layer(name, quantized, self.config, "int8")

    def _with_target(self, others: dict[str, CodedLayer]) -> CompressionConfig:
        """The configuration with a target in bytes turned into bits for the layers of the blocks."""
        if self.config.target_nbytes is None:
            return self.config
        floats = {
            id(p): p.nbytes
            for name, p in self.model.named_parameters()
            if name.removesuffix(".weight") not in self.weights
        }
        fixed = sum(floats.values()) + sum(
            {id(coded): coded.report.stored_nbytes for coded in others.values()}.values()
        )
        weights = sum(self.weights[name] for name in self.block_names)
        bits = 8 * (self.config.target_nbytes - fixed) / max(weights, 1)
        if bits <= 0:
            raise ValueError(
                f"compress_: target_nbytes: expected more than the {fixed} bytes that embeddings and float tensors "
                f"take, got {self.config.target_nbytes}"
            )
        return replace(self.config, target_nbytes=None, target_bits=bits)

    def _compress_data_free(self, config: CompressionConfig, share: float) -> None:
        """Recipe ``data-free``: every layer at the entropy that fills what is left of the target."""
        remaining = sum(self.weights[name] for name in self.block_names)
        budget = config.bits * remaining
        total, excess = remaining, FIRST_EXCESS_BITS
        for block in self.blocks:
            with self.source.weights(block):
                weights = {
                    name: layer.weight.detach()
                    for name, layer in linear_layers(block).items()
                    if name in self.weights
                }
            for name, weight in weights.items():
                try:
                    quantized = round_data_free(weight, budget / remaining - excess)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                coded = code_layer(name, quantized, config, "data-free")
                excess = coded.report.bits_per_weight - coded.report.entropy_bits
                budget -= 8 * coded.report.stored_nbytes
                remaining -= weight.numel()
                self._put(name, coded)
                self.progress(name, share * weight.numel() / total)

    def _fold_col_scales(self) -> None:
        layers = {layer.name: layer for layer in self.report.layers}
        for block in self.blocks:
            folded = fold_col_scales(block.module)
            for first in (readers[0] for readers in READERS.values() if readers[0] in folded):
                report = layers[f"{block.name}.{first}"]  # which the shared vector was counted with
                report.stored_nbytes -= 2 * report.shape[1]

    def _put(self, name: str, coded: CodedLayer) -> None:
        """Replaces a module; a layer that shares another's payload is reported once."""
        module = self.model.get_submodule(name)
        bias = self.source.bias(name, module)
        _replace(self.model, name, _compressed_module(module, coded, self.config.activations, bias))
        if all(coded.report is not report for report in self.report.layers):
            self.report.layers.append(coded.report)


def _compressed_module(
    module: nn.Module, coded: CodedLayer, activations: str, bias: Tensor | None
) -> CompressedModule:
    quantized = coded.quantized
    scales = (quantized.row_scale, quantized.col_scale)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(f"compress_: max_norm: expected None, got {module.max_norm}")
        replacement: CompressedModule = DCEmbedding(
            coded.payload, *scales, module.weight.dtype, module.padding_idx
        )
    else:
        assert isinstance(module, nn.Linear)
        outliers = None
        if quantized.outlier_index is not None and quantized.outlier_weight is not None:
            outliers = (quantized.outlier_index, quantized.outlier_weight)
        dtype = module.weight.dtype
        replacement = DCLinear(coded.payload, *scales, bias, activations, dtype, outliers)
    return replacement.train(module.training)


def forget_ties(model: nn.Module, names: set[str]) -> None:
    """Takes compressed layers out of what a transformers model ties: they share a payload, and have no weight to tie."""
    for keys in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, keys, None)
        if isinstance(tied, dict):
            left = {a: b for a, b in tied.items() if a.removesuffix(".weight") not in names}
            setattr(model, keys, left or ({} if keys.startswith("all") else None))


def _check_ties(model: nn.Module, modules: dict[str, nn.Linear | nn.Embedding]) -> None:
    owners = {id(module.weight): name for name, module in modules.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.removesuffix(".weight")
        if id(parameter) in owners and owner not in modules:
            raise ValueError(
                f"compress_: filter_fn: {owners[id(parameter)]!r} is tied to {owner!r}, which is not compressed: "
                "expected both or neither"
            )


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """All compressed modules of a model, by name; modules that share a payload all appear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedModule)}


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, replacement)
