"""The operators of ``torch.ops.dcext``: registration of their fake (shape-only) implementations and of ``vmap``.

==============================  ==================================================================================
operator                        computes
==============================  ==================================================================================
``linear``                      ``(x * col_scale) @ (qweight * row_scale[:, None]).T + bias`` from the payload
``linear_input_grad``           ``((grad * row_scale) @ qweight) * col_scale``: the gradient of ``linear`` for ``x``
``embedding``                   rows of ``qweight * row_scale[:, None] * col_scale``
``linear_streamed``             ``linear`` of a layer whose payload a ``HostStream`` reads from its file meanwhile
``linear_streamed_input_grad``  ``linear_input_grad`` of a layer whose payload a ``HostStream`` reads
``embedding_streamed``          ``embedding`` of a layer that a ``HostStream`` reads: only the panels of the rows
``dequantize_weight``           ``qweight * row_scale[:, None] * col_scale`` from the payload
``encode``                      the payload of a ``qweight``
``decode_out``                  a rectangle of ``qweight``, written into ``out``
``decode_indexed_``             whole matrices by their seek indices, all in one launch; also on CUDA
``fetch_``, ``fetched_``        begin and end of the use of a unit that is copied to its slot; also on CUDA
``quantize_activations``        int8 tokens and their scales, as ``linear`` quantizes them; also on CUDA
``dequantize``                  ``acc * row_scale * act_scale[:, None] + bias``, the end of ``linear``; also on CUDA
``int8_linear``                 ``linear`` of plain int8 weights, on CUDA; of ``dcext.kernels.int8_gemm``
``round_columns_``              columns rounded from last to first with error feedback (``quantize.rate``)
==============================  ==================================================================================

Shapes: ``x`` (..., in_features) float32, bfloat16 or float16; ``payload`` 1-D uint8; ``row_scale`` (out_features,),
``col_scale`` (in_features,) and ``bias`` (out_features,) float32; ``indices`` any shape, int64 or int32. All on the
CPU. ``activations`` is ``"int8"`` (per-token dynamic quantization, exact integer sums) or ``"none"`` (float32 sums in a
fixed order); either way the result does not depend on threads or instruction set. Wrong arguments raise ``ValueError``
or ``TypeError``; ``linear`` and ``embedding`` trust the checksums that were verified when the payload was loaded.

Width: with ``"int8"`` a layer has at most 2^24 input features (16,777,216), beyond which ``linear`` raises ``ValueError``;
sums are exact for all of them, int32 up to 2^17 features and int64 made of such sums above. ``int8_linear`` takes up to
2^17, packed weights on a GPU up to 65,504, and both refuse more. ``dequantize`` takes sums that fit in int32.

Gradients: ``linear`` and ``linear_streamed`` have them for ``x`` and ``bias``. ``linear_input_grad`` takes ``grad``
(..., out_features) in any supported dtype and gives (..., in_features) in the same, as float32 sums of blocks of a few
panels, which are decoded and scaled in parallel; the float matrix is never whole. ``in_features`` is the payload's. With
``activations="none"`` the gradient is that of the float layer that the weights stand for; with ``"int8"`` it is the same,
which is the straight-through estimator: the rounding of activations counts as the identity. Second derivatives are
right: the gradient is linear in ``grad``, and its own is ``linear`` with ``"none"``. Where ``row_scale`` or ``col_scale``
requires grad, backward raises ``NotImplementedError``, as that of every other operator that takes floats does.
The order of the float32 sums is that of ``torch.addmm``. ``linear_streamed`` reads its layer again for the gradient.

Transforms: ``torch.vmap`` takes ``x``, ``grad`` and ``indices`` as one more leading dimension; ``torch.func.grad``, ``vjp``
and ``jvp`` and forward mode raise ``RuntimeError``. Under ``torch.autocast``, ``x`` of ``linear``, ``linear_streamed`` and
``int8_linear`` takes autocast's dtype, as that of ``nn.Linear`` does.

``dequantize_weight`` gives (out_features, in_features) in ``dtype`` (float32, bfloat16 or float16) and verifies each chunk
first, so that a mapped payload may be given: damage raises ``FormatError``. It is pure, and its shape is known without
reading the payload: where a compiler finds that only ``shape`` or ``dtype`` are asked for, nothing is decoded.

``linear_streamed`` and ``embedding_streamed`` take the handle of a ``dcext._C.HostStream`` and the number of a layer in it
instead of a payload, and verify every chunk as loading does: its checksum each time, its format until it was found in
order. A file that was altered or is malformed raises ``FormatError``, one that cannot be read ``RuntimeError``; the next
call tries again. In a child after ``fork()``, streams of the parent raise ``RuntimeError``.

``decode_indexed_`` takes equally many payloads, seek indices (``dcext.codec.seek_index``; (blocks, 448) uint8) and outputs
(out_features, in_features) int8, all on one device, and ``failures`` (1,) int32, into which it or-s bits where data are
damaged (``csrc/codec/seek_decode.h``): it neither waits for the device nor raises. Nothing outside of the outputs is
written, whatever the bytes. ``int8_linear``, products with plain int8 weights on a GPU, is registered by
``dcext.kernels.int8_gemm``, which imports triton.

``fetch_`` and ``fetched_`` take the handle of a ``dcext.weights.device_stream.DeviceStream``, the number of a unit, and the
slot where it lies (uint8, at least the unit's bytes), which both are said to mutate, so that compilers keep them in
order around what reads it. Any other tensor raises ``ValueError``: a copy of a slot never receives the bytes
(of ``torch.compile``'s backends, ``inductor`` makes none, ``aot_eager`` does). A closed stream raises ``RuntimeError``.
``fetched_`` may be given a tensor ``after``, which it does not read: what was computed from all that reads the slot, such
as a layer's output. Compilers that move reads behind ``fetched_`` have to copy the slot, and then fail. Handle 0 is a
stream that brings nothing: what lies in the slot stays.

``round_columns_`` takes its matrices transposed, so that rows of the layer are contiguous: ``weight`` (cols, rows)
float32; ``target``, the same corrected by the columns behind the block, destroyed; ``feedback`` (cols, cols), whose
``[k, i]`` says how the error of column k moves the target of column i < k; ``step`` (cols,), positive; ``pull`` (128,),
by how much a magnitude may lie above the middle between two levels, in steps, and still go to the lower one. It fills
``q`` (cols, rows) int8 in [-127, 127] and ``error = weight - q * step``. ``row_feedback`` (blocks, size, size), size a
multiple of 8 up to 256, makes rows correct each other within blocks of ``size``: ``[n, m]``, nonzero for m < n only,
says how ``target - q * step`` of row n moves the target of row m; rows go from the last to the first. ``nearest`` (panels,
512) int8 rounds to tables instead of by ``pull``: a target of v steps in row n becomes ``nearest[n // panel_rows, k]``
with ``k = floor(2 v) + 256`` held in 0 to 511, so thresholds are multiples of 1/2 and belong to what is above them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcext import _C  # noqa: F401  (registers the operators)


@torch.library.register_fake("dcext::linear")
def _(
    x: Tensor,
    payload: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


@torch.library.register_fake("dcext::embedding")
def _(
    indices: Tensor,
    payload: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("dcext::linear_streamed")
def _(
    x: Tensor,
    stream: int,
    unit: int,
    row_scale: Tensor,
    col_scale: Tensor | None,
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


@torch.library.register_fake("dcext::embedding_streamed")
def _(
    indices: Tensor,
    stream: int,
    unit: int,
    row_scale: Tensor,
    col_scale: Tensor | None,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("dcext::linear_input_grad")
def _(
    grad: Tensor, payload: Tensor, row_scale: Tensor, col_scale: Tensor | None, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("dcext::linear_streamed_input_grad")
def _(
    grad: Tensor,
    stream: int,
    unit: int,
    row_scale: Tensor,
    col_scale: Tensor | None,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("dcext::dequantize_weight")
def _(
    payload: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return row_scale.new_empty((row_scale.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("dcext::encode")
def _(qweight: Tensor, codec: str, level: int, slab_cols: int) -> Tensor:
    nbytes = torch.library.get_ctx().new_dynamic_size()
    return qweight.new_empty((nbytes,), dtype=torch.uint8)


@torch.library.register_fake("dcext::decode_out")
def _(
    payload: Tensor,
    row_begin: int,
    row_end: int,
    col_begin: int,
    col_end: int,
    num_threads: int,
    verify: bool,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("dcext::decode_indexed_")
def _(payloads: list[Tensor], indices: list[Tensor], outs: list[Tensor], failures: Tensor) -> None:
    return None


@torch.library.register_fake("dcext::fetch_")
def _(stream: int, unit: int, slot: Tensor) -> None:
    return None


@torch.library.register_fake("dcext::fetched_")
def _(stream: int, unit: int, slot: Tensor, after: Tensor | None = None) -> None:
    return None


@torch.library.register_fake("dcext::quantize_activations")
def _(x: Tensor, col_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("dcext::dequantize")
def _(
    acc: Tensor, row_scale: Tensor, act_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return acc.new_empty(acc.shape, dtype=dtype)


@torch.library.register_fake("dcext::round_columns_")
def _(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    step: Tensor,
    pull: Tensor,
    q: Tensor,
    error: Tensor,
    row_feedback: Tensor | None = None,
    nearest: Tensor | None = None,
    panel_rows: int = 0,
) -> None:
    return None


def _register_vmap(name: str) -> None:
    """Lets ``vmap`` map the first argument of an operator that takes any number of leading dimensions."""
    op = getattr(torch.ops.dcext, name).default

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(
                f"dcext::{name}: vmap: expected the first argument alone to be mapped, got dimensions {in_dims}"
            )
        return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0

    torch.library.register_vmap(op, batched)


for _name in (
    "linear",
    "linear_input_grad",
    "linear_streamed",
    "linear_streamed_input_grad",
    "embedding",
    "embedding_streamed",
):
    _register_vmap(_name)
