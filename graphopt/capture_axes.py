"""Which axes of the example inputs stay dynamic, under which names, and what they are tied to.

Every declared axis is traced without a name of torch's own. Axes that share a name are tied by a
check at the start of the trace, so that a model which only narrows a range captures in one go; what
the model really fixes is found afterwards from the shapes of the placeholders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of an example input that the user declared dynamic; ``dim`` is ``None`` for an int.

    Attributes:
        path: pytree path of the input within ``(args, kwargs)``.
        name: axes with one name have one size.
        root: the axis is ``fn(size of the axis named root)``.
        optional: the user left it to the tracer (``Dim.AUTO``) whether it stays dynamic.
    """

    label: str
    path: Path
    dim: int | None
    name: str | None = None
    low: int = 1
    high: int | None = None
    root: str | None = None
    fn: Callable[[Any], Any] | None = None
    optional: bool = False

    def __str__(self) -> str:
        which = self.label if self.dim is None else f"axis {self.dim} of {self.label}"
        return f"{which} (`{self.name}`)" if self.name else which

    def size(self, leaf: Any) -> Any:
        return leaf if self.dim is None else leaf.shape[self.dim]


@dataclass
class Axes:
    """All declared axes, and the example call they were declared for."""

    declared: list[Axis] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.declared)

    def enlarged(self, call: tuple[Any, Any]) -> tuple[Any, Any]:
        """The example call with every dynamic axis of size 1 repeated, so that it stays dynamic."""
        short = {(a.path, a.dim) for a in self.declared if a.dim is not None}

        def grow(path: Path, leaf: Any) -> Any:
            for axis in sorted(d for p, d in short if p == path and isinstance(leaf, Tensor)):
                if leaf.shape[axis] == 1:
                    leaf = torch.cat([leaf, leaf], axis)
            return leaf

        return pytree.tree_map_with_path(grow, call)  # type: ignore[no-any-return]

    def marked(self, call: tuple[Any, Any]) -> tuple[tuple[Any, Any], ShapesCollection | None]:
        """The call with distinct input objects, and what `torch.export` takes as dynamic_shapes."""
        if not self.declared:
            return call, None
        shapes = ShapesCollection()
        dims: dict[Path, list[int | None]] = {}
        for axis in self.declared:
            dims.setdefault(axis.path, []).append(axis.dim)

        def mark(path: Path, leaf: Any) -> Any:
            if path not in dims:
                return leaf
            if not isinstance(leaf, Tensor):
                leaf = torch.export.dynamic_shapes._IntWrapper(leaf)
                shapes[leaf] = Dim.AUTO
                return leaf
            leaf = leaf.detach().requires_grad_(leaf.requires_grad)
            shapes[leaf] = {d: Dim.AUTO for d in dims[path] if d is not None}
            return leaf

        return pytree.tree_map_with_path(mark, call), shapes

    def tie(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the tracer, at the start of a forward, which sizes are equal or derived."""
        leaves = dict(pytree.tree_flatten_with_path((args, kwargs))[0])
        sizes: dict[str, Any] = {}
        named = [a for a in self.declared if a.path in leaves]
        for axis in named:
            if axis.name and axis.root is None:
                size = axis.size(leaves[axis.path])
                torch._check(size == sizes.setdefault(axis.name, size))
        for axis in named:
            if axis.root in sizes and axis.fn is not None:
                torch._check(axis.size(leaves[axis.path]) == axis.fn(sizes[axis.root]))

    def check(self, call: tuple[Any, Any]) -> None:
        """Refuse examples whose sizes contradict the declaration."""
        leaves = dict(pytree.tree_flatten_with_path(call)[0])
        first: dict[str, tuple[Axis, int]] = {}
        for axis in self.declared:
            size = axis.size(leaves[axis.path])
            if size == 0:
                raise _refusal(f"{axis} is dynamic but empty in the example", axis.label)
            if axis.high is not None and not axis.low <= size <= axis.high:
                bounds = f"between {axis.low} and {axis.high}"
                raise _refusal(f"{axis} is declared {bounds} but {size} in the example", axis.label)
            if axis.name and axis.root is None:
                other, known = first.setdefault(axis.name, (axis, size))
                if known != size:
                    raise _refusal(
                        f"`{axis.name}` is {known} in {other.label} but {size} in {axis.label}",
                        axis.label,
                    )


def _refusal(what: str, label: str) -> CaptureError:
    return CaptureError(
        what,
        where=f"dynamic_shapes, {label}",
        fix="give an example that fits dynamic_shapes, or the axes different names",
    )
