"""Compressed weights as tensors: shape, dtype and device cost nothing, values are decoded when an operator needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

IS_ITEM = "dcext_is_item"  # of layers that hold what was one parameter (dcext.nn.split)
# Each of these is called by __torch_function__ and given the view first.
_TRANSPOSITIONS = {
    Tensor.t,
    torch.t,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_PRODUCTS = {Tensor.matmul, torch.matmul, Tensor.__matmul__, Tensor.mm, torch.mm}
_SCALINGS = (torch.ops.aten.mul_.Tensor, torch.ops.aten.div_.Tensor)
_READ_ONLY = (
    "a compressed weight, which is read-only: PEFT's merge_and_unload encodes it anew, and dcext.nn.convert.float_copy "
    "gives a float layer"
)
_REFUSED = {
    Tensor.requires_grad_: "requires_grad_",
    Tensor.requires_grad.__set__: "requires_grad",  # type: ignore[attr-defined]
    Tensor.data.__set__: "data",  # type: ignore[attr-defined]
}


class WeightView(Tensor):
    """A tensor that stands for the weights of frozen modules; every use of its values decodes them anew.

    Read-only, but for being multiplied or divided by a number in place: all other writing to it, or asking it for
    gradients, raises ``RuntimeError``. Results of operators are ordinary tensors, but for ``detach`` and transposition,
    which give another view.
    """

    _is_hf_initialized = True  # what transformers asks before it draws initial values

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        wants_gradient = not (
            func is Tensor.requires_grad_ and False in (*args[1:], *kwargs.values())
        )
        if func in _REFUSED and wants_gradient and args[-1] is not False:
            raise RuntimeError(
                f"{_REFUSED[func]}: expected a weight that can be written to and trained, got {_READ_ONLY}"
            )
        special = cls._special(func, args, kwargs)
        if special is not None:
            return special
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def _special(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a function that needs no decoded values of the whole; None for all others."""
        return None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].another()
        if func in _SCALINGS and _is_scalable(*args[:2]):
            factor = args[1] if func is torch.ops.aten.mul_.Tensor else 1 / args[1]
            args[0].module.scale_(factor)
            return args[0]
        named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
        given = {**dict(named), **kwargs}
        for argument in func._schema.arguments:
            if argument.is_write and isinstance(given.get(argument.name), WeightView):
                raise RuntimeError(
                    f"{func}: expected a tensor that can be written to, got {_READ_ONLY}"
                )
        return func(*tree_map(_values, args), **tree_map(_values, kwargs))

    def decoded(self) -> Tensor:
        """What it stands for: a new tensor of its shape, dtype and device."""
        raise NotImplementedError

    def another(self) -> WeightView:
        """A view of the same weights."""
        raise NotImplementedError

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}; compressed, decoded where it is used)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.decoded()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decoded().__reduce_ex__(protocol)


def _is_scalable(view: Any, factor: Any) -> bool:
    is_number = isinstance(factor, (int, float))
    return is_number and isinstance(view, MatrixView) and hasattr(view.module, "scale_")


def _values(value: Any) -> Any:
    return value.decoded() if isinstance(value, WeightView) else value


class MatrixView(WeightView):
    """The weight of one module, perhaps transposed or in another shape.

    ``functional.linear(x, view)`` and ``x @ view.T`` are products of the module itself, from its payload.
    """

    module: nn.Module
    is_transposed: bool

    @staticmethod
    def of(module: nn.Module, shape: torch.Size | None = None, *, transposed: bool) -> MatrixView:
        """Views a module.

        Args:
            module: a ``CompressedModule``, or a float ``nn.Linear`` without bias.
            shape: of the view; None for that of the matrix, ``(out_features, in_features)``.
            transposed: whether it is the matrix transposed, ``(in_features, out_features)``.
        """
        rows, cols = _matrix_shape(module)
        if shape is None:
            shape = torch.Size((cols, rows) if transposed else (rows, cols))
        dtype, device = _dtype_and_device(module)
        view = Tensor._make_wrapper_subclass(MatrixView, shape, dtype=dtype, device=device)
        view.module, view.is_transposed = module, transposed
        return view

    @classmethod
    def _special(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        first: Any = args[0] if args else None
        if func is Tensor.data_ptr and isinstance(first, MatrixView):
            return _address(first.module)  # by which tied weights are known
        if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], MatrixView):
            view = args[1]
            if view.is_matrix and view.is_transposed and not isinstance(first, WeightView):
                return _multiply(view.module, first)
        if func in (Tensor.transpose, torch.transpose) and len(args) == 3:
            is_swap = {args[1] % 2, args[2] % 2} == {0, 1}
            return first.turned() if isinstance(first, MatrixView) and is_swap else None
        if func in _TRANSPOSITIONS and isinstance(first, MatrixView) and first.dim() == 2:
            return first.turned()
        return None

    @property
    def is_matrix(self) -> bool:
        """Whether it has the shape of the module's matrix, or of that transposed."""
        rows, cols = _matrix_shape(self.module)
        return tuple(self.shape) == ((cols, rows) if self.is_transposed else (rows, cols))

    def decoded(self) -> Tensor:
        matrix = _matrix(self.module)
        return (matrix.t() if self.is_transposed else matrix).reshape(self.shape)

    def another(self) -> MatrixView:
        return MatrixView.of(self.module, self.shape, transposed=self.is_transposed)

    def turned(self) -> MatrixView | None:
        """The view transposed; None where it has not the shape of a matrix."""
        if not self.is_matrix:
            return None
        return MatrixView.of(self.module, transposed=not self.is_transposed)


