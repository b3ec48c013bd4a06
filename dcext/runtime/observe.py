"""Takes the times of a model's layers, in every codec, while the model itself runs."""

from __future__ import annotations

import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dcext.codec import encode, payload_info
from dcext.nn.device import blocks_of
from dcext.nn.embedding import DCEmbedding
from dcext.policy.footprint import payload_index_nbytes
from dcext.policy.machine import LAYER_CODECS
from dcext.policy.predict import Observed, Unit, place_and_codec
from dcext.runtime.host_stream import HostStream
from dcext.runtime.placement import offload_of
from dcext.runtime.retier import retier
from dcext.runtime.weights import Weight

SAMPLES = 6  # units of a kind whose codecs are changed: a multiple of the codecs
PASSES, PASSES_AT_MOST = 3, 12
SECONDS_OF_A_LENGTH = 1.0  # in each rotation; more passes than three only so long
DISK_READS_NBYTES, DISK_LOOKS = 512 << 20, 3
STREAMING_ROUNDS = 8
STALLED = 0.1  # share of a pass spent waiting from which the disk is what binds
KEEPING_UP = 0.7  # of what the disk reads in a pass: so much, to see what reads cost who never waits for them
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
    units = []
    for weight in weights:
        module = weight.module
        own = payload_info(module.payload)
        known = {own["codec"]: own}
        if weight.origin is not None and weight.file_codec is not None:
            known[weight.file_codec] = payload_info(weight.origin.view())
        if len(known) < len(LAYER_CODECS):
            qweight = weight.qweight()
            for codec in LAYER_CODECS:
                if codec not in known:
                    known[codec] = payload_info(encode(qweight, codec))
        looked_up = sum(isinstance(m, DCEmbedding) for m in weight.modules)
        units.append(
            Unit(
                name=weight.name,
                shape=weight.module.shape,
                multiplied=len(weight.modules) - looked_up,
                looked_up=looked_up,
                nbytes={codec: known[codec]["nbytes"] for codec in LAYER_CODECS},
                index_nbytes={c: payload_index_nbytes(known[c]) for c in LAYER_CODECS},
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
    sampled = [index for members in by_kind.values() for index in _evenly(members, SAMPLES)]
    layers: dict[tuple[object, str], dict[int, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    others: dict[int, list[float]] = defaultdict(list)
    with _restored([weights[index] for index in sampled]):
        for rotation in range(len(LAYER_CODECS)):
            for turn, index in enumerate(sampled):
                weights[index].rest_in_memory(
                    weights[index].payload(LAYER_CODECS[(turn + rotation) % len(LAYER_CODECS)])
                )
            for tokens in lengths:
                _take(weights, units, tokens, forward, layers, others)
                report(f"{tokens} tokens", 1 / (len(LAYER_CODECS) * len(lengths)))
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
        place, codec = place_and_codec(weight.tier)
        if place == "memory" and unit.name in medians:  # a streamed layer also waits for the disk
            layers[(unit.kind, codec)][tokens].append(medians[unit.name])
    others[tokens].append(statistics.median(plain) - sum(medians.values()))


def _evenly(members: Sequence[T], count: int) -> Sequence[T]:
    if len(members) <= count:
        return members
    return [members[(2 * i + 1) * len(members) // (2 * count)] for i in range(count)]


@contextmanager
def _restored(weights: Sequence[Weight]) -> Iterator[None]:
    """Afterwards every weight is where it was."""
    before: list[tuple[Weight, Tensor, Any]] = [
        (weight, weight.module.payload, weight.module.resting if weight.module.is_in_file else None)
        for weight in weights
    ]
    try:
        yield
    finally:
        for weight, payload, streamed in before:
            if streamed is None:
                weight.rest_in_memory(payload)
                continue
            for module in weight.modules:
                module.rest_in_file(payload, streamed)


def observe_disk(weights: Sequence[Weight], slots_nbytes: int) -> float | None:
    """GB/s of the reads that streaming does, from the model's own files; None where no weight is in one."""
    origins: dict[str, Any] = {}
    nbytes = 0
    for weight in weights:
        if weight.origin is not None and not weight.is_looked_up and nbytes < DISK_READS_NBYTES:
            origins[weight.name] = weight.origin
            nbytes += weight.nbytes
    if not origins:
        return None
    stream = HostStream(origins, slots_nbytes)
    try:
        stream.read_all()
        return statistics.median(stream.read_all() for _ in range(DISK_LOOKS)) / 1e9
    finally:
        stream.close()


@dataclass(frozen=True)
class Seen:
    """One pass, or several.

    Attributes:
        seconds: that it took.
        stalled_s: of those, in which a layer waited for the disk.
        read_nbytes: bytes read from the disk meanwhile.
        reading_s: seconds in which at least one read was under way.
    """

    seconds: float
    stalled_s: float = 0.0
    read_nbytes: float = 0.0
    reading_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether it is the disk that binds."""
        return self.stalled_s > STALLED * self.seconds

    @property
    def disk_gbps(self) -> float:
        """Of the disk while it was read; 0 where nothing was."""
        return self.read_nbytes / self.reading_s / 1e9 if self.reading_s > 0 else 0.0


def typical_of(passes: Sequence[Seen]) -> Seen:
    """The medians of seconds and of those that were waited, the means of what was read; of at least one pass."""
    return Seen(
        statistics.median(seen.seconds for seen in passes),
        statistics.median(seen.stalled_s for seen in passes),
        statistics.mean(seen.read_nbytes for seen in passes),
        statistics.mean(seen.reading_s for seen in passes),
    )


class StreamMeter:
    """Tells what the stream of a model did from pass to pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._now()

    def see(self, seconds: float) -> Seen:
        """The time since the last call, or since this was made, in which passes ran for so many seconds."""
        before, self._before = self._before, self._now()
        did = [max(now - then, 0) for now, then in zip(self._before, before, strict=True)]
        return Seen(seconds, min(did[0], seconds), *did[1:])

    def _now(self) -> tuple[float, float, float]:
        offload = offload_of(self._model)
        if offload is None or offload.stream is None:
            return 0.0, 0.0, 0.0
        done = offload.stream.native.statistics()
        return done["stall_s"], done["read_nbytes"], done["reading_s"]


@dataclass(frozen=True)
class Streaming:
    """Passes of a model without layers on the disk, with a few, and with all of them there; several times in turns.

    Attributes:
        few: names of the few.
        rounds: the typical pass of each of the three.
    """

    few: list[str]
    rounds: list[tuple[Seen, Seen, Seen]]


@torch.inference_mode()
def observe_streaming(
    model: nn.Module,
    weights: Sequence[Weight],
    tokens: int,
    forward: Forward,
    slots_nbytes: int,
    gbps: float,
) -> Streaming:
    """Passes of a model without layers on the disk, with a few, and with all of them there; several times in turns.

    The few are as many as the disk has read long before they are needed.

    Args:
        model: it is as before afterwards; no layer is on the disk now.
        weights: all of it.
        tokens: of a pass; the fewer, the less time there is to hide reads.
        forward: runs a pass.
        slots_nbytes: memory to read into; with less of it, reads are smaller and more.
        gbps: at which the disk is read when nobody computes.
    """
    before = {weight.name: weight.tier for weight in weights}
    kept = [(weight, weight.module.payload) for weight in weights]
    layers = [weight for weight in weights if weight.origin is not None and not weight.is_looked_up]

    def in_memory() -> None:
        for weight, payload in kept:
            weight.rest_in_memory(payload)

    def taken(streamed: Sequence[Weight]) -> Seen:
        in_memory()
        tiers = before | {weight.name: f"disk/{weight.file_codec}" for weight in streamed}
        retier(model, list(weights), tiers, slots_nbytes)
        forward(tokens)
        meter = StreamMeter(model)
        taken_s = pass_times(forward, tokens, SECONDS_OF_A_LENGTH / STREAMING_ROUNDS)
        return typical_of([meter.see(seconds) for seconds in taken_s])

    try:
        nbytes = KEEPING_UP * pass_seconds(forward, tokens) * gbps * 1e9
        mean_nbytes = statistics.mean(weight.nbytes for weight in layers)
        few = _evenly(layers, max(1, int(nbytes / mean_nbytes)))
        rounds = [(taken([]), taken(few), taken(layers)) for _ in range(STREAMING_ROUNDS)]
        return Streaming([weight.name for weight in few], rounds)
    finally:
        in_memory()
        retier(model, list(weights), before, slots_nbytes)


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
