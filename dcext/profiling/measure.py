"""Measures this machine: what memory, disk and decoders give, and how long layers take. A few seconds, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcext import _C
from dcext.build import cpu_name, set_num_threads
from dcext.codec import decode, encode, verify_payload
from dcext.codecs import codec_named, codec_names
from dcext.errors import FormatError
from dcext.nn.placement import check_device
from dcext.policy.machine import MEASURED, Machine, Processor, load_machine
from dcext.profiling.measure_device import device_name, measure_device
from dcext.profiling.timing import timed

TOKENS = (1, 4, 16, 64, 256)
# A layer of 4 MiB, and so many copies that none is in a cache when its turn comes.
LAYER_SHAPE, COPIES = (2048, 2048), 24
CACHED_SHAPE = (512, 1024)  # decoded in the cache of one core, as every thread does
READ_NBYTES = 128 << 20
DISK_NBYTES, DISK_PIECES, DISK_SLOTS_NBYTES = 256 << 20, 16, 16 << 20
# Of rounded normal integers: 3.64 bits of entropy, as layers have at a ratio of 2.2.
SIGMA = 3.017
# For codecs with exceptions: 16 levels, denser in the middle, as recipe rate makes.
LEVELS = (-23, -17, -13, -10, -7, -5, -3, -1, 1, 3, 5, 7, 10, 13, 17, 23)
LEVELS_SIGMA = 8.5
SECONDS_OF_A_FIGURE = 0.12
Progress = Callable[[str, float], None]


def cache_path(identity: dict[str, Any]) -> Path:
    """Where a machine's figures are kept: ``$DCEXT_CACHE``, else ``$XDG_CACHE_HOME/dcext``, else ``~/.cache/dcext``."""
    base = os.environ.get("DCEXT_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dcext")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(base).expanduser().resolve() / "machines" / f"{digest[:16]}.json"


def machine_identity(folder: Path, device: torch.device | None = None) -> dict[str, Any]:
    """What must be equal for figures to hold: processor, CPUs, build, torch, the disk of a folder, and the device."""
    extension = Path(_C.__file__)
    on_device = {} if device is None else {"device": device_name(device)}
    return {
        "cpu": cpu_name(),
        "cpus": _C.available_cpus(),
        "isa": _C.selected_isa(),
        "build": hashlib.sha256(extension.read_bytes()).hexdigest()[:16],
        "torch": torch.__version__,
        "disk": folder.stat().st_dev,
        **on_device,
    }


