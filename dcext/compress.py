"""Compression of a whole model, in place."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dcext.calibrate.coded import CodedLayer
from dcext.calibrate.fold import READERS, fold_col_scales
from dcext.calibrate.inputs import Calibration
from dcext.calibrate.job import Job, ProgressFn
from dcext.calibrate.resume import ResumeFolder, job_key
from dcext.calibrate.source import BlockSource
from dcext.calibrate.stacks import Block, find_blocks, linear_layers
from dcext.checks import check_model, check_type, shown
from dcext.config import CompressionConfig
from dcext.find import (
    TIED,
    FilterFn,
    Found,
    find_matrices,
    input_embedding,
    left_float,
    make_filter,
    prepare_,
)
from dcext.loading import REPORT_ATTRIBUTE, forget_ties
from dcext.nn.compressed import compressed_modules
from dcext.nn.convert import compress_module_
from dcext.nn.matrix import kind_of, matrix_of
from dcext.quantize.recipe import one_of, recipes
from dcext.quantize.report import CompressionReport
from dcext.recipes.int8 import code_int8

# Called with a model and its configuration once it is compressed; integrations add what their libraries have to know.
AFTER_COMPRESSION: list[Callable[[nn.Module, CompressionConfig], None]] = []
JOB_VERSION = 5  # of what recipes compute: raised when a change makes kept blocks useless
OTHERS_SHARE = 0.05  # of all work: what lies outside the blocks
LEAST_COVERAGE = 0.95  # of the weights of matrices, without a warning


def compress_(
    model: nn.Module,
    config: CompressionConfig | None = None,
    calibration: Calibration | None = None,
    filter_fn: FilterFn | None = None,
    *,
    progress: ProgressFn | None = None,
    include: str | None = None,
    exclude: str | None = None,
    resume_dir: str | Path | None = None,
    source: BlockSource | None = None,
) -> nn.Module:
    """Compresses the matrices of a model: those of linear layers, convolutions, embeddings, experts, and of parameters.

    Modules stay the same objects and keep names, hooks, flags and what subclasses add; their class changes to one that
    holds a payload (``dcext.nn.convert``). 3-D stacks of expert weights become a layer per expert, of which only those
    that a token needs are decoded; parameters that a module uses itself become layers too, read through a view that
    decodes them whole (``dcext.nn.split``). Masks of pruning and weight norms become part of the weights.

    Recipes that calibrate (``rate``, ``paper``) run the calibration text through the model block by block and quantize
    the linear layers of its blocks; embeddings and what lies outside the blocks (``lm_head``) become INT8 per row. Modules
    that share a weight (a tied ``lm_head`` and embedding) share its payload: it is compressed and stored once; leave both
    of a tied pair out or neither. Float weights are dropped block by block, so that memory peaks at the model plus one
    block and the activations of the calibration text.

    What was done to each layer, what stays float and why is left in ``model.dcext_report``, a ``CompressionReport``. A
    ``UserWarning`` says so where less than 95 % of the weights of matrices are compressed.

    Args:
        model: any module on the CPU. Modified in place, also when an exception ends the call halfway.
        config: what to do; the default is ``CompressionConfig()``, recipe ``rate``.
        calibration: for ``rate`` and ``paper``: ``(windows, tokens)`` int64 token ids (49,152 tokens serve well), float
            inputs of a model that does not take tokens, or a dictionary of what ``forward`` is called with, such as a
            processor gives, whose tensors count windows in their first dimension. Ids alone are the input of an encoder
            and, shifted as the model shifts labels, that of its decoder.
        filter_fn: called with name and module of a layer, or name of a parameter and the module that has it; False
            leaves it as it is.
        progress: called with what was just done and its share of all work.
        include: a regular expression; only names in which it is found are compressed.
        exclude: a regular expression; names in which it is found are not.
        resume_dir: folder in which calibrated blocks are kept: a call with the same model, text and settings after an
            interruption goes on there, with the same result. It stays when the call ends, so that a result that cannot be
            saved is not lost: remove it then with ``dcext.calibrate.resume.remove_resume_folder``.
        source: where weights come from if the model is on the meta device (``dcext.hub.load_lazy_model``).

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of another type, such as text instead of token ids.
        ValueError: nothing to compress, a tied weight only half of which passes the filter, weights with NaN,
            a calibration set that is missing, not wanted or of the wrong kind, a target out of reach.
    """
    config = CompressionConfig() if config is None else config
    _check_arguments(model, config, calibration, filter_fn)
    passes = make_filter(filter_fn, include, exclude)
    prepare_(model, passes)
    found = find_matrices(model, passes)
    _leave_half_tied(model, found, chosen=any((filter_fn, include, exclude)))
    modules = found.modules
    if not modules:
        raise _nothing_found(model, filter_fn=filter_fn, include=include, exclude=exclude)
    source = source or BlockSource()
    resume = None
    if resume_dir is not None and calibration is not None:
        settings = {**config.to_dict(), "names": sorted(modules), "version": JOB_VERSION}
        key = job_key(model, calibration, {**settings, "source": source.identity()})
        resume = ResumeFolder(Path(resume_dir), key)
    report = _Compression(
        model, config, modules, source, progress or (lambda label, share: None)
    ).run(calibration, resume)
    report.left = left_float(model, found.reasons)
    report.config = config.to_dict()
    setattr(model, REPORT_ATTRIBUTE, report)
    for note in AFTER_COMPRESSION:
        note(model, config)
    if report.matrix_coverage < LEAST_COVERAGE:
        warnings.warn(f"compress_: {report.describe_coverage()}", stacklevel=2)
    return model


def _nothing_found(model: nn.Module, **filters: object) -> ValueError:
    """The error for a model, of which no layer passes the filters."""
    used = {name: shown(value) for name, value in filters.items() if value is not None}
    return ValueError(
        f"compress_: {', '.join(used) or 'model'}: expected a module that contains linear layers, convolutions or "
        f"embeddings, got none that pass {' and '.join(used.values()) or 'the filter'}"
        + (" (all are compressed)" if compressed_modules(model) else "")
    )


def _check_arguments(
    model: nn.Module,
    config: CompressionConfig,
    calibration: Calibration | None,
    filter_fn: FilterFn | None,
) -> None:
    """Checks types, and whether the calibration set is one for the recipe and the model; see ``compress_``."""
    check_model("compress_", model)
    expected = "a CompressionConfig, such as CompressionConfig(recipe='rate')"
    check_type("compress_: config", config, CompressionConfig, expected)
    _check_calibration(model, config, calibration)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"compress_: filter_fn: expected a function of name and module, got {shown(filter_fn)}"
        )


def _check_calibration(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None
) -> None:
    if not config.method.calibrated:
        if calibration is not None:
            raise ValueError(
                f"compress_: calibration: recipe {config.recipe!r} takes none, got {shown(calibration)}"
            )
        return
    if calibration is None:
        raise ValueError(
            f"compress_: calibration: recipe {config.recipe!r} needs calibration text, got none; "
            f"recipe {one_of([recipe.name for recipe in recipes() if not recipe.calibrated])} needs none"
        )
    expected = (
        "token ids (dcext.calibrate.text.text_windows makes them of a text) or tensors by argument"
    )
    check_type("compress_: calibration", calibration, (Tensor, Mapping), expected)
    by_name = {"": calibration} if isinstance(calibration, Tensor) else calibration
    for name, tensor in by_name.items():
        where = f"compress_: calibration: {name}".rstrip(": ")
        check_type(where, tensor, Tensor)
    tensors = list(by_name.values())
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        raise ValueError("compress_: calibration: expected windows, got none")
    is_ids = isinstance(calibration, Tensor) and not calibration.is_floating_point()
    if is_ids and tensors[0].dim() != 2:
        raise ValueError(
            "compress_: calibration: expected (windows, tokens) int64 or float inputs, got shape "
            f"{tuple(tensors[0].shape)} {tensors[0].dtype}"
        )
    _check_ids(model, by_name)


def _check_ids(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Checks that a language model is calibrated on ids of its vocabulary: torch's own message would name nothing.

    With images and the like, ids beyond the vocabulary may mark their places.
    """
    name = next(iter(tensors))
    embedding = input_embedding(model)
    first = list(inspect.signature(type(model).forward).parameters)[1:2]
    reads_ids = ([name] if name else first) == ["input_ids"]
    if not isinstance(embedding, nn.Embedding) or not reads_ids:
        return
    if not set(tensors) <= {"", "input_ids", "attention_mask"}:
        return
    where, ids = f"compress_: calibration: {name}".rstrip(": "), tensors[name]
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: expected int64 token ids, got {ids.dtype}")
    low, high, last = int(ids.min()), int(ids.max()), embedding.num_embeddings - 1
    if low < 0 or high > last:
        raise ValueError(
            f"{where}: expected token ids from 0 to {last}, got {low if low < 0 else high}"
        )


