"""The same program with fewer positions along an axis: what a large value is verified on.

A loss on a million logits is the same computation on a few hundred rows of them. `shorten` gives
the axis another size in a copy of a program, from the product that makes the large value to the
end of the graph: operands are cut to the first positions, sizes that calls name follow. Nodes keep
their names, so what a pass does to the one can be compared with what it does to the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from graphopt.analysis.alike import alike
from graphopt.analysis.axes import AxisFlow, Leg, Placement, rule_of, trace_axis
from graphopt.analysis.axis_rules import pointwise
from graphopt.errors import IllegalRewriteError
from graphopt.program import Program, val
from graphopt.rewrite.builder import infer, program_fake_mode
from graphopt.rewrite.match import arguments
from graphopt.rewrite.passes import Axis

aten = torch.ops.aten

Shape = tuple[int, ...]

_VIEWS = {
    aten.view.default: "size",
    aten.reshape.default: "shape",
    aten._unsafe_view.default: "size",
    aten.expand.default: "size",
    aten.unflatten.int: "sizes",
}
"""Operators that name the sizes of their result -> under which name."""

_FILLED = frozenset({aten.zeros.default, aten.ones.default, aten.full.default})
_COUNTS = frozenset({aten.arange.default, aten.eye.default, aten.eye.m}) | _FILLED
"""Operators that make positions from nothing."""

_SCATTERED = frozenset({aten.scatter.src, aten.scatter.value, aten.scatter_add.default})


def shorten(program: Program, axis: Axis, count: int) -> None:
    """Give an axis ``count`` positions, in place.

    Raises:
        IllegalRewriteError: a call on the way does not exist for that size, or names a position
            that is gone.
    """
    first, *others = axis
    flow = trace_axis(first.node, first.dim, {o.node: o.dim for o in others})
    if not isinstance(flow.extent, int) or not flow.extent > count:
        raise IllegalRewriteError(f"an axis of {flow.extent} cannot be cut to {count}")
    shortening = _Shortening(program, flow, count)
    seeds = {cut.node: cut for cut in axis}
    for node in list(program.graph.nodes):
        if node in seeds:
            cut = seeds[node]
            operand = node.all_input_nodes[cut.operand]
            shortening.operand(node, operand, Placement((Leg(cut.operand_dim, flow.extent),)))
            shortening.settle(node)
        elif flow.depends(node) and node.op == "call_function":
            shortening.visit(node)
    program.graph.eliminate_dead_code()
    program.lint()
    program.recompile()


class _Shortening:
    """One axis of one program, node by node."""

    def __init__(self, program: Program, flow: AxisFlow, count: int) -> None:
        self.program, self.flow = program, flow
        self.gone = int(flow.extent) - count
        self.count = count
        self.mode = program_fake_mode(program)
        self.before: dict[fx.Node, Shape] = {}
        self.cuts: dict[tuple[fx.Node, Placement], fx.Node] = {}

    def size(self, size: Any) -> int:
        """What is left of a part of the axis: cuts at its ends stay as they are."""
        if isinstance(size, int) and size > self.gone:
            return size - self.gone
        if isinstance(size, int) and size <= self.count:
            return size
        raise IllegalRewriteError(f"{size} positions of an axis cut to {self.count}")

    def shape(self, shape: Sequence[int], place: Placement) -> list[int]:
        """The shape of a tensor that holds the axis at ``place``."""
        made = list(shape)
        for leg in place.legs:
            if len(place.on(leg.dim)) > 1:
                raise IllegalRewriteError("an axis in parts")
            made[leg.dim] = made[leg.dim] // int(leg.size) * self.size(leg.size)
        return made

    def infer(self, node: fx.Node) -> None:
        fakes = fx.node.map_arg((node.args, node.kwargs), val)
        self._note(node)
        node.meta["val"] = infer(self.mode, node.target, *fakes)

    def visit(self, node: fx.Node) -> None:
        """Let a call that depends on the axis stand on shorter operands."""
        if node.target is aten.index.Tensor:
            self._select_rows(node)
        for aligned in self.flow.aligned.get(node, ()):
            self.operand(node, aligned.node, aligned.placement)
        if node.target in _VIEWS:
            self._resize(node, _VIEWS[node.target])
        elif node.target is aten.slice.Tensor:
            self._slice(node)
        elif node.target is aten.select.int:
            self._select(node)
        elif node.target is aten.index.Tensor:
            self._index(node)
        elif node.target is aten.index_select.default:
            self._wrap(node, node.args[2], arguments(node)["dim"])
        if not self._stands_still(node):
            self.settle(node)

    def settle(self, node: fx.Node) -> None:
        """Give a node its new value, which must be shorter along the axis and nowhere else."""
        self.infer(node)
        if node not in self.before:
            return
        shape: Sequence[int] = self.before[node]
        for place in self.flow.places(node):
            shape = self.shape(shape, place)
        if tuple(shape) != _sizes(node):
            raise IllegalRewriteError(f"`{node.name}` became {_sizes(node)}, not {tuple(shape)}")

    # Calls that name sizes or positions.

    def _resize(self, node: fx.Node, name: str) -> None:
        given = arguments(node)
        sizes, offset = list(given[name]), 0
        if name == "sizes":
            offset = given["dim"] % len(val(given["self"]).shape)
        for place in self.flow.places(node):
            new = self.shape(_sizes(node), place)
            for dim in place.dims:
                if 0 <= dim - offset < len(sizes) and sizes[dim - offset] != -1:
                    sizes[dim - offset] = new[dim]
        _set(node, **{name: sizes})

    def _slice(self, node: fx.Node) -> None:
        given = arguments(node)
        main, dim = given["self"], given["dim"] % val(node).dim()
        old, new = self.before.get(main, _sizes(main))[dim], _sizes(main)[dim]
        if old == new:
            return
        first, end, _ = slice(given["start"], given["end"]).indices(old)
        if given["step"] != 1:
            raise IllegalRewriteError(f"`{node.name}` takes every {given['step']}th position")
        left = self.size(end - first)
        if left == end - first and end > new:
            first, end = first - (old - new), end - (old - new)
        if first < 0 or first + left > new:
            raise IllegalRewriteError(f"`{node.name}` reads positions {first} to {end} of {old}")
        _set(node, start=first, end=first + left if first + left < new else sys.maxsize)

    def _select(self, node: fx.Node) -> None:
        given = arguments(node)
        main, index = given["self"], given["index"]
        dim = given["dim"] % val(main).dim()
        old, new = self.before.get(main, _sizes(main))[dim], _sizes(main)[dim]
        if old != new and index >= new:
            _set(node, index=index - (old - new))

    def _index(self, node: fx.Node) -> None:
        """Positions that are all counted up, ``x[arange(n), classes]``."""
        main: Any = node.args[0]
        indices: Any = node.args[1]
        for dim, index in enumerate(indices):
            if isinstance(index, fx.Node) and index.target is aten.arange.default:
                for place in self.flow.places(main):
                    self.operand(node, index, place.moved({dim: 0}))

    def _select_rows(self, node: fx.Node) -> None:
        """``x[mask]`` takes the mask's first positions, and so does what the mask selects besides;
        positions by index are counted round."""
        main: Any = node.args[0]
        dims = {d for place in self.flow.places(main) for d in place.dims}
        for at, index in _indexed(node):
            if not dims.isdisjoint(range(at, at + _dims_of(index))):
                if val(index).dtype is torch.bool:
                    self._mask(node, index, at)
                elif index.target is not aten.arange.default:
                    self._wrap(node, index, at)

    def _mask(self, node: fx.Node, mask: fx.Node, at: int) -> None:
        """Cut a mask over the dims from ``at`` on, here and where it selects from other tensors."""
        main: Any = node.args[0]
        place = self.flow.places(main)[0]
        inside = {d: d - at for d in place.dims}
        if not all(0 <= d < val(mask).dim() for d in inside.values()):
            raise IllegalRewriteError(f"`{mask.name}` selects along some dims of an axis")
        cut = place.moved(inside)
        calls = self.program.graph.find_nodes(op="call_function", target=aten.index.Tensor)
        places = [(user, first, index) for user in sorted(calls) for first, index in _indexed(user)]
        for user, first, index in [p for p in places if alike(p[2], mask)]:
            source: Any = user.args[0]
            if user is node or not self.flow.depends(user):
                self.operand(user, index, cut)
                self.operand(user, source, cut.moved({d: d + first for d in cut.dims}))

    def _wrap(self, node: fx.Node, index: Any, dim: int) -> None:
        """Positions beyond the end start again from the first."""
        main: Any = node.args[0]
        if main in self.before:
            count = _sizes(main)[dim]
            wrapped = self._emit(node, aten.remainder.Scalar, index, count)
            node.replace_input_with(index, wrapped)

    def _stands_still(self, node: fx.Node) -> bool:
        """Whether values decide how much is left of the axis, or nothing is."""
        shorter = any(a in self.before for a in node.all_input_nodes)
        fake = val(node)
        decided = isinstance(fake, torch.Tensor) and any(map(has_free_unbacked_symbols, fake.shape))
        return decided or not (shorter or self.flow.places(node))

    # Operands that are indexed by the axis and do not come from the product.

    def operand(self, node: fx.Node, operand: fx.Node, place: Placement) -> None:
        """Let ``node`` read only the first positions of an operand."""
        if not place.legs or operand in self.before:
            return  # pinned to one position, or shortened with all that read it
        if (operand, place) not in self.cuts:
            self.cuts[operand, place] = self._cut(operand, place)
        new = self.cuts[operand, place]
        if new is not operand:
            node.replace_input_with(operand, new)

    def _cut(self, operand: fx.Node, place: Placement) -> fx.Node:
        shape = self.shape(_sizes(operand), place)
        if operand.target in _COUNTS:
            return self._count(self._own(operand, place), shape)
        if _is_through(operand, place):
            return self._through(self._own(operand, place), place, shape)
        return self._sliced(operand, place)

    def _own(self, operand: fx.Node, place: Placement) -> fx.Node:
        """An operand, or a copy of it where others read it in other ways."""
        if self._is_ours(operand, place):
            return operand
        with self.program.graph.inserting_after(operand):
            return self.program.graph.node_copy(operand)

    def _count(self, operand: fx.Node, shape: Sequence[int]) -> fx.Node:
        """An operator that makes positions, making those of a shape."""
        if operand.target is aten.arange.default:
            _set(operand, end=shape[0])
        elif operand.target in _FILLED:
            _set(operand, size=list(shape))
        else:
            operand.target = aten.eye.default if shape[0] == shape[1] else aten.eye.m
            _set(operand, n=shape[0], m=shape[1])
        self.infer(operand)
        return operand

    def _is_ours(self, operand: fx.Node, place: Placement) -> bool:
        """Whether everything that reads an operand reads it along the axis, in the same place."""

        def along(user: fx.Node) -> bool:
            aligned = self.flow.aligned.get(user, ())
            return user in self.before or any(
                a.node is operand and a.placement == place for a in aligned
            )

        readers = [user for user in operand.users if val(user) is not None]  # no assertions
        return len(readers) == 1 or all(map(along, readers))

    def _through(self, operand: fx.Node, place: Placement, shape: Sequence[int]) -> fx.Node:
        """Shorten what a call reads that makes each position of the same one."""
        rank = len(shape)
        if operand.target is aten.one_hot.default:
            rank -= 1  # the classes
        elif operand.target is aten.sum.dim_IntList:
            rank = val(operand.args[0]).dim()
        elif operand.target is aten.expand.default:
            sizes = arguments(operand)["size"]
            _set(operand, size=[n if n == -1 else s for n, s in zip(sizes, shape, strict=True)])
        self._note(operand)
        for each in _tensors(operand):
            shift = rank - val(each).dim()
            rows = [d for d in place.dims if shift <= d < rank and _sizes(each)[d - shift] != 1]
            self.operand(operand, each, place.moved({d: d - shift for d in rows}))
        self.infer(operand)
        return operand

    def _sliced(self, operand: fx.Node, place: Placement) -> fx.Node:
        """The first positions of a tensor, made in front of all that may read them."""
        made, user = operand, operand.next
        while user.op in ("placeholder", "get_attr"):
            user = user.next
        for leg in place.legs:
            outer, size, inner = (int(n) for n in (leg.outer, leg.size, leg.inner))
            if inner == outer == 1:
                made = self._emit(user, aten.slice.Tensor, made, leg.dim, 0, self.size(size))
                continue
            shape = list(_sizes(made))
            split = [*shape[: leg.dim], outer, size, inner, *shape[leg.dim + 1 :]]
            made = self._emit(user, aten.reshape.default, made, split)
            made = self._emit(user, aten.slice.Tensor, made, leg.dim + 1, 0, self.size(size))
            shape[leg.dim] = outer * self.size(size) * inner
            made = self._emit(user, aten.reshape.default, made, shape)
        return made

    def _emit(self, user: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.program.graph.inserting_before(user):
            made = self.program.graph.create_node("call_function", target, args, {}, "shorter")
        self.infer(made)
        self.before.pop(made, None)
        return made

    def _note(self, node: fx.Node) -> None:
        if isinstance(val(node), torch.Tensor):
            self.before.setdefault(node, _sizes(node))


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if isinstance(val(a), torch.Tensor)]


def _is_through(operand: fx.Node, place: Placement) -> bool:
    """Whether a call makes each position along an axis of the same position of what it reads."""
    if operand.op != "call_function" or not _tensors(operand):
        return False
    if operand.target in (aten.one_hot.default, aten.expand.default):
        return True
    if operand.target is aten.sum.dim_IntList:
        given = arguments(operand)
        last = val(given["self"]).dim() - 1
        return last not in place.dims and [d % (last + 1) for d in given["dim"] or ()] == [last]
    if operand.target in _SCATTERED:
        dim = arguments(operand)["dim"] % val(operand).dim()
        pairs = ((a, d) for a in _tensors(operand) for d in place.dims)
        same = all(_sizes(a)[d] == _sizes(operand)[d] for a, d in pairs)
        return dim not in place.dims and same
    return rule_of(operand.target) in (pointwise.elementwise, pointwise.same)


def _indexed(node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """The indices of a call, each with the first dim that it stands for."""
    indices: Any = node.args[1]
    at = 0
    for index in indices:
        if index is not None:
            yield at, index
        at += 1 if index is None else _dims_of(index)


def _dims_of(index: fx.Node) -> int:
    """How many dims an index stands for."""
    return int(val(index).dim()) if val(index).dtype in (torch.bool, torch.uint8) else 1


def _sizes(node: fx.Node) -> Shape:
    return tuple(val(node).shape)


def _set(node: fx.Node, **changes: Any) -> None:
    """Change arguments of a call by name."""
    given: Mapping[str, Any] = {**arguments(node), **changes}
    schema = node.target._schema  # type: ignore[union-attr]
    node.args = tuple(given[a.name] for a in schema.arguments if not a.kwarg_only)
    node.kwargs = {a.name: given[a.name] for a in schema.arguments if a.kwarg_only}
