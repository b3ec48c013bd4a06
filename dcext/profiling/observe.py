"""Takes the times of a model's layers, in every codec, while the model itself runs."""

from __future__ import annotations

import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dcext.codec import encode, payload_info
from dcext.codecs import codec_names
from dcext.nn.embedding import DCEmbedding
from dcext.nn.placement import blocks_of
from dcext.offloading.weights import Weight
from dcext.policy.footprint import payload_index_nbytes
from dcext.policy.predict import Observed, Unit

SAMPLES = 6  # units of a kind whose codecs are changed: a multiple of the codecs
PASSES, PASSES_AT_MOST = 3, 12
SECONDS_OF_A_LENGTH = 1.0  # in each rotation; more passes than three only so long
T = TypeVar("T")
Forward = Callable[[int], object]
Progress = Callable[[str, float], None]


def describe(
    model: nn.Module, weights: Sequence[Weight], progress: Progress | None = None
) -> list[Unit]:
    """What the policy has to know of each payload: its exact size in every codec, for which it is coded in each.

    Args:
        model: whose decoder blocks they lie in.
        weights: of the model.
        progress: called with a name and the share of the whole that it was.
    """
    report = progress or (lambda what, share: None)
    total = sum(weight.module.num_weights for weight in weights)
    block_of = blocks_of(model)
    codecs = codec_names()
    units = []
    for weight in weights:
        module = weight.module
        own = payload_info(module.payload)
        known = {own["codec"]: own}
        if weight.origin is not None and weight.file_codec is not None:
            known[weight.file_codec] = payload_info(weight.origin.view())
        if len(known) < len(codecs):
            qweight = weight.qweight()
            for codec in codecs:
                if codec not in known:
                    known[codec] = payload_info(encode(qweight, codec))
        looked_up = sum(isinstance(m, DCEmbedding) for m in weight.modules)
        units.append(
            Unit(
                name=weight.name,
                shape=weight.module.shape,
                multiplied=len(weight.modules) - looked_up,
                looked_up=looked_up,
                nbytes={codec: known[codec]["nbytes"] for codec in codecs},
                index_nbytes={c: payload_index_nbytes(known[c]) for c in codecs},
                block=_block_of(weight, block_of),
                file_codec=weight.file_codec,
                panels=-(-module.shape[0] // own["panel_rows"]),
                activations=getattr(module, "activations", "int8"),
            )
        )
        report(weight.name, module.num_weights / total)
    return units


def _block_of(weight: Weight, block_of: Mapping[int, str]) -> str | None:
    """The block of all modules that share a payload; None where they lie in several, or outside."""
    names = {block_of.get(id(module)) for module in weight.modules}
    return names.pop() if len(names) == 1 else None


def forward_of(model: nn.Module) -> Forward:
    """Runs a pass of so many tokens of a language model, logits of the last one only where the model can.

    Raises:
        ValueError: it has no vocabulary: ``forward`` must be given.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            "forward: expected a function of the number of tokens, as the model has no config.vocab_size, got None"
        )
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    generator = torch.Generator().manual_seed(0)

    def forward(tokens: int) -> object:
        ids = torch.randint(vocabulary, (1, tokens), generator=generator)
        return model(input_ids=ids, use_cache=False, **options)

    return forward


class LayerClock:
    """Times the layers of a model while it is started; reads nothing else of it.

    Attributes:
        seconds: of each weight's modules, by its name, added up since they were cleared.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = weights
        self._handles: list[Any] = []
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Adds hooks."""
        for weight in self._weights:
            for module in weight.modules:
                self._watch(weight.name, module)

    def stop(self) -> None:
        """Removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> dict[str, float]:
        """What was added up since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken

    @contextmanager
    def running(self) -> Iterator[dict[str, float]]:
        """Started meanwhile; gives ``seconds``."""
        self.seconds.clear()
        self.start()
        try:
            yield self.seconds
        finally:
            self.stop()

    def _watch(self, name: str, module: nn.Module) -> None:
        began = [0.0]

        def begin(module: nn.Module, args: object) -> None:
            began[0] = time.perf_counter()

        def end(module: nn.Module, args: object, output: object) -> None:
            self.seconds[name] += time.perf_counter() - began[0]

        self._handles += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
        ]


@torch.inference_mode()
def observe(
    weights: Sequence[Weight],
    units: Sequence[Unit],
    lengths: Sequence[int],
    forward: Forward,
    progress: Progress | None = None,
) -> Observed:
    """Runs passes in which layers of every kind have every codec, and takes their times. The model is as before afterwards.

    Up to ``SAMPLES`` layers of a kind are coded anew in turn; the others stay as they are. What is not a layer is the time
    of passes that nobody watches less that of the layers.

    Args:
        weights: of the model.
        units: their descriptions, in the same order.
        lengths: numbers of tokens of a pass.
        forward: runs a pass.
        progress: called with what is done and its share of the whole.
    """
    report = progress or (lambda what, share: None)
    by_kind: dict[object, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        by_kind[unit.kind].append(index)
    sampled = [index for members in by_kind.values() for index in evenly(members, SAMPLES)]
    layers: dict[tuple[object, str], dict[int, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    others: dict[int, list[float]] = defaultdict(list)
    codecs = codec_names()
    with _restored([weights[index] for index in sampled]):
        for rotation in range(len(codecs)):
            for turn, index in enumerate(sampled):
                weights[index].set_payload(
                    weights[index].payload(codecs[(turn + rotation) % len(codecs)])
                )
            for tokens in lengths:
                _take(weights, units, tokens, forward, layers, others)
                report(f"{tokens} tokens", 1 / (len(codecs) * len(lengths)))
    return Observed(
        layer_s={
            key: {tokens: statistics.median(taken) for tokens, taken in table.items()}
            for key, table in layers.items()
        },
        threads=torch.get_num_threads(),
        other_s={tokens: max(statistics.median(taken), 1e-6) for tokens, taken in others.items()},
    )


def _take(
    weights: Sequence[Weight],
    units: Sequence[Unit],
    tokens: int,
    forward: Forward,
    layers: Mapping[tuple[object, str], Mapping[int, list[float]]],
    others: Mapping[int, list[float]],
) -> None:
    """Passes of one length: one watched, one not, again and again."""
    clock = LayerClock(weights)
    forward(tokens)
    plain: list[float] = []
    by_unit: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + SECONDS_OF_A_LENGTH
    while len(plain) < PASSES or (time.perf_counter() < end and len(plain) < PASSES_AT_MOST):
        with clock.running() as seconds:
            forward(tokens)
        for name, taken in seconds.items():
            by_unit[name].append(taken)
        begin = time.perf_counter()
        forward(tokens)
        plain.append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken) for name, taken in by_unit.items()}
    for weight, unit in zip(weights, units, strict=True):
        place, codec = weight.tier.place, weight.tier.codec
        if place == "memory" and unit.name in medians:  # a streamed layer also waits for the disk
            layers[(unit.kind, codec)][tokens].append(medians[unit.name])
    others[tokens].append(statistics.median(plain) - sum(medians.values()))


def evenly(members: Sequence[T], count: int) -> Sequence[T]:
    """So many of them, at even distances; all where there are fewer."""
    if len(members) <= count:
        return members
    return [members[(2 * i + 1) * len(members) // (2 * count)] for i in range(count)]


@contextmanager
def _restored(weights: Sequence[Weight]) -> Iterator[None]:
    """Afterwards every weight is where it was."""
    before: list[tuple[Weight, Tensor, Any]] = [
        (weight, weight.module.payload, weight.module.backing if weight.module.is_in_file else None)
        for weight in weights
    ]
    try:
        yield
    finally:
        for weight, payload, streamed in before:
            if streamed is None:
                weight.set_payload(payload)
                continue
            for module in weight.modules:
                module.stream_from(payload, streamed)


def pass_times(forward: Forward, tokens: int, budget_s: float) -> Iterator[float]:
    """Seconds of several passes, one after the other, of as many as fit in a time."""
    end = time.perf_counter() + budget_s
    for count in range(4 * PASSES_AT_MOST):
        begin = time.perf_counter()
        if count >= PASSES and begin >= end:
            return
        forward(tokens)
        yield time.perf_counter() - begin


def pass_seconds(forward: Forward, tokens: int) -> float:
    """Seconds of a pass, the median of several after one that is not counted."""
    forward(tokens)
    return statistics.median(pass_times(forward, tokens, SECONDS_OF_A_LENGTH))