class StackView(WeightView):
    """The weights of several modules of one shape, such as the experts of a layer: ``(len(modules), rows, cols)``.

    An item is a ``MatrixView``: only the modules whose items are used are decoded. ``torch.bmm(x, view)`` asks the
    modules one by one, and leaves out those whose whole input is zero.
    """

    modules: Sequence[nn.Module]
    is_transposed: bool

    @staticmethod
    def of(
        modules: Sequence[nn.Module], shape: torch.Size | None = None, *, transposed: bool
    ) -> StackView:
        """Views modules.

        Args:
            modules: each as for ``MatrixView.of``, of the same shape.
            shape: of the view; None for ``(len(modules), *shape of one)``, others hold the same elements.
            transposed: whether an item is its module's matrix transposed.
        """
        rows, cols = _matrix_shape(modules[0])
        if shape is None:
            shape = torch.Size((len(modules), *((cols, rows) if transposed else (rows, cols))))
        dtype, device = _dtype_and_device(modules[0])
        view = Tensor._make_wrapper_subclass(StackView, shape, dtype=dtype, device=device)
        view.modules, view.is_transposed = modules, transposed
        return view

    @classmethod
    def _special(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        first: Any = args[0] if args else None
        if func in (Tensor.bmm, torch.bmm) and len(args) == 2 and isinstance(args[1], StackView):
            return args[1]._bmm(first) if args[1].is_stack else None
        if not isinstance(first, StackView):
            return None
        if func is Tensor.__getitem__ and first.is_stack:
            return first._item(args[1])
        if func in (Tensor.view, Tensor.reshape) and not kwargs:
            shape = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
            stacked = StackView.of(first.modules, transposed=first.is_transposed)
            with_count = (len(first.modules), *shape[1:]) if shape and shape[0] == -1 else shape
            return stacked if tuple(with_count) == tuple(stacked.shape) else None
        return None

    @property
    def is_stack(self) -> bool:
        """Whether its first dimension counts the modules."""
        return self.dim() == 3 and self.shape[0] == len(self.modules)

    def _item(self, index: Any) -> MatrixView | None:
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
            index = int(index)
        if isinstance(index, bool) or not isinstance(index, int):
            return None
        return MatrixView.of(self.modules[index], transposed=self.is_transposed)

    def _bmm(self, x: Tensor) -> Tensor:
        used = x.ne(0).any(-1)
        parts = []
        for item, rows, is_used in zip(self.modules, x, used, strict=True):
            view = MatrixView.of(item, transposed=self.is_transposed)
            part = x.new_zeros(rows.shape[0], view.shape[1])
            if bool(is_used.any()):
                part = part.index_put((is_used,), rows[is_used] @ view)
            parts.append(part)
        return torch.stack(parts)

    def decoded(self) -> Tensor:
        matrices = [_matrix(module) for module in self.modules]
        return torch.stack([m.t() if self.is_transposed else m for m in matrices]).reshape(
            self.shape
        )

    def another(self) -> StackView:
        return StackView.of(self.modules, self.shape, transposed=self.is_transposed)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """``functional.linear`` of a view; None where it is not a module's own product."""
    if not isinstance(weight, MatrixView) or weight.is_transposed or not weight.is_matrix:
        return None
    y = _multiply(weight.module, x)
    return y if bias is None else y + bias


def _embedding(indices: Any, weight: Any, *others: Any, **named: Any) -> Tensor | None:
    """``functional.embedding`` of a view of an embedding; None with options that are not just a look-up."""
    lookup = getattr(weight.module, "lookup", None) if isinstance(weight, MatrixView) else None
    named.pop("padding_idx", None)
    plain = not any(others[1:]) and not any(named.values())
    return lookup(indices) if lookup is not None and plain and weight.is_matrix else None


def _multiply(module: nn.Module, x: Tensor) -> Tensor:
    """``x @ matrix.T`` without the module's bias."""
    multiply = getattr(module, "multiply", None)
    if multiply is None or getattr(module, IS_ITEM, False):
        return module(x)  # an item, perhaps with an adapter around it; so that hooks see it
    return cast(Tensor, multiply(x))


def _address(module: nn.Module) -> int:
    stored = module._buffers.get("payload")
    return cast(Tensor, module.weight if stored is None else stored).data_ptr()


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    shape = getattr(module, "shape", None)
    if shape is None:
        weight = cast(Tensor, module.weight)
        return weight.shape[0], weight.shape[1]
    return shape


def _dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    scale = module._buffers.get("row_scale")
    if scale is None:
        weight = cast(Tensor, module.weight)
        return weight.dtype, weight.device
    return cast(torch.dtype, module.dtype), scale.device


def _matrix(module: nn.Module) -> Tensor:
    dequantize = getattr(module, "dequantize", None)
    if dequantize is not None:
        return cast(Tensor, dequantize())
    if hasattr(module, "base_layer"):
        raise RuntimeError(
            f"weight: expected its values to be used in products by the whole matrix, for {type(module).__name__} adds an "
            "adapter to it, got another use"
        )
    return cast(Tensor, module.weight).detach()
