"""Compressed weights on a device, with what it takes to decode them there."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from dcext import _C
from dcext.codec import decode, encode, payload_info, seek_index
from dcext.errors import FormatError

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
        codec: ``"raw"`` or ``"zstd"``, of what is resident.
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
            device: where the weight is to be resident.

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
                    "decode: it is resident as raw INT8 there",
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
        """Where the weight is resident."""
        return self.payload.device

    def qweight(self) -> Tensor:
        """The weights: ``(out_features, in_features)`` int8; new memory unless they are dense."""
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
    """Decodes weights of one device in one launch; those that are dense are returned as they lie.

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
