"""What is measured: each method compresses the linear layers of a copy of the float model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import dcext
from quality.models import Subject
from quality.peers import Peers, peer_rows

ALPHAS = (0.0, 0.25, 0.5, 0.75)
SPARSITIES = (0.0, 0.3)
RATE_BITS = (2.5, 3.0, 3.64, 4.0, 5.0)
RATE_PACKED_BITS = (3.5, 4.25)
DATA_FREE_BITS = (3.0, 4.0, 5.0)
BOTH = ("none", "int8")

# Called with the number of weights done since the last call; it need not be whole.
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Applied:
    """A compressed model.

    Attributes:
        model: its linear layers compressed, everything else float32.
        stored_nbytes: bytes stored for these layers: weights, scales, zeros, tables; biases are not counted.
        note: what is special about the row.
        waterfilling_gap_bits: bits per weight above reverse water-filling on the same second moments, if known.
    """

    model: nn.Module
    stored_nbytes: int
    note: str = ""
    waterfilling_gap_bits: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to compress a model.

    Attributes:
        name: as tables print it.
        series: the curve of the figure that its points belong to.
        apply: compresses a copy of the subject's model.
        is_peer: needs the peers' environment.
        activations: the forms to evaluate: ``"none"`` keeps activations, ``"int8"`` quantizes them per token.
    """

    name: str
    series: str
    apply: Callable[[Subject, Advance], Applied]
    is_peer: bool = False
    activations: tuple[str, ...] = ("none",)


def all_methods(subject: Subject, peers: Peers | None) -> list[Method]:
    """Every method, in the order of the table; without peers if ``peers`` is None."""
    methods = [Method("float32", "float", _float), *_dcext_methods()]
    if peers is not None:
        for row in peer_rows(subject):
            methods.append(Method(row.name, row.series, _peer(peers, row.options, row.note), True))
    return methods


def _float(subject: Subject, advance: Advance) -> Applied:
    advance(subject.num_weights())
    return Applied(subject.model, 4 * subject.num_weights())


def _dcext_methods() -> list[Method]:
    methods = []
    for granularity in ("row", "tensor"):
        name = f"INT8 per {granularity}"
        apply = _dcext(recipe="int8", granularity=granularity)
        methods.append(Method(name, "INT8", apply, activations=BOTH))
    for sparsity in SPARSITIES:
        for alpha in ALPHAS:
            name = f"paper, alpha {alpha:g}" + (f", {sparsity:.0%} pruned" if sparsity else "")
            apply = _dcext(recipe="paper", calibrated=True, alpha=alpha, sparsity=sparsity)
            methods.append(Method(name, "paper", apply, activations=BOTH))
    for bits in DATA_FREE_BITS:
        apply = _dcext(recipe="data-free", target_bits=bits)
        methods.append(Method(f"data-free, {bits:g} bits", "data-free", apply, activations=BOTH))
    for bits in RATE_BITS:
        apply = _dcext(recipe="rate", calibrated=True, target_bits=bits)
        methods.append(Method(f"rate, {bits:g} bits", "rate", apply, activations=BOTH))
    for bits in RATE_PACKED_BITS:
        apply = _dcext(recipe="rate", codec="packed", calibrated=True, target_bits=bits)
        name = f"rate packed, {bits:g} bits"
        methods.append(Method(name, "rate packed", apply, activations=BOTH))
    return methods


def _dcext(calibrated: bool = False, **choices: Any) -> Callable[[Subject, Advance], Applied]:
    """A recipe of dcext with these fields of ``CompressionConfig``."""

    def apply(subject: Subject, advance: Advance) -> Applied:
        names = subject.linears().keys()
        model = dcext.compress_(
            copy.deepcopy(subject.model),
            dcext.CompressionConfig(**choices),
            subject.calibration if calibrated else None,
            lambda name, _: name in names,
            progress=lambda _, share: advance(share * subject.num_weights()),
        )
        report: Any = model.dcext_report
        nbytes = sum(layer.stored_nbytes for layer in report.layers)
        fallbacks = sum(layer.fallback is not None for layer in report.layers)
        note = f"{fallbacks} layers rounded otherwise" if fallbacks else ""
        return Applied(model, nbytes, note, report.waterfilling_gap_bits)

    return apply


def dcext_layers(model: nn.Module) -> list[Any]:
    """The compressed linear layers of a model."""
    return [module for module in model.modules() if isinstance(module, dcext.DCLinear)]


def _peer(
    peers: Peers, options: dict[str, Any], note: str
) -> Callable[[Subject, Advance], Applied]:
    """A peer, whose dequantized weights replace those of the float model."""

    def apply(subject: Subject, advance: Advance) -> Applied:
        weights, nbytes = peers.quantize(subject, **options)
        model = copy.deepcopy(subject.model)
        for name, weight in weights.items():
            model.get_submodule(name).weight.data.copy_(weight)
        advance(subject.num_weights())
        return Applied(model, nbytes, note)

    return apply


def timed(method: Method, subject: Subject, advance: Advance) -> tuple[Applied, float]:
    """Applies a method; also the seconds that it took, copies of the model included."""
    begin = time.perf_counter()
    applied = method.apply(subject, advance)
    return applied, time.perf_counter() - begin