class _Compression:
    """One call of ``compress_``: first what lies outside the blocks is coded, then the blocks, then all is in place."""

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        modules: dict[str, nn.Module],
        source: BlockSource,
        progress: ProgressFn,
    ) -> None:
        self.model = model
        self.config = config
        self.source = source
        self.progress = progress
        self.report = CompressionReport()
        in_blocks: set[str] = set()
        self.blocks = find_blocks(model) if config.method.compress else []
        uses = Counter(id(module.weight) for module in modules.values())
        for block in self.blocks:
            in_blocks.update(
                name
                for name in linear_layers(block)
                if name in modules and uses[id(modules[name].weight)] == 1
            )
        self.block_names = [name for name in modules if name in in_blocks]
        self.other_names = [name for name in modules if name not in in_blocks]
        self.weights = {name: matrix_of(module).numel() for name, module in modules.items()}

    def run(
        self, calibration: Calibration | None, resume: ResumeFolder | None
    ) -> CompressionReport:
        """Does all of it; a folder to resume from is only read where the recipe calibrates."""
        with self.source.skeleton():
            others = self._code_others()
        config = self._with_target(others)
        if "target" in config.method.takes:
            self.report.target_bits = config.bits
        share = 1 - OTHERS_SHARE
        if self.block_names and config.method.compress:
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
            self.report.alphas = config.method.compress(job)
        self.source.fill_rest()
        for name, coded in others.items():
            self._put(name, coded)
        forget_ties(self.model)
        if config.method.folds_col_scales:
            self._fold_col_scales()
        return self.report

    def _code_others(self) -> dict[str, CodedLayer]:
        """What lies outside the blocks, in INT8; modules that share a weight share what it became."""
        coded: dict[str, CodedLayer] = {}
        by_weight: dict[tuple[int, bool], CodedLayer] = {}
        granularity = "row" if self.config.method.compress else self.config.granularity
        whole = OTHERS_SHARE if self.block_names else 1.0
        total = sum(self.weights[name] for name in self.other_names)
        for name in self.other_names:
            module = self.model.get_submodule(name)
            key = (id(module.weight), _is_transposed(module))  # before weights come and go
            if key not in by_weight:
                with self.source.weights(Block(name, module)):
                    matrix = matrix_of(module)
                    by_weight[key] = code_int8(name, matrix, granularity, self.config)
            coded[name] = by_weight[key]
            if not self.blocks:  # each float weight goes as soon as it can
                self._put(name, coded[name])
            self.progress(name, whole * self.weights[name] / total)
        return {} if not self.blocks else coded

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
        least, most = self.config.bits_limits
        if not least <= bits <= most or bits == 0:
            least, most = (int(fixed + limit * weights / 8) for limit in (least, most))
            raise ValueError(
                f"compress_: target_nbytes: expected more than the {fixed} bytes that embeddings and float tensors "
                f"take, {least} to {most} bytes, got {self.config.target_nbytes} bytes"
            )
        return replace(self.config, target_nbytes=None, target_bits=bits)

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
        quantized = coded.quantized
        outliers = None
        if quantized.outlier_index is not None and quantized.outlier_weight is not None:
            outliers = (quantized.outlier_index, quantized.outlier_weight)
        compress_module_(
            module,
            coded.payload,
            quantized.row_scale,
            quantized.col_scale,
            bias=self.source.bias(name, module),
            activations=self.config.activations,
            outliers=outliers,
        )
        if all(coded.report is not report for report in self.report.layers):
            self.report.layers.append(coded.report)


def _is_transposed(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.name == "conv1d"


def _leave_half_tied(model: nn.Module, found: Found, *, chosen: bool) -> None:
    """Leaves out what shares its weight with something that is not compressed.

    Args:
        model: to look in.
        found: from which they are taken.
        chosen: whether the caller filters, who then has to say which of both is meant.

    Raises:
        ValueError: ``chosen``, and a filter lets only half of a tied pair pass.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {id(module): name for name, module in found.modules.items()}
    for name, module in list(found.modules.items()):
        for other in names[id(module.weight)]:
            owner, _, leaf = other.rpartition(".")
            if leaf == "weight" and id(model.get_submodule(owner)) in aliases:
                continue
            if chosen:
                raise ValueError(
                    f"compress_: filter_fn: {name!r} is tied to {owner!r}, which is not compressed: "
                    "expected both or neither"
                )
            found.reasons[f"{name}.weight"] = TIED
            del found.modules[name]
            break
