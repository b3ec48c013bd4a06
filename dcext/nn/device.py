"""How compressed weights rest on a GPU, and how a block's are decoded together."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dcext import _C
from dcext.codec import decode, encode, payload_info, seek_index
from dcext.errors import FormatError

if TYPE_CHECKING:
    from dcext.kernels.packed_weight import PackedWeight
    from dcext.runtime.host_stream import StreamedWeight
    from dcext.runtime.traveling import TravelingBlock

Made = TypeVar("Made")

# DecodeFailure of csrc/codec/seek_decode.h, bit by bit.
_FAILURES = (
    "an index that points outside its payload",
    "lengths of codes that no code has",
    "a segment that ends elsewhere than its index says",
    "an exception behind the end of its tile",
)


class IndexedWeight:
    """A payload of codec raw or zstd on a device, with what it takes to decode it there.

    Attributes:
        shape: ``(out_features, in_features)``.
        codec: ``"raw"`` or ``"zstd"``, of what rests.
        payload: 1-D uint8.
        index: its seek index; None where the weights lie in the payload as a dense matrix (``view``).
        view: that matrix, ``(out_features, in_features)`` int8, or None.
        failures: ``(1,)`` int32, nonzero once decoding has found damage (``raise_if_damaged``). Reading it waits for
            the device, so nothing does while a model runs.
    """

    def __init__(self, payload: Tensor, device: torch.device | str) -> None:
        """Copies a payload to a device; where it has matches, decodes it first and keeps it raw, with a warning.

        Args:
            payload: 1-D uint8 on the CPU.
            device: where the weight shall rest.

        Raises:
            FormatError: the payload is corrupt.
            RuntimeError: it must be decoded on a GPU, and dcext was built without CUDA.
        """
        info = payload_info(payload)
        index = None
        if info["codec"] == "zstd":
            index = seek_index(payload)
            if index is None:
                warnings.warn(
                    f"a payload of shape {info['shape']} and zstd level {info['level']} has matches, which a GPU cannot "
                    "decode: it rests as raw INT8 there",
                    stacklevel=2,
                )
                payload = encode(decode(payload), "raw")
                info = payload_info(payload)
        self.shape: tuple[int, int] = info["shape"]
        self.codec: str = info["codec"]
        is_dense = index is None and _lies_dense(info)
        if index is None and not is_dense:
            index = seek_index(payload)
        if index is not None and torch.device(device).type == "cuda" and not _C.with_cuda:
            raise RuntimeError(
                "dcext was built without CUDA and cannot decode zstd on a GPU: expected a build with DCEXT_CUDA=1, "
                "or codec raw or packed"
            )
        self.payload = payload.to(device)
        self.index = None if index is None else index.to(device)
        self.failures = torch.zeros(1, dtype=torch.int32, device=self.payload.device)
        self.view: Tensor | None = None
        if is_dense:
            begin = info["chunks"][0]["offset"]
            rows, cols = self.shape
            self.view = self.payload[begin : begin + rows * cols].view(torch.int8).view(rows, cols)

    @classmethod
    def dense(cls, matrix: Tensor, device: torch.device | str) -> IndexedWeight:
        """Weights that lie as they are multiplied: ``(out_features, in_features)`` int8 on the device, not copied."""
        weight = cls.__new__(cls)
        weight.shape = (matrix.shape[0], matrix.shape[1])
        weight.codec = "raw"
        weight.payload = matrix.reshape(-1).view(torch.uint8)
        weight.index = None
        weight.view = matrix
        weight.failures = torch.zeros(1, dtype=torch.int32, device=device)
        return weight

    def moved(self, payload: Tensor, index: Tensor, device: torch.device | str) -> IndexedWeight:
        """The same weight where payload and index lie elsewhere, not copied."""
        weight = copy.copy(self)
        weight.payload, weight.index = payload, index
        weight.failures = torch.zeros(1, dtype=torch.int32, device=device)
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes on the device: payload and index."""
        return self.payload.nbytes + (0 if self.index is None else self.index.nbytes)

    @property
    def device(self) -> torch.device:
        """Where the weight rests."""
        return self.payload.device

    def qweight(self) -> Tensor:
        """The weights: ``(out_features, in_features)`` int8; new memory unless they rest dense."""
        return decode_together([self])[0]

    def raise_if_damaged(self) -> None:
        """Waits for the device.

        Raises:
            FormatError: a decode since the weight was made has found damaged data.
        """
        found = int(self.failures)
        if found:
            reasons = [text for bit, text in enumerate(_FAILURES) if found >> bit & 1]
            raise FormatError(
                f"weights of shape {self.shape} on {self.device}, or others decoded together with them: expected "
                f"intact frames, found {' and '.join(reasons)}"
            )


def _lies_dense(info: dict[str, Any]) -> bool:
    """Whether the tiles of a raw payload follow each other without padding, as whole rows."""
    chunks = info["chunks"]
    if info["slab_cols"] != info["shape"][1]:
        return False
    return all(
        chunk["offset"] + chunk["nbytes"] == later["offset"]
        for chunk, later in itertools.pairwise(chunks)
    )


