"""Float layers turned into compressed ones in place: the module stays the same object, its class changes. And back."""

from __future__ import annotations

import copy
import sys
from functools import cache

import torch
from torch import Tensor, nn

from dcext.codec import CODECS, encode, payload_info
from dcext.nn.compressed import COMPUTE_DTYPE, OWN_BUFFERS, CompressedModule
from dcext.nn.convolution import DCConvolution
from dcext.nn.derived import arguments_of, make_class
from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import CompressedLinear, DCLinear
from dcext.nn.matrix import CONVOLUTIONS, kind_of, matrix_of
from dcext.nn.views import MatrixView
from dcext.quantize import quantize_absmax


def compress_module_(
    module: nn.Module,
    payload: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activations: str = "int8",
    outliers: tuple[Tensor, Tensor] | None = None,
) -> CompressedModule:
    """Replaces the weight of a float layer by an encoded matrix.

    Names, hooks, buffers, the ``training`` flag and whatever else the module has stay; so does the behaviour that a
    subclass of ``nn.Linear``, ``nn.Embedding`` or a convolution adds.

    Args:
        module: of a ``MatrixKind`` (``dcext.nn.matrix``), with a float ``weight``, possibly on the meta device.
        payload: 1-D uint8, of the module's matrix. Not copied.
        row_scale: ``(out_features,)``, or ``(1,)`` for all rows.
        col_scale: ``(in_features,)`` or None.
        bias: of a linear layer, ``(out_features,)`` or None; convolutions keep the parameter that they have.
        activations: ``"int8"`` or ``"none"``; of linear layers.
        outliers: of linear layers, see ``DCLinear``.

    Returns:
        The module.

    Raises:
        ValueError: shapes do not fit, or an embedding renormalizes rows (``max_norm``).
    """
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(f"compress: max_norm: expected None, got {module.max_norm}")
    weight = module._parameters["weight"]
    matrix_kind = kind_of(module)
    assert weight is not None
    assert matrix_kind is not None
    expected, found = tuple(matrix_kind.to_matrix(weight).shape), payload_info(payload)["shape"]
    if found != expected:
        raise ValueError(
            f"compress: payload: expected a matrix of shape {expected}, got one of {found}"
        )
    kind = compressed_class(type(module))  # type: ignore[arg-type]
    del module._parameters["weight"]
    shape, dtype = weight.shape, weight.dtype
    module.__class__ = kind
    assert isinstance(module, CompressedModule)
    module._take_matrix(payload, row_scale, col_scale, dtype)
    if isinstance(module, CompressedLinear):
        module._take_others(bias, activations, outliers)
    if tuple(shape) != module.shape:
        module._weight_shape = shape
    return module


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module in which compressed layers are float again, with the values that they stand for, frozen.

    What else a compressed layer has (hooks, flags, other parameters) a copy of that layer shares with it; modules that
    contain compressed layers are copied deeply.
    """
    if isinstance(module, CompressedModule):
        return _float_layer(module)
    copied = copy.deepcopy(module)
    for name, child in list(copied.named_modules()):
        if isinstance(child, CompressedModule):
            parent, _, leaf = name.rpartition(".")
            copied.get_submodule(parent)._modules[leaf] = _float_layer(child)
    return copied


def decompress_module_(module: CompressedModule, weight: nn.Parameter | None = None) -> None:
    """The inverse of ``compress_module_`` in place, with the values that the module stands for.

    Args:
        module: which becomes a frozen float layer.
        weight: what it gets instead of its own values, where another layer has them already.
    """
    layer = _float_layer(module)
    if weight is not None:
        layer.weight = weight
    module.__class__ = type(layer)  # type: ignore[assignment]
    module.__dict__.clear()
    module.__dict__.update(layer.__dict__)


@torch.no_grad()
def _float_layer(module: CompressedModule) -> nn.Module:
    kind = float_class(type(module))
    layer = kind.__new__(kind)
    layer.__dict__.update(
        {name: value for name, value in vars(module).items() if name not in _OF_COMPRESSED}
    )
    for name in getattr(kind, "__constants__", ()):  # those that a class computes or inherits
        if hasattr(module, name):
            layer.__dict__.setdefault(name, getattr(module, name))
    parameters = {"weight": _values(module).contiguous()}
    bias = module._buffers.get("bias")
    if bias is not None:
        parameters["bias"] = bias.to(module.dtype, copy=True)
    kept = {name: p for name, p in module._parameters.items() if name != COMPUTE_DTYPE}
    frozen = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    layer._parameters = {**({"bias": None} if hasattr(module, "bias") else {}), **kept, **frozen}
    layer._buffers = {n: b for n, b in module._buffers.items() if n not in OWN_BUFFERS}
    return layer


_OF_COMPRESSED = {
    *("shape", "codec", "activations", "origin", "backing", "prefetched_by", "decoded"),
    *("_is_in_file", "_weight_shape", "_rows", "is_hidden"),
}


def _values(module: CompressedModule) -> Tensor:
    weight = module.weight
    return weight.decoded() if isinstance(weight, MatrixView) else weight


def float_class(compressed: type[CompressedModule]) -> type[nn.Module]:
    """The class of float layers that a class of compressed ones stands for: the inverse of ``compressed_class``."""
    if compressed is DCLinear:
        return nn.Linear
    if compressed is DCEmbedding:
        return nn.Embedding
    kind: type[nn.Module] = arguments_of(compressed)[0]
    return kind


@torch.no_grad()
def encode_anew_(module: CompressedModule, layer: nn.Module) -> None:
    """Gives a compressed module the values of a float layer: INT8 by the largest magnitude per row, in the codec it has.

    Column scales and outlier columns go; modules that shared the payload keep it.

    Args:
        module: where it is: in memory or on a device; what was in a file is in memory afterwards.
        layer: of the module's ``MatrixKind`` and shape, such as ``float_copy`` returns.

    Raises:
        ValueError: the layer's weights hold NaN or infinity.
    """
    device = module.row_scale.device
    qweight, row_scale = quantize_absmax(matrix_of(layer).float().cpu(), "row")
    codec = module.codec if module.codec in CODECS else "auto"
    module.origin = None
    module.set_payload(encode(qweight, codec))
    module.row_scale, module.col_scale = row_scale.to(device), None
    bias = layer._parameters.get("bias")
    if isinstance(module, CompressedLinear):
        module.outlier_index = module.outlier_weight = None
        module.bias = None if bias is None else bias.detach().float().to(device)
    elif bias is not None:
        module._parameters["bias"] = bias
    if device.type != "cpu":
        module.make_resident(module.payload, device)


@cache
def compressed_class(float_class: type[nn.Module]) -> type[CompressedModule]:
    """The class of the compressed form of a class of layers.

    ``DCLinear`` and ``DCEmbedding`` for torch's own. Of a subclass, a class derived from both: what it adds to
    ``forward`` runs, and what it calls by ``super().forward`` is the compressed layer's.

    Raises:
        TypeError: its instances hold no matrix of a known meaning.
    """
    for base in float_class.__mro__:
        compressed = _compressed_base(base)
        if compressed is not None:
            break
    else:
        raise TypeError(
            f"compress: expected a subclass of a linear layer, a convolution or an embedding, got {float_class.__name__}"
        )
    if base is float_class:
        return compressed
    bases = (float_class, compressed)
    return make_class(f"DC{float_class.__name__}", bases, {}, compressed_class, float_class)  # type: ignore[return-value]


def _compressed_base(base: type) -> type[CompressedModule] | None:
    """The compressed form of a class that ``dcext.nn.matrix`` knows; None of others."""
    if base is nn.Linear:
        return DCLinear
    if base is nn.Embedding:
        return DCEmbedding
    if base in CONVOLUTIONS:
        bases = (DCConvolution, base)
        return make_class(f"DC{base.__name__}", bases, {}, compressed_class, base)  # type: ignore[return-value]
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if base is transposed:
        members = {"_is_transposed": True, "__repr__": nn.Module.__repr__}
        return make_class("DCConv1D", (CompressedLinear, base), members, compressed_class, base)  # type: ignore[return-value]
    return None
