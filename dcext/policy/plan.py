"""Plans: where each layer of a model is to be, as JSON that people can read and edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcext.errors import FormatError
from dcext.format.manifest import parse_json_object
from dcext.format.replace import replace_file
from dcext.policy.tier import Tier

PLAN_FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlannedLayer:
    """One payload.

    Attributes:
        name: of the first module that uses it.
        tier: where it is to be, and in which codec.
        nbytes: of its payload there.
        seconds: predicted, of what it uses most, by number of tokens.
        binds: what that is, by number of tokens: ``"compute"``, ``"link"``, ``"disk"`` or ``"host"``.
        measured_s: as taken, by number of tokens; empty if they were not.
    """

    name: str
    tier: Tier
    nbytes: int
    seconds: dict[int, float]
    binds: dict[int, str]
    measured_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPass:
    """A forward pass of a number of tokens, predicted.

    Attributes:
        tokens: of it.
        weight: passes of this kind in the mix.
        seconds: if all overlaps, which is how it runs.
        serial_s: if nothing did.
        other_s: of ``seconds``, outside of layers.
        resources_s: seconds of each resource.
        binds: the slowest of them.
        int8_s: ``seconds`` if all layers were resident as plain INT8 where the model runs.
        measured_s: as taken; None if it was not.
    """

    tokens: int
    weight: float
    seconds: float
    serial_s: float
    other_s: float
    resources_s: dict[str, float]
    binds: str
    int8_s: float
    measured_s: float | None = None

    @property
    def slowdown(self) -> float:
        """``seconds`` over ``int8_s``, less 1."""
        return self.seconds / self.int8_s - 1 if self.int8_s > 0 else 0.0


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        layers: of the model, in its order.
        passes: what was planned for.
        host_memory: bytes that weights may take in host memory; None where there was no bound.
        device_memory: bytes that weights may take on the device; None where there was no bound.
        host_nbytes, device_nbytes: what they take, all that is not compressed and room for reads included.
        int8_nbytes: what they would take as plain INT8.
        slots_nbytes: of host memory, to read layers into if some are on the disk.
        objective: in words.
        machine: its name.
        kind: of its figures, ``"measured"`` or ``"projected"``.
        notes: what a user should know of it.
    """

    layers: list[PlannedLayer]
    passes: list[PlannedPass]
    host_memory: int | None
    device_memory: int | None
    host_nbytes: int
    device_nbytes: int
    int8_nbytes: int
    slots_nbytes: int
    objective: str
    machine: str
    kind: str
    notes: list[str]

    @property
    def tiers(self) -> dict[str, Tier]:
        """By the name of each layer."""
        return {layer.name: layer.tier for layer in self.layers}

    @property
    def on_device(self) -> bool:
        """Whether the model is to run on a device."""
        places = {tier.place for tier in self.tiers.values()}
        return "memory" not in places and bool(places & {"device", "host"})

    @property
    def seconds(self) -> float:
        """Predicted, of a pass of the mix on average."""
        total = sum(each.weight for each in self.passes)
        return sum(each.weight * each.seconds for each in self.passes) / total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [{**asdict(layer), "tier": str(layer.tier)} for layer in self.layers]
        return {"format_version": PLAN_FORMAT_VERSION, **asdict(self), "layers": layers}

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, all or nothing."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        replace_file(Path(path), lambda file: file.write_text(text))


@dataclass(frozen=True)
class CurvePoint:
    """A plan of the least time in so much memory.

    Attributes:
        nbytes: that it takes where the model runs.
        predicted_s: of a pass of the mix on average.
        measured_s: of a pass of the mix on average, as taken; None if it was not measured.
    """

    nbytes: int
    predicted_s: float
    measured_s: float | None = None


def count_tokens(tokens: int) -> str:
    """``"1 token"`` or ``"16 tokens"``."""
    return f"{tokens} token{'s' * (tokens != 1)}"


def load_plan(path: str | Path) -> Plan:
    """Reads a plan that ``Plan.save`` wrote; a person may have edited it.

    Raises:
        FormatError: a field is missing, or of another type: which.
        OSError: the file cannot be read.
    """
    value = parse_json_object(Path(path).read_bytes(), str(path))
    version = value.pop("format_version", None)
    if version != PLAN_FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version: expected {PLAN_FORMAT_VERSION}, found {version!r}"
        )
    try:
        layers = [_layer(entry) for entry in value.pop("layers")]
        passes = [PlannedPass(**entry) for entry in value.pop("passes")]
        plan = Plan(layers=layers, passes=passes, **value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: expected the fields of a plan, found: {error}") from None
    _check(plan.layers, str(path))
    return plan


def _layer(entry: Mapping[str, Any]) -> PlannedLayer:
    fields = dict(entry)
    for name in ("seconds", "binds", "measured_s"):
        fields[name] = {int(tokens): value for tokens, value in fields.get(name, {}).items()}
    fields["tier"] = Tier.parse(fields["tier"])
    return PlannedLayer(**fields)


def _check(layers: Sequence[PlannedLayer], where: str) -> None:
    names = set()
    for layer in layers:
        if not isinstance(layer.name, str):
            raise FormatError(f"{where}: layers: expected a name, found {layer}")
        if layer.name in names:
            raise FormatError(f"{where}: layers: expected each once, found {layer.name!r} again")
        names.add(layer.name)
