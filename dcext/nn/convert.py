"""Float layers turned into compressed ones in place: the module stays the same object, its class changes."""

from __future__ import annotations

import sys
from functools import cache

from torch import Tensor, nn

from dcext.codec import payload_info
from dcext.nn.compressed import COMPUTE_DTYPE, OWN_BUFFERS, CompressedModule
from dcext.nn.convolution import DCConvolution
from dcext.nn.derived import arguments_of, make_class
from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import DCLinear
from dcext.nn.matrix import kind_of


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
    if isinstance(module, DCLinear):
        module._take_others(bias, activations, outliers)
    if tuple(shape) != module.shape:
        module._weight_shape = shape
    return module


def decompress_module_(module: CompressedModule, weight: nn.Parameter | None = None) -> nn.Module:
    """The inverse of ``compress_module_``, up to rounding: the float layer again, with the weights that it stood for.

    Args:
        module: on the CPU or a device, where its weight will be.
        weight: what it gets; None for its own weights, decoded, in the dtype that it computes in.

    Returns:
        The module.
    """
    if weight is None:
        weight = nn.Parameter(module.weight + 0, requires_grad=False)
    bias = module._buffers.get("bias")
    sizes = {"out_features": module.shape[0], "in_features": module.shape[1]}
    is_linear = isinstance(module, DCLinear)
    float_class = _float_class(type(module))
    for name in OWN_BUFFERS:
        module._buffers.pop(name, None)
    del module._parameters[COMPUTE_DTYPE]
    for name in _OWN_ATTRIBUTES:
        module.__dict__.pop(name, None)
    module.__class__ = float_class  # type: ignore[assignment]
    result: nn.Module = module
    if is_linear:
        values = None if bias is None else bias.to(weight.dtype)
        frozen = None if values is None else nn.Parameter(values, requires_grad=False)
        result.register_parameter("bias", frozen)
        for name, size in sizes.items():
            result.__dict__.setdefault(name, size)
    result.weight = weight
    return result


_OWN_ATTRIBUTES = (
    "shape",
    "codec",
    "activations",
    "origin",
    "resting",
    "decoded",
    "travels_with",
    "is_hidden",
    "_is_in_file",
    "_weight_shape",
    "_rows",
)


def _float_class(compressed: type[nn.Module]) -> type[nn.Module]:
    """What ``compressed_class`` made a class of."""
    plain: dict[type, type[nn.Module]] = {DCLinear: nn.Linear, DCEmbedding: nn.Embedding}
    return plain.get(compressed) or arguments_of(compressed)[0]


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
    if base.__module__ == "torch.nn.modules.conv" and issubclass(base, _CONVOLUTIONS):
        bases = (DCConvolution, base)
        return make_class(f"DC{base.__name__}", bases, {}, compressed_class, base)  # type: ignore[return-value]
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if base is transposed:
        members = {"_is_transposed": True, "__repr__": nn.Module.__repr__}
        return make_class("DCConv1D", (DCLinear, base), members, compressed_class, base)  # type: ignore[return-value]
    return None


_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
