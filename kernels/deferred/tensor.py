"""A tensor whose numbers are computed when they are read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.kernels.deferred.origin import Cast, Origin, View, Views, seen_through

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten._unsafe_view.default,
        aten.alias.default,
        aten.detach.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators that show what is there in another way."""


class DeferredTensor(Tensor):
    """Shape, dtype, device, layout and history are there; numbers come when they are read.

    Views of it and casts are deferred too, until somebody reads the numbers; ``clone`` reads them.
    Made by ``graphopt::deferred``.
    """

    _origin: Origin
    _views: Views
    _part: Tensor | None

    @staticmethod
    def __new__(cls, origin: Origin, views: Views, like: Tensor, device: Any) -> DeferredTensor:
        made: Any = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._origin, made._views, made._part = origin, views, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    @torch._disable_dynamo  # type: ignore[misc, untyped-decorator]
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor) and first._origin.whole is None:
            if func in VIEWS:
                return first._viewed(View(func, args[1:], kwargs))
            if func is aten._to_copy.default and kwargs.keys() == {"dtype"}:
                return first._cast(View(func, (), kwargs))
        if func._schema.is_mutable:
            return _write(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(DeferredTensor, DeferredTensor._numbers, (args, kwargs))
        return func(*args, **kwargs)

    def computed(self) -> Tensor:
        """An ordinary tensor of the same numbers, with the same history."""
        known = self._origin.whole is not None or self.numel() == self._origin.numel
        return self._shown() if known else self.clone()

    def _shown(self) -> Tensor:
        """The same in the memory of the whole, which lasts."""
        self._origin.fill()
        return self.view_as(self)

    def _numbers(self) -> Tensor:
        """Without a history."""
        if self._origin.whole is not None or self.numel() == self._origin.numel:
            return seen_through(self._views, self._origin.fill())
        if self._part is None:
            self._part = self._origin.fresh(self._views)
        return self._part

    def _viewed(self, view: View) -> DeferredTensor:
        return DeferredTensor(self._origin, (*self._views, view), view(_like(self)), self.device)

    def _cast(self, cast: View) -> DeferredTensor:
        origin = Cast(self._origin, self._views, cast, self.numel())
        return DeferredTensor(origin, (), cast(_like(self)), self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self._origin.whole is not None:
            return repr(self.computed())
        return f"DeferredTensor(size={tuple(self.shape)}, dtype={self.dtype}, not computed yet)"

    def numpy(self, *, force: bool = False) -> Any:
        return self.computed().numpy(force=force)

    def tolist(self) -> Any:
        return self.computed().tolist()

    def data_ptr(self) -> int:
        return self._shown().data_ptr()

    def untyped_storage(self) -> Any:
        return self._shown().untyped_storage()

    def __dlpack__(self, **options: Any) -> Any:
        return self._shown().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.computed(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )


def _write(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that writes, on real numbers; what it returns keeps its identity."""
    owners: dict[int, DeferredTensor] = {}

    def real(tensor: DeferredTensor) -> Tensor:
        tensor._origin.fill()
        plain = tensor._numbers()
        owners[id(plain)] = tensor
        return plain

    args, kwargs = pytree.tree_map_only(DeferredTensor, real, (args, kwargs))
    results = func(*args, **kwargs)
    return pytree.tree_map_only(Tensor, lambda t: owners.get(id(t), t), results)
