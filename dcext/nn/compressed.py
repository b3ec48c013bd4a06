"""What compressed modules share: a payload, its scales, and how they move, load and describe themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dcext import ops  # noqa: F401  (registers dequantize_weight)
from dcext.codec import decode, payload_info, verify_payload
from dcext.errors import FormatError
from dcext.nn.views import MatrixView
from dcext.weights.host_stream import StreamedWeight
from dcext.weights.indexed import IndexedWeight
from dcext.weights.origin import Origin, to_weight_memory
from dcext.weights.packed import PackedWeight
from dcext.weights.resident import make_resident, shared_result

_CPU = torch.device("cpu")
_dequantize = torch.ops.dcext.dequantize_weight.default
OWN_BUFFERS = (
    "payload",
    "row_scale",
    "col_scale",
    "bias",
    "outlier_index",
    "outlier_weight",
)
COMPUTE_DTYPE = "_compute_dtype"


class Prefetcher(Protocol):
    """What copies the weights of a block to a device ahead of its calls.

    Attributes:
        in_use: whether the weights are on the device for work that is enqueued now.
    """

    in_use: bool

    def stop(self) -> None:
        """Copies nothing any more; the weights stay in their files."""


def storage_form(scale: Tensor) -> Tensor:
    """How a checkpoint stores a vector of scales: one number where all are equal, bfloat16 where that loses nothing."""
    if bool((scale == scale[0]).all()):
        scale = scale[:1]
    half = scale.to(torch.bfloat16)
    return half if torch.equal(half.float(), scale) else scale


def stored_scale_nbytes(scale: Tensor) -> int:
    """Bytes that a vector of scales takes in a checkpoint."""
    return storage_form(scale).nbytes


class CompressedModule(nn.Module):
    """A matrix ``diag(row_scale) @ qweight @ diag(col_scale)`` stored as a payload. Frozen: its one parameter is empty.

    ``.to("cuda")`` moves it to a GPU as any module, compressed; see ``dcext.weights.indexed`` for its form there.

    Attributes:
        payload: 1-D uint8, the coded ``qweight``; never modified in place, so modules may share one. Mapped memory where
            the weights stay in a file (``dcext.offload``).
        is_hidden: whether the state dict leaves payload and scales out, as while a loader that does not know them fills
            what else the model has.
        origin: where the payload comes from, or None if not from a file.
        row_scale: ``(out_features,)`` float32; may be given as ``(1,)`` where all rows share one.
        col_scale: ``(in_features,)`` float32, or None; may be given as ``(1,)`` too.
        shape: ``(out_features, in_features)``.
        backing: where layers read the weights unless they read ``payload``, as on the CPU: resident on a device, or
            streamed from a file.
        decoded: the int8 matrix while a block's weights are decoded together (``dcext.nn.placement``), else None.
        prefetched_by: what copies ``backing`` to the device when the block is called, or None.
    """

    payload: Tensor
    row_scale: Tensor
    col_scale: Tensor | None
    shape: tuple[int, int]
    backing: IndexedWeight | PackedWeight | StreamedWeight | None = None
    decoded: Tensor | None = None
    prefetched_by: Prefetcher | None = None
    _compute_dtype: Tensor
    activations: str = "none"
    is_hidden: bool = False
    origin: Origin | None = None
    _is_in_file: bool = False
    _weight_shape: torch.Size | None = None
    _is_transposed: bool = False

    def __init__(
        self, payload: Tensor, row_scale: Tensor, col_scale: Tensor | None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)  # not that of the float layer, which makes a weight
        self._take_matrix(payload, row_scale, col_scale, dtype)

    def _take_matrix(
        self, payload: Tensor, row_scale: Tensor, col_scale: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Takes over an encoded matrix; all else of the module stays as it is."""
        self._describe(payload_info(payload))
        self.register_buffer("payload", payload)
        self.register_buffer("row_scale", self._checked("row_scale", row_scale, self.shape[0]))
        col_scale = (
            None if col_scale is None else self._checked("col_scale", col_scale, self.shape[1])
        )
        self.register_buffer("col_scale", col_scale)
        # Empty; follows .to(dtype), .half() .. as a weight would, and tells what to compute in. A parameter, since much
        # code asks next(module.parameters()) for dtype and device; no state dict has it.
        empty = torch.empty(0, dtype=dtype, device=self.row_scale.device)
        super().register_parameter(COMPUTE_DTYPE, nn.Parameter(empty, requires_grad=False))
        self._mark_loaded()

    def _mark_loaded(self) -> None:
        """Tells transformers that nothing of what we have is to be given initial values."""
        for tensor in (self._parameters[COMPUTE_DTYPE], *map(self._buffers.get, OWN_BUFFERS)):
            if tensor is not None:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]

    def _describe(self, info: Mapping[str, Any]) -> None:
        self.shape = info["shape"]
        self.codec: str = info["codec"]

    def _checked(self, name: str, vector: Tensor, size: int) -> Tensor:
        if name.endswith("_scale") and vector.shape == (1,):
            vector = vector.expand(size)
        if vector.shape != (size,):
            kind = type(self).__name__
            raise ValueError(f"{kind}: {name}: expected shape ({size},), got {tuple(vector.shape)}")
        # An unchanged tensor keeps its identity: layers that read the same input share their col_scale.
        ready = (
            vector.dtype == torch.float32 and vector.is_contiguous() and not vector.requires_grad
        )
        return vector if ready else vector.detach().float().contiguous()

    @property
    def is_in_file(self) -> bool:
        """Whether the payload is a file's, mapped: not verified yet, and read when it is used."""
        return self._is_in_file

    def set_origin(self, origin: Origin, *, in_file: bool) -> None:
        """Notes which tensor of a checkpoint the payload is.

        Args:
            origin: the tensor.
            in_file: whether the payload is still the file's bytes, mapped.
        """
        self.origin = origin
        self._is_in_file = in_file

    def stream_from(self, view: Tensor, weight: StreamedWeight) -> None:
        """Leaves the weights in their file and reads them from there whenever the module is called.

        Args:
            view: the payload in the file, mapped.
            weight: reads it.
        """
        self._describe(payload_info(view))
        self.payload = view
        self.backing = weight
        self._is_in_file = True

    def offload_to_file(self) -> None:
        """Leaves the weights in their file; the module can be called again after ``prefetch_with``."""
        assert self.origin is not None
        self.set_payload(self.origin.view())
        self._is_in_file = True

    def prefetch_with(
        self, prefetcher: Prefetcher, weight: IndexedWeight | PackedWeight, codec: str
    ) -> None:
        """After ``offload_to_file``: has the weights copied to a device whenever the block that the module is in is called.

        Args:
            prefetcher: copies them.
            weight: their form on the device.
            codec: ``"raw"``, ``"packed"`` or ``"zstd"``, of what is copied.
        """
        self.backing = weight
        self.codec = codec
        self.prefetched_by = prefetcher

    def move_all_but_payload(self, device: torch.device) -> None:
        """Moves scales, bias and outlier columns; modules that share one of these still do."""
        for name, buffer in self._buffers.items():
            if buffer is not None and name != "payload" and buffer.device != device:
                moved = shared_result(buffer, device, lambda buffer=buffer: buffer.to(device))  # type: ignore[misc]
                self._buffers[name] = moved

    def set_payload(self, payload: Tensor) -> None:
        """Keeps the weights in host memory.

        Args:
            payload: of the module's integers, in any codec; not copied.
        """
        self._drop_backing()
        self._describe(payload_info(payload))
        self.payload = payload

    def make_resident(self, payload: Tensor, device: torch.device) -> None:
        """Keeps the weights on a device.

        Args:
            payload: of the module's integers, on the CPU; copied.
            device: where the module is from now on.
        """
        self.set_payload(payload)
        self.move_all_but_payload(device)
        self._move_to(device)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that the module computes in, as a float module's ``weight.dtype``."""
        return self._compute_dtype.dtype

    @property
    def weight(self) -> Tensor:
        """The weights as a read-only tensor of the float layer's shape; decoded whenever its values are used.

        Where a compiler traces the module, an operator that decodes: one of which only shape or dtype is used is dropped.
        """
        if torch.compiler.is_compiling():
            matrix = self.dequantize()
            matrix = matrix.t() if self._is_transposed else matrix
            return matrix if self._weight_shape is None else matrix.reshape(self._weight_shape)
        return MatrixView.of(self, self._weight_shape, transposed=self._is_transposed)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse_weight(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module's, but for ``weight``, which is there and read-only.

        Raises:
            AttributeError: ``name`` is ``"weight"``.
        """
        if name == "weight":
            self._refuse_weight(param)
            return
        super().register_parameter(name, param)

    def _refuse_weight(self, value: Any) -> None:
        # Tying it to a weight that it shares already changes nothing.
        if isinstance(value, MatrixView) and getattr(value.module, "payload", None) is self.payload:
            return
        raise AttributeError(
            f"{type(self).__name__}: weight: compressed and read-only; expected a new module for other weights "
            "(dcext.DCLinear.from_float), got an assignment"
        )

    def scale_(self, factor: float) -> None:
        """Multiplies the weights by a number, in place; modules that share the scales see it too."""
        self.row_scale.mul_(factor)

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ matrix.T`` without bias, whatever the module does with its matrix.

        Args:
            x: ``(..., shape[1])``.

        Returns:
            ``(..., shape[0])``, dtype of ``x``.
        """
        return nn.functional.linear(x, self.dequantize().to(x.dtype))

    @property
    def num_weights(self) -> int:
        """``out_features * in_features``, which is also the size of the INT8 weights in bytes."""
        return self.shape[0] * self.shape[1]

    @property
    def stored_nbytes(self) -> int:
        """Bytes of payload (chunk table and checksums included) and scales, as a checkpoint stores them."""
        scales = stored_scale_nbytes(self.row_scale)
        if self.col_scale is not None:
            scales += stored_scale_nbytes(self.col_scale)
        return self.payload.nbytes + scales

    @property
    def bits_per_weight(self) -> float:
        """``8 * stored_nbytes / num_weights``."""
        return 8 * self.stored_nbytes / self.num_weights

    @property
    def ratio(self) -> float:
        """INT8 bytes over stored bytes; higher is better."""
        return self.num_weights / self.stored_nbytes

    def decode_qweight(self) -> Tensor:
        """Decodes the weights: ``(out_features, in_features)`` int8, where the module is."""
        if isinstance(self.backing, IndexedWeight) and not self.is_in_file:
            return self.backing.qweight()
        return decode(self.payload.cpu()).to(self.row_scale.device)

    def dequantize(self) -> Tensor:
        """The weights that the module stands for: ``(out_features, in_features)`` in ``self.dtype``."""
        if self.payload.device.type == "cpu" and self.row_scale.device.type == "cpu":
            scales = (self.row_scale, self.col_scale)
            return _dequantize(self.payload, *scales, self.shape[1], self.dtype)
        weight = self.decode_qweight().float() * self.row_scale[:, None]
        if self.col_scale is not None:
            weight *= self.col_scale
        return weight.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        # Scales and outliers keep their dtypes whatever the model is cast to; only the empty _compute_dtype follows.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps = tensor.numel() > 0 and tensor.is_floating_point()
            return tensor.to(moved.device) if keeps and moved.dtype != tensor.dtype else moved

        payload, before = self.payload, self.row_scale.device
        self._buffers["payload"] = None
        try:
            super()._apply(keep_dtype, recurse)
        finally:
            self._buffers["payload"] = payload
        device = self.row_scale.device
        if device != before:
            self._move_payload(device)
        elif payload.device == device:
            self.payload = fn(payload)
        return self

    def _payload_in_memory(self) -> Tensor:
        """A verified copy of a payload that is in a file; modules that share it get the same."""
        if self.origin is None:
            return self.payload
        return shared_result(self.payload, _CPU, self.origin.load)

    def _move_payload(self, device: torch.device) -> None:
        payload = self._payload_in_memory() if self.is_in_file else self.payload
        self._drop_backing()
        if device.type == "meta":
            self.payload = payload.to(device)
            return
        self.payload = shared_result(payload, _CPU, payload.cpu) if payload.is_cuda else payload
        self._describe(payload_info(self.payload))
        if device.type != "cpu":
            self._move_to(device)

    def _move_to(self, device: torch.device) -> None:
        """Takes the payload, which is on the CPU, to a device."""
        self.backing = make_resident(self.payload, device)
        self.payload = self.backing.payload
        if isinstance(self.backing, IndexedWeight):
            self.codec = self.backing.codec

    def _drop_backing(self) -> None:
        self.backing = None
        self.prefetched_by = None
        self._is_in_file = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are in host memory and know of no file; modules that share a payload still do.
        state = self.__dict__.copy()
        if self._is_in_file:
            own = self._payload_in_memory()
            state["_buffers"] = {**self._buffers, "payload": own}
            state |= {"backing": None, "prefetched_by": None, "_is_in_file": False}
            state["codec"] = payload_info(own)["codec"]
        state["origin"] = None
        return state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + COMPUTE_DTYPE]
        for leaf in OWN_BUFFERS:
            if self.is_hidden and leaf in self._buffers:
                destination.pop(prefix + leaf, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A payload is replaced, not copied into: two encodings of the same shape have different lengths.
        key = prefix + "payload"
        if key in state_dict:
            payload = state_dict[key]
            try:
                payload = payload.cpu()
                info = payload_info(payload)
                verify_payload(payload)
                if info["shape"] != self.shape:
                    raise FormatError(f"expected shape {self.shape}, found {info['shape']}")
                self._describe(info)
                device = self.row_scale.device
                replacement = self._shared_copy(payload)
                self._drop_backing()
                self.origin = None
                self.payload = replacement
                if device.type == "cuda":
                    self._move_to(device)
            except (FormatError, TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
            state_dict = {**state_dict, key: self.payload}
        state_dict = {**state_dict, prefix + COMPUTE_DTYPE: self._compute_dtype}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _shared_copy(self, payload: Tensor) -> Tensor:
        """A payload in memory of its own; modules that shared one and are given equal ones share again."""
        own = self.payload
        if not self.is_in_file and own.device.type == "cpu" and torch.equal(own, payload):
            return own
        copied = shared_result(own, _CPU, lambda: to_weight_memory(payload))
        return copied if torch.equal(copied, payload) else to_weight_memory(payload)

    def extra_repr(self) -> str:
        """Shape, codec, size, and where the weights are."""
        place = "disk" if self.is_in_file else self.payload.device.type
        place = "host" if self.prefetched_by is not None else place
        tier = f"{place}/{self.codec}"
        return f"{self.bits_per_weight:.2f} bits/weight, ratio={self.ratio:.2f}, tier={tier}, dtype={self.dtype}"


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """All compressed modules of a model, by name; modules that share a payload all appear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedModule)}