def tune(
    folder: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Machine:
    """The figures of this machine; measured unless they are in the cache already, for this machine and this build.

    Measures memory, disk and checksums, and for 1 thread, half and all of torch's: decoding in the cache and layers of
    each codec at 1 to 256 tokens. Takes about five seconds. With a device, also its memory and decoding, layers there at 1
    to 1024 tokens, and the link to it.

    Args:
        folder: on the disk that is measured, with room for 256 MiB; None for the cache's. The file is removed.
        device: that models run on, such as ``"cuda"``; None for the CPU.
        refresh: whether to measure even so.
        progress: called with what is done and its share of all.

    Raises:
        OSError: the folder cannot be written to.
        RuntimeError: there is no such device.
    """
    if folder is not None and not Path(folder).is_dir():
        found = "a file" if Path(folder).exists() else "none"
        raise FileNotFoundError(f"tune: folder: {folder}: expected a folder, found {found}")
    on = None if device is None else check_device("tune", "its figures", device)
    place = Path(folder) if folder is not None else cache_path({}).parent
    if folder is None:
        place.mkdir(parents=True, exist_ok=True)
    identity = machine_identity(place, on)
    path = cache_path(identity)
    if not refresh and path.exists():
        try:
            return load_machine(path)
        except FormatError:  # of another version, or damaged: it is measured anew
            pass
    report = progress or (lambda what, share: None)
    if on is None:
        machine = _measure(place, identity, report)
    else:
        here = tune(folder, refresh=refresh, progress=lambda what, share: report(what, share / 2))
        machine = _with_device(here, identity, on)
        report(identity["device"], 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine.save(path)
    return machine


def _with_device(here: Machine, identity: dict[str, Any], device: torch.device) -> Machine:
    measured, link_gbps, spread = measure_device(drawn_weights, device, SECONDS_OF_A_FIGURE)
    link = {"link_gbps": spread.pop("link_gbps")}
    of_device = {f"device.{name}": value for name, value in spread.items()}
    return replace(
        here,
        name=f"{identity['device']}, {here.name}",
        device=measured,
        link_gbps=link_gbps,
        uncertainty={**here.uncertainty, **link, **of_device},
        identity=identity,
        notes=f"{here.notes}; on the device blocks of layers, called from Python",
    )


def _measure(folder: Path, identity: dict[str, Any], progress: Progress) -> Machine:
    most = torch.get_num_threads()
    counts = sorted({1, max(1, most // 2), most})
    share = 0.9 / len(counts)
    host: dict[int, Processor] = {}
    uncertainty: dict[str, float] = {}
    payloads = _payloads()
    for threads in counts:
        with num_threads(threads):
            host[threads], spread = measure_host(payloads)
        progress(f"{threads} threads", share)
        uncertainty |= {f"host.{threads}.{name}": value for name, value in spread.items()}
    with num_threads(most):
        verify = timed([partial(verify_payload, p) for p in payloads["raw"]], SECONDS_OF_A_FIGURE)
    verify_gbps = payloads["raw"][0].numel() / verify.seconds / 1e9
    disk_gbps, disk_spread = measure_disk(folder)
    progress("disk", 0.1)
    uncertainty |= {"verify_gbps": verify.spread, "disk_gbps": disk_spread}
    return Machine(
        name=f"{identity['cpu']}, {most} thread{'s' * (most > 1)}",
        kind=MEASURED,
        host=host,
        disk_gbps=disk_gbps,
        verify_gbps=verify_gbps,
        uncertainty=uncertainty,
        identity=identity,
        notes=f"layers of {LAYER_SHAPE[0]} x {LAYER_SHAPE[1]} weights drawn at random, none of them in a cache",
    )


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """So many threads for layers and for the codec."""
    layers, codec = torch.get_num_threads(), _C.get_num_threads()
    torch.set_num_threads(threads)
    set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(layers)
        set_num_threads(codec)


def drawn_weights(codec: str, shape: tuple[int, int]) -> Tensor:
    """Integers (rows, cols) int8 such as recipes make for a codec."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    every = codec_named(codec).exception_every
    if not every:
        return (noise * SIGMA).round_().clamp_(-127, 127).to(torch.int8)
    levels = torch.tensor(LEVELS)
    q = levels[torch.bucketize(noise * LEVELS_SIGMA, (levels[1:] + levels[:-1]) / 2)].to(torch.int8)
    places = torch.randint(q.numel(), (q.numel() // every,), generator=generator)
    q.view(-1)[places] = torch.randint(-127, 128, places.shape, generator=generator).to(torch.int8)
    return q


def _payloads() -> dict[str, list[Tensor]]:
    """Copies of a layer in each codec."""
    payloads = {}
    for codec in codec_names():
        payload = encode(drawn_weights(codec, LAYER_SHAPE), codec)
        payloads[codec] = [_C.empty_weights(payload.numel()).copy_(payload) for _ in range(COPIES)]
    return payloads


def measure_host(payloads: dict[str, list[Tensor]]) -> tuple[Processor, dict[str, float]]:
    """The CPU with the threads that are set now, and how uncertain its figures are."""
    rows, cols = LAYER_SHAPE
    row_scale = torch.ones(rows)
    linear = torch.ops.dcext.linear.default
    layer_s: dict[str, dict[int, float]] = {}
    spread: dict[str, float] = {}
    for codec in codec_names():
        layer_s[codec] = {}
        for tokens in TOKENS:
            x = torch.randn(tokens, cols)
            layers = [
                partial(linear, x, payload, row_scale, None, None, "int8")
                for payload in payloads[codec]
            ]
            figure = timed(layers, SECONDS_OF_A_FIGURE)
            layer_s[codec][tokens] = figure.seconds / (rows * cols) * 1e9
            spread[f"layer_s.{codec}"] = max(spread.get(f"layer_s.{codec}", 0.0), figure.spread)
    decode_gweights = {}
    for codec in codec_names()[1:]:  # plain INT8 needs no decoding
        cached = encode(drawn_weights(codec, CACHED_SHAPE), codec)
        out = torch.empty(CACHED_SHAPE, dtype=torch.int8)
        figure = timed([partial(decode, cached, 1, out, verify=False)], SECONDS_OF_A_FIGURE)
        decode_gweights[codec] = torch.get_num_threads() * out.numel() / figure.seconds / 1e9
        spread[f"decode_gweights.{codec}"] = figure.spread
    memory = torch.zeros(READ_NBYTES // 8, dtype=torch.int64)
    read = timed([memory.max], SECONDS_OF_A_FIGURE)
    spread["memory_gbps"] = read.spread
    tops = max(2e-3 * tokens / seconds for tokens, seconds in layer_s["raw"].items())
    processor = Processor(
        memory_gbps=READ_NBYTES / read.seconds / 1e9,
        int8_tops=tops,
        decode_gweights=decode_gweights,
        layer_s=layer_s,
    )
    return processor, spread


def measure_disk(folder: Path) -> tuple[float, float]:
    """GB/s of the reads that streaming does, from a new file in a folder, and the relative uncertainty."""
    piece = encode(drawn_weights("raw", (2048, DISK_NBYTES // DISK_PIECES // 2048)), "raw")
    with tempfile.NamedTemporaryFile(dir=folder, prefix="dcext-tune-") as file:
        offsets = []
        for _ in range(DISK_PIECES):
            offsets.append(file.tell())
            file.write(piece.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
        units = [(str(offset), 0, offset, piece, -1) for offset in offsets]
        stream = _C.HostStream([file.name], units, DISK_SLOTS_NBYTES, False)
        try:
            figure = timed([stream.read_all], 4 * SECONDS_OF_A_FIGURE)
        finally:
            stream.close()
    return DISK_PIECES * piece.numel() / figure.seconds / 1e9, figure.spread