def decode_together(weights: list[IndexedWeight]) -> list[Tensor]:
    """Decodes weights of one device in one launch; those that rest dense are returned as they lie.

    Captured in a CUDA graph like any operator: it neither waits for the device nor reads from it.
    """
    coded = [weight for weight in weights if weight.view is None]
    decoded = [
        torch.empty(weight.shape, dtype=torch.int8, device=weight.payload.device)
        for weight in coded
    ]
    if coded:
        torch.ops.dcext.decode_indexed_(
            [weight.payload for weight in coded],
            [weight.index for weight in coded],
            decoded,
            coded[0].failures,
        )
    fresh = iter(decoded)
    return [next(fresh) if weight.view is None else weight.view for weight in weights]


def rest_on(payload: Tensor, device: torch.device) -> IndexedWeight | PackedWeight:
    """A payload as layers use it on a device; modules that share a payload share the result."""

    def make() -> IndexedWeight | PackedWeight:
        if payload_info(payload)["codec"] != "packed":
            return IndexedWeight(payload, device)
        from dcext.kernels.packed_weight import PackedWeight  # imports triton

        return PackedWeight.from_payload(payload, device)

    return made_once(payload, device, make)


_MADE: dict[tuple[int, torch.device], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}


def made_once(source: Tensor, device: torch.device, make: Callable[[], Made]) -> Made:
    """What ``make`` gave for this tensor and device, as long as both live; else what it gives now."""
    for key, (of, value) in list(_MADE.items()):
        if of() is None or value() is None:
            del _MADE[key]
    key = (id(source), device)
    if key in _MADE:
        found = _MADE[key][1]()
        if found is not None:
            return found
    made = make()
    _MADE[key] = (weakref.ref(source), weakref.ref(made))
    return made


class Resting(nn.Module):
    """What modules have whose weights may rest elsewhere than in the memory of the CPU.

    Attributes:
        shape: ``(out_features, in_features)``.
        resting: None in the memory of the CPU, where layers read the payload itself.
        decoded: the int8 matrix while a block's weights are decoded together (``batch_decodes``), else None.
        travels_with: the block that brings ``resting`` to the device when it is called, or None.
    """

    shape: tuple[int, int]
    resting: IndexedWeight | PackedWeight | StreamedWeight | None = None
    decoded: Tensor | None = None
    travels_with: TravelingBlock | None = None


_BATCHED = "_dcext_decodes_together"


def batch_decodes(block: nn.Module) -> None:
    """Has the weights of a decoder block decoded in one launch whenever it is called, and dropped behind it.

    One matrix of a small model does not fill a GPU; seven do. Costs memory for all of them at a time. Modules that rest
    on the CPU, or need no decoding, are left alone. A second call for the same block changes nothing.
    """
    if getattr(block, _BATCHED, False):
        return
    setattr(block, _BATCHED, True)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        layers = [
            (layer, layer.resting)
            for layer in module.modules()
            if isinstance(layer, Resting) and isinstance(layer.resting, IndexedWeight)
        ]
        matrices = decode_together([weight for _, weight in layers])
        for (layer, _), matrix in zip(layers, matrices, strict=True):
            layer.decoded = matrix

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for layer in module.modules():
            if isinstance(layer, Resting):
                layer.decoded = None

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after, always_call=True)


def check_device(function: str, wanted_for: str, device: torch.device) -> None:
    """Whether torch finds it.

    Args:
        function: that needs it, for the message.
        wanted_for: what needs it.
        device: any.

    Raises:
        RuntimeError: it is a GPU and there is none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"{function}: device: expected a GPU for {wanted_for}, as torch finds none, got {str(device)!r}"
        )


def place(model: nn.Module, device: torch.device | str) -> None:
    """Moves a model to a device, and has each of its decoder blocks decode in one launch if that is a GPU.

    Blocks are the elements of the ``nn.ModuleList`` that holds most compressed weights.

    Raises:
        RuntimeError: torch finds no such device, or dcext was built without CUDA and weights are zstd.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"place: device: expected 'cpu', as torch finds no GPU, got {str(device)!r}"
        )
    model.to(device)
    if device.type == "cpu":
        return
    for block in decoder_blocks(model):
        batch_decodes(block)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the ``nn.ModuleList`` that holds most compressed weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_num_compressed_weights, default=[]))


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """``decoder_blocks`` by their names in the model, in order."""
    blocks = {id(block) for block in decoder_blocks(model)}
    return {name: module for name, module in model.named_modules() if id(module) in blocks}


def blocks_of(model: nn.Module) -> dict[int, str]:
    """Names of decoder blocks, by the ``id`` of each module inside."""
    blocks = named_blocks(model).items()
    return {id(module): name for name, block in blocks for module in block.modules()}


def _num_compressed_weights(module: nn.Module) -> int:
    shapes = [layer.shape for layer in module.modules() if isinstance(layer, Resting)]
    return sum(rows * cols for rows, cols in shapes)


def raise_if_damaged(model: nn.Module) -> None:
    """Waits for the device, then reports what decoding has found since the model was moved there.

    Raises:
        FormatError: a layer's weights were damaged in memory.
    """
    for name, module in model.named_modules():
        if isinstance(module, Resting) and isinstance(module.resting, IndexedWeight):
            try:
                module.resting.raise_if_damaged()
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from None
