"""Blocks whose weights are copied to a device ahead of their calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dcext.codec import decode, payload_info
from dcext.nn.compressed import CompressedModule
from dcext.nn.placement import batch_decodes
from dcext.weights.device_stream import DeviceStream, FromFile, HostDecoded
from dcext.weights.indexed import IndexedWeight
from dcext.weights.origin import Origin
from dcext.weights.packed import PackedWeight
from dcext.weights.resident import make_resident

_CPU = torch.device("cpu")
_EMPTY = torch.empty(0, dtype=torch.uint8)

Part = Tensor | HostDecoded | FromFile
# Makes a weight of the views of its parts in a slot.
Rebuild = Callable[[list[Tensor]], "IndexedWeight | PackedWeight"]


def device_parts(
    payload: Tensor, device: torch.device, *, decoded: bool
) -> tuple[list[Part], Rebuild]:
    """What of a weight is copied, and what becomes of it on the device.

    Args:
        payload: verified, on the CPU. Codec raw is copied as the matrix, others with their index.
        device: where it is copied to.
        decoded: whether the host decodes it on its way.
    """
    codec = payload_info(payload)["codec"]
    if decoded and codec != "raw":
        return [HostDecoded(payload)], lambda views: IndexedWeight.dense(views[0], device)
    if codec == "raw":
        qweight = decode(payload, verify=False)
        return [qweight], lambda views: IndexedWeight.dense(views[0], device)
    weight = make_resident(payload, _CPU)
    if isinstance(weight, IndexedWeight):
        return _indexed_parts(weight, device)
    return _packed_parts(weight)


def file_parts(origin: Origin, device: torch.device) -> tuple[list[Part], Rebuild]:
    """``device_parts`` of a payload that stays in its file: only its index is in host memory.

    Raises:
        FormatError: it is damaged.
        ValueError: its frames have matches, which a device cannot decode.
    """
    weight = make_resident(origin.view(), _CPU)
    if isinstance(weight, IndexedWeight):
        if weight.codec == "raw" and weight.view is not None:
            begin = payload_info(weight.payload)["chunks"][0]["offset"]
            shape = weight.shape
            nbytes = shape[0] * shape[1]
            return [FromFile(origin)], lambda views: IndexedWeight.dense(
                views[0][begin : begin + nbytes].view(torch.int8).view(shape), device
            )
        if weight.index is None or weight.codec == "raw":
            raise ValueError(
                f"{origin.name}: expected frames without matches, which a device can decode from a file, found others"
            )
    parts, rebuild = (
        _indexed_parts(weight, device)
        if isinstance(weight, IndexedWeight)
        else _packed_parts(weight)
    )
    return [FromFile(origin), *parts[1:]], rebuild


def _indexed_parts(weight: IndexedWeight, device: torch.device) -> tuple[list[Part], Rebuild]:
    if weight.index is None:  # its frames have matches
        return [weight.qweight()], lambda views: IndexedWeight.dense(views[0], device)
    parts: list[Part] = [weight.payload, weight.index]
    # What rebuilds it stays, and must not keep what was copied to pinned memory.
    shell = weight.moved(_EMPTY, _EMPTY, _CPU)
    return parts, lambda views: shell.moved(views[0], views[1], device)


def _packed_parts(weight: PackedWeight) -> tuple[list[Part], Rebuild]:
    tensors = [weight.payload, *weight.tiles.values()]
    if weight.exceptions is not None:
        tensors += weight.exceptions.tensors()
    like = [(tensor.dtype, tensor.shape) for tensor in tensors]
    kind = None if weight.exceptions is None else type(weight.exceptions)
    blocks = list(weight.tiles)
    shell = replace(weight, payload=_EMPTY, tiles={}, exceptions=None)

    def rebuild(views: list[Tensor]) -> PackedWeight:
        found = [
            view.view(dtype).view(shape) for view, (dtype, shape) in zip(views, like, strict=True)
        ]
        tiles = dict(zip(blocks, found[1:], strict=False))
        exceptions = None if kind is None else kind(*found[1 + len(tiles) :])
        return replace(shell, payload=found[0], tiles=tiles, exceptions=exceptions)

    return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors], rebuild


class PrefetchedBlock:
    """A block and its unit of a stream: fetched when the block is called, given back when its slot is read no more.

    Other layers of the block may be resident on the device.

    Attributes:
        in_use: whether the weights are in the slot for those who enqueue work now.
    """

    def __init__(self, block: nn.Module, unit: int) -> None:
        """Args: unit: of the stream that ``start`` is given."""
        self.block = block
        self.unit = unit
        self.in_use = False
        self.stream: DeviceStream | None = None
        self.parts: list[Part] = []
        self._layers: list[tuple[CompressedModule, str, slice, Rebuild]] = []
        self._hooks: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefetchedBlock:
        return copy.copy(self)

    def add(
        self, layer: CompressedModule, payload: Tensor, device: torch.device, *, decoded: bool
    ) -> list[Part]:
        """Adds a layer of the block, see ``device_parts``; returns its parts."""
        codec = payload_info(payload)["codec"]
        return self._add(layer, codec, *device_parts(payload, device, decoded=decoded))

    def add_from_file(
        self, layer: CompressedModule, origin: Origin, device: torch.device
    ) -> list[Part]:
        """Adds a layer whose payload stays in its file; returns its parts."""
        codec = payload_info(origin.view())["codec"]
        return self._add(layer, codec, *file_parts(origin, device))

    def _add(
        self, layer: CompressedModule, codec: str, parts: list[Part], rebuild: Rebuild
    ) -> list[Part]:
        begin = len(self.parts)
        self.parts += parts
        self._layers.append((layer, codec, slice(begin, begin + len(parts)), rebuild))
        return parts

    def take_parts(self) -> list[Part]:
        """The parts, which are forgotten here."""
        parts, self.parts = self.parts, []
        return parts

    def start(self, stream: DeviceStream) -> None:
        """Has the block fetch its weights from now on."""
        self.stream = stream
        views = stream.parts(self.unit)
        weights = []
        for layer, codec, places, rebuild in self._layers:
            weight = rebuild(views[places])
            weights.append(weight)
            layer.prefetch_with(self, weight, codec)
        # Frames are decoded at the beginning, by one launch; what is multiplied in the slot stays until the end.
        decoded_first = all(
            isinstance(weight, IndexedWeight) and weight.view is None for weight in weights
        )
        batch_decodes(self.block)
        self._hooks.append(self.block.register_forward_pre_hook(self._fetch, prepend=True))
        if decoded_first:
            self._hooks.append(self.block.register_forward_pre_hook(self._give_back_early))
        self._hooks.append(self.block.register_forward_hook(self._give_back, always_call=True))

    def stop(self) -> None:
        """Takes the hooks away; the layers are offloaded to their files then."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer, *_ in self._layers:
            layer.offload_to_file()
        self.stream = None

    def _fetch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert self.stream is not None
        self.stream.fetch(self.unit)
        self.in_use = True

    def _give_back_early(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._end(self._layers[-1][0].decoded)

    def _give_back(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.in_use:
            self._end(next(_tensors(output), None))

    def _end(self, after: Tensor | None) -> None:
        assert self.stream is not None
        self.in_use = False
        self.stream.fetched(self.unit, after)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
