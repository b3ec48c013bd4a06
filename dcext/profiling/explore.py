"""Finds out what layers take now, in every codec, from passes of a model that goes on running."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dcext.codecs import codec_names
from dcext.offloading.weights import Weight
from dcext.policy.predict import COMPUTE, Observed, ObservedDisk, Predictor, Unit
from dcext.policy.tier import Tier
from dcext.profiling.observe import LayerClock
from dcext.profiling.observe_disk import PassSample, typical_sample
from dcext.profiling.study import Study

CLOCKED = 3  # passes in which layers are timed, and as many between them in which they are not
LEAST_OTHER = 0.2  # of what is not a layer, below which it is not corrected


class Exploration:
    """Passes in which a few layers have codecs that no other of their kind has; every other one has its layers timed."""

    def __init__(
        self, weights: Sequence[Weight], units: Sequence[Unit], tokens: int, room: float
    ) -> None:
        """Changes the layers, while no pass runs.

        Args:
            weights: of the model.
            units: their descriptions, in the same order.
            tokens: of the passes that count.
            room: bytes that the layers may take more than before.
        """
        self._weights = weights
        self._units = units
        self._tokens = tokens
        self._clock = LayerClock(weights)
        self._layers: list[dict[str, float]] = []
        self._stalled: list[float] = []
        self._plain: list[PassSample] = []
        self._left = 8 * CLOCKED
        self._is_clocked = True
        self._change_some(room)
        self._clock.start()

    def _change_some(self, room: float) -> None:
        """Gives one layer of each kind every codec that none has in memory, as far as there is room."""
        by_kind: dict[object, list[tuple[Weight, Unit]]] = defaultdict(list)
        for weight, unit in zip(self._weights, self._units, strict=True):
            if weight.tier.place == "memory":
                by_kind[unit.kind].append((weight, unit))
        for members in by_kind.values():
            codecs = Counter(weight.module.codec for weight, _ in members)
            for codec in codec_names():
                weight, unit = members[-1]
                own = weight.module.codec
                taken = unit.nbytes[codec] - weight.module.payload.nbytes
                if codec in codecs or codecs[own] == 1 or taken > room:
                    continue
                codecs[own] -= 1
                room -= max(taken, 0)
                weight.set_payload(weight.payload(codec))
                members.pop()

    def stop(self) -> None:
        """Times no more layers."""
        self._clock.stop()

    def see(self, tokens: int, seen: PassSample) -> bool:
        """A pass; whether that is enough."""
        self._left -= 1
        layers = self._clock.take()
        if tokens == self._tokens and self._is_clocked:
            self._layers.append(layers)
            self._stalled.append(seen.stalled_s)
        elif tokens == self._tokens:
            self._plain.append(seen)
        self._clock.stop()
        if min(len(self._layers), len(self._plain)) == CLOCKED or self._left <= 0:
            return True
        self._is_clocked = len(self._layers) <= len(self._plain)
        if self._is_clocked:
            self._clock.start()
        return False

    @property
    def plain(self) -> PassSample | None:
        """Of passes in which no layers were timed; None where all were of other lengths."""
        return typical_sample(self._plain) if self._plain else None

    def observed(self, study: Study, old: Predictor) -> Observed:
        """What is known, corrected by what was seen.

        Args:
            study: what was known.
            old: its predictor, with the memory to read into that there is.
        """
        plain = self.plain
        if not self._layers or plain is None:  # passes were of other lengths
            return study.observed
        tokens = self._tokens
        names = {name for layers in self._layers for name in layers}
        taken = {
            name: statistics.median(layers.get(name, 0.0) for layers in self._layers)
            for name in names
        }
        lengths = {*study.observed.other_s, tokens}
        other_s = {n: old.other_s(n) for n in lengths}
        rest = plain.seconds - sum(taken.values())
        other_s[tokens] = max(rest, LEAST_OTHER * other_s[tokens], 1e-6)
        corrected = replace(
            study.observed,
            layer_s=self._layer_s(old, taken, lengths),
            other_s=other_s,
            threads=torch.get_num_threads(),
        )
        return replace(corrected, disk=self._reads(study, corrected, old, taken))

    def _layer_s(
        self, old: Predictor, taken: Mapping[str, float], lengths: set[int]
    ) -> dict[tuple[object, str], dict[int, float]]:
        """Times of layers as they were seen; those of codecs that were not seen, in proportion."""
        tokens = self._tokens
        seen: dict[tuple[object, str], list[float]] = defaultdict(list)
        for weight, unit in zip(self._weights, self._units, strict=True):
            if unit.name in taken and not weight.module.is_in_file:
                expected = old.compute_s(unit, weight.module.codec, tokens)
                ratio = taken[unit.name] / max(expected, 1e-9)
                seen[unit.kind, weight.module.codec].append(ratio)
        ratios = {key: statistics.median(values) for key, values in seen.items()}
        by_codec: dict[str, list[float]] = defaultdict(list)
        for (_, codec), ratio in ratios.items():
            by_codec[codec].append(ratio)
        overall = statistics.median(ratios.values()) if ratios else 1.0
        layer_s: dict[tuple[object, str], dict[int, float]] = {}
        for unit in {unit.kind: unit for unit in self._units}.values():
            for codec in codec_names():
                typical = statistics.median(by_codec.get(codec, [overall]))
                ratio = ratios.get((unit.kind, codec), typical)
                layer_s[unit.kind, codec] = {
                    n: old.compute_s(unit, codec, n) * (ratio if n == tokens else 1.0)
                    for n in lengths
                }
        return layer_s

    def _reads(
        self, study: Study, observed: Observed, old: Predictor, taken: Mapping[str, float]
    ) -> dict[int, ObservedDisk]:
        """What reads cost though the disk keeps up: what is left of the layers that were read."""
        streamed = [
            unit
            for weight, unit in zip(self._weights, self._units, strict=True)
            if weight.module.is_in_file and unit.multiplied and unit.name in taken
        ]
        if not streamed or not observed.disk:
            return observed.disk
        without = {n: replace(disk, read_s=0.0) for n, disk in observed.disk.items()}
        known = replace(study, observed=replace(observed, disk=without))
        seconds = known.predictor(old.slots_nbytes).seconds
        tokens = self._tokens
        expected = sum(
            float(seconds(u, Tier("disk", u.file_codec or ""), tokens)[COMPUTE]) for u in streamed
        )
        waited = statistics.median(self._stalled)
        left = sum(taken[unit.name] for unit in streamed) - waited - expected
        reads = sum(u.multiplied * old.pieces(u.nbytes[u.file_codec or ""]) for u in streamed)
        read_s = max(left, 0.0) / reads
        return {n: replace(disk, read_s=read_s) for n, disk in without.items()}
