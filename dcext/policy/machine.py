"""What a machine can do: bandwidths, and the seconds that a layer takes on it. Measured here, or written down.

A machine is a JSON object, see ``dcext/policy/MACHINE.md``. Units: ``gbps`` are 1e9 bytes per second, ``gweights`` 1e9
weights per second, ``int8_tops`` 1e12 multiplications and additions per second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcext.codecs import codec_names
from dcext.errors import FormatError
from dcext.format.manifest import parse_json_object
from dcext.format.replace import replace_file

MACHINE_FORMAT_VERSION = 1
MEASURED, PROJECTED = "measured", "projected"
Table = Mapping[int, float]


def interpolate(table: Table, tokens: int) -> float:
    """A value between two numbers of tokens, linear in the logarithms of both.

    Below the first it stays what it is there, beyond the last it grows with the tokens.

    Raises:
        ValueError: the table is empty.
    """
    if not table:
        raise ValueError("interpolate: table: expected at least one number of tokens, got none")
    known = sorted(table)
    if tokens <= known[0]:
        return table[known[0]]
    if tokens >= known[-1]:
        return table[known[-1]] * tokens / known[-1]
    above = next(index for index, at in enumerate(known) if at >= tokens)
    left, right = known[above - 1], known[above]
    share = math.log(tokens / left) / math.log(right / left)
    return math.exp((1 - share) * math.log(table[left]) + share * math.log(table[right]))


@dataclass(frozen=True)
class Processor:
    """What multiplies, a CPU with so many threads or a GPU, and the memory that it reads.

    Attributes:
        memory_gbps: reading.
        int8_tops: INT8 multiplications and additions.
        decode_gweights: by codec, decoding in the cache (or to scratch); a codec that is not here costs nothing to decode.
        scratch: codecs that are decoded as a whole before they are multiplied.
        layer_s: measured seconds for 1e9 weights, by codec and number of tokens; empty where nothing was measured.
    """

    memory_gbps: float
    int8_tops: float
    decode_gweights: Mapping[str, float] = field(default_factory=dict)
    scratch: tuple[str, ...] = ()
    layer_s: Mapping[str, Table] = field(default_factory=dict)

    def roofline_s(self, codec: str, weights: int, nbytes: int, tokens: int) -> float:
        """Seconds of a layer by bandwidths alone.

        ``max(nbytes / memory, weights / decode + 2 * weights * tokens / int8)``, as memory is read while others compute;
        with scratch ``weights / decode + max(weights / memory, 2 * weights * tokens / int8)``. Source: the roofline model,
        Williams, Waterman, Patterson, CACM 52 (2009).

        Args:
            codec: of the layer.
            weights: of the layer.
            nbytes: of its payload.
            tokens: that are multiplied at a time.
        """
        decode = weights / (self.decode_gweights.get(codec, math.inf) * 1e9)
        multiply = 2 * weights * tokens / (self.int8_tops * 1e12)
        memory_s = 1 / (self.memory_gbps * 1e9)
        if codec in self.scratch:
            return decode + max(weights * memory_s, multiply)
        return max(nbytes * memory_s, decode + multiply)

    def seconds(self, codec: str, weights: int, nbytes: int, tokens: int) -> float:
        """Seconds of a layer: from what was measured, else ``roofline_s``."""
        table = self.layer_s.get(codec)
        if not table:
            return self.roofline_s(codec, weights, nbytes, tokens)
        return interpolate(table, tokens) * weights / 1e9


@dataclass(frozen=True)
class Machine:
    """See the module.

    Attributes:
        name: to people.
        kind: ``"measured"`` or ``"projected"``.
        host: the CPU, by number of threads.
        disk_gbps: large reads beside the page cache; None without a disk to read weights from.
        verify_gbps: comparing streamed bytes with their checksums.
        device: the GPU that runs the model; None where the CPU does.
        link_gbps: from pinned host memory to the device; None without one.
        uncertainty: relative, half of the range between the 20th and the 80th percentile, by figure.
        identity: what must be equal for figures to hold: CPU, build, folder of the disk; empty if projected.
        notes: where figures come from.
    """

    name: str
    kind: str
    host: Mapping[int, Processor]
    disk_gbps: float | None = None
    verify_gbps: float | None = None
    device: Processor | None = None
    link_gbps: float | None = None
    uncertainty: Mapping[str, float] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""

    def host_with(self, threads: int | None = None) -> Processor:
        """The CPU with a number of threads: the most that are known and not above it; None for all."""
        known = sorted(self.host)
        if threads is None:
            return self.host[known[-1]]
        return self.host[max((n for n in known if n <= threads), default=known[0])]

    @property
    def runs_on(self) -> str:
        """``"device"`` or ``"host"``."""
        return "host" if self.device is None else "device"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format_version": MACHINE_FORMAT_VERSION,
            "name": self.name,
            "kind": self.kind,
            "host": {str(n): _processor_to_dict(host) for n, host in self.host.items()},
            "disk_gbps": self.disk_gbps,
            "verify_gbps": self.verify_gbps,
            "device": None if self.device is None else _processor_to_dict(self.device),
            "link_gbps": self.link_gbps,
            "uncertainty": dict(self.uncertainty),
            "identity": dict(self.identity),
            "notes": self.notes,
        }

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, all or nothing."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        replace_file(Path(path), lambda file: file.write_text(text))


def _processor_to_dict(processor: Processor) -> dict[str, Any]:
    tables = {
        codec: {str(tokens): seconds for tokens, seconds in table.items()}
        for codec, table in processor.layer_s.items()
    }
    return {
        "memory_gbps": processor.memory_gbps,
        "int8_tops": processor.int8_tops,
        "decode_gweights": dict(processor.decode_gweights),
        "scratch": list(processor.scratch),
        "layer_s": tables,
    }


def load_machine(path: str | Path) -> Machine:
    """Reads a machine that ``Machine.save`` or a person wrote.

    Raises:
        FormatError: a field is missing, unknown, or not a positive number: which, expected and found.
        OSError: the file cannot be read.
    """
    return machine_from_dict(parse_json_object(Path(path).read_bytes(), str(path)), str(path))


def machine_from_dict(value: Mapping[str, Any], where: str) -> Machine:
    """The machine of a JSON object; ``where`` names it in messages.

    Raises:
        FormatError: as for ``load_machine``.
    """
    fields = _Fields(value, where)
    fields.only(
        "format_version name kind host disk_gbps verify_gbps device link_gbps uncertainty identity notes"
    )
    if value.get("format_version") != MACHINE_FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version: expected {MACHINE_FORMAT_VERSION}, found {value.get('format_version')!r}"
        )
    kind = fields.text("kind")
    if kind not in (MEASURED, PROJECTED):
        raise FormatError(f"{where}: kind: expected {MEASURED!r} or {PROJECTED!r}, found {kind!r}")
    host = {
        fields.count("host", key): _processor(entry, f"{where}: host: {key}")
        for key, entry in fields.mapping("host").items()
    }
    if not host:
        raise FormatError(f"{where}: host: expected processors by number of threads, found none")
    device = value.get("device")
    machine = Machine(
        name=fields.text("name"),
        kind=kind,
        host=host,
        disk_gbps=fields.optional_number("disk_gbps"),
        verify_gbps=fields.optional_number("verify_gbps"),
        device=None if device is None else _processor(device, f"{where}: device"),
        link_gbps=fields.optional_number("link_gbps"),
        uncertainty=fields.mapping("uncertainty", {}),
        identity=fields.mapping("identity", {}),
        notes=str(value.get("notes", "")),
    )
    if (machine.device is None) != (machine.link_gbps is None):
        raise FormatError(f"{where}: device, link_gbps: expected both or neither, found one")
    return machine


def _processor(value: Any, where: str) -> Processor:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
    fields = _Fields(value, where)
    fields.only("memory_gbps int8_tops decode_gweights scratch layer_s")
    decode = fields.mapping("decode_gweights", {})
    tables = fields.mapping("layer_s", {})
    scratch = value.get("scratch", [])
    for name in [*decode, *tables, *scratch]:
        if name not in codec_names():
            raise FormatError(f"{where}: expected a codec of {codec_names()}, found {name!r}")
    for codec, table in tables.items():
        if not isinstance(table, dict) or not table:
            raise FormatError(
                f"{where}: layer_s: {codec}: expected seconds by tokens, found {table!r}"
            )
    return Processor(
        memory_gbps=fields.number("memory_gbps"),
        int8_tops=fields.number("int8_tops"),
        decode_gweights={
            c: _positive(v, f"{where}: decode_gweights: {c}") for c, v in decode.items()
        },
        scratch=tuple(scratch),
        layer_s={
            codec: {
                fields.count("layer_s", tokens): _positive(seconds, f"{where}: layer_s: {codec}")
                for tokens, seconds in table.items()
            }
            for codec, table in tables.items()
        },
    )


def _positive(value: Any, where: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise FormatError(f"{where}: expected a positive number, found {value!r}")
    return float(value)


class _Fields:
    """Access to the fields of a JSON object, with messages that say where."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.value = value
        self.where = where

    def only(self, names: str) -> None:
        unknown = sorted(set(self.value) - set(names.split()))
        if unknown:
            raise FormatError(
                f"{self.where}: expected fields of {names.split()}, found {unknown[0]!r}"
            )

    def number(self, name: str) -> float:
        return _positive(self.value.get(name), f"{self.where}: {name}")

    def optional_number(self, name: str) -> float | None:
        return None if self.value.get(name) is None else self.number(name)

    def text(self, name: str) -> str:
        found = self.value.get(name)
        if not isinstance(found, str) or not found:
            raise FormatError(f"{self.where}: {name}: expected text, found {found!r}")
        return found

    def mapping(self, name: str, default: Any = None) -> dict[str, Any]:
        found = self.value.get(name, default)
        if not isinstance(found, dict):
            raise FormatError(f"{self.where}: {name}: expected an object, found {found!r}")
        return found

    def count(self, name: str, key: str) -> int:
        if not key.isascii() or not key.isdigit() or int(key) < 1:
            raise FormatError(f"{self.where}: {name}: expected a count from 1 on, found {key!r}")
        return int(key)
