"""The part of a program that stands on large products, spelled row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.analysis.axes import Placement, trace_axis
from graphopt.analysis.axis_rules.sizes import Size, product
from graphopt.analysis.flow import dependents
from graphopt.errors import IllegalRewriteError
from graphopt.passes.loss_head import bring
from graphopt.passes.loss_head.body import SAMPLE, BodyGraph
from graphopt.passes.loss_head.handlers import handler_of
from graphopt.passes.loss_head.products import LargeProduct
from graphopt.passes.loss_head.registry import Columns
from graphopt.passes.loss_head.rows import Flat, RowInput, Rows, RowSet, shape_of
from graphopt.passes.loss_head.totals import Build, Total, combined
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Builder, Refusal, arguments

aten = torch.ops.aten


class Translation:
    """Nodes that depend on products which share rows and classes, translated as far as that goes.

    Attributes:
        values: program node -> body node ``(n, width)``, for every node inside.
        biased: product of the body -> its sum with a bias, where there is one.
        totals: program node -> sum over all rows.
        columns: program node -> the matrix whose columns it sums up over all rows.
        outside: nodes that depend on the products and are not inside, with the reason.
        remade: matrices from elsewhere that the body computes itself.
        row_inputs, whole_inputs: body parameter -> what the program passes.
    """

    def __init__(self, program: Program, products: Sequence[LargeProduct]) -> None:
        self.products = products
        first, *others = products
        shape = shape_of(first.node)
        self.rows = Rows(tuple(shape[d] for d in first.row_dims))
        self.flow = trace_axis(first.node, first.row_dims, {o.node: o.row_dims for o in others})
        beside = {o.node: o.class_dim for o in others}
        self.classes = trace_axis(first.node, first.class_dim, beside)
        self.body = BodyGraph(program)
        self.logits: list[fx.Node] = []
        self.biased: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, fx.Node] = {}
        self.totals: dict[fx.Node, Total] = {}
        self.columns: dict[fx.Node, fx.Node] = {}
        self.outside: dict[fx.Node, Refusal] = {}
        self.remade: dict[fx.Node, None] = {}
        self.row_inputs: dict[fx.Node, RowInput] = {}
        self.whole_inputs: dict[fx.Node, fx.Node | Build] = {}
        self.flat: Flat | None = None
        self.groups = first.groups
        self._group: fx.Node | None = None
        self.dependents = dependents(p.node for p in products)
        self.chosen = self._choose()
        self._translate()

    @property
    def inside(self) -> list[fx.Node]:
        """Every node that is translated."""
        return [*self.values, *self.totals, *self.columns]

    @property
    def given(self) -> list[fx.Node]:
        """Values of the program that the body and its products are computed from."""
        factors = [n for p in self.products for n in (p.hidden.node, p.weight.node, p.bias)]
        rows = [given.node for given in self.row_inputs.values()]
        return [n for n in (*factors, *rows, *self.whole_inputs.values()) if isinstance(n, fx.Node)]

    # The axes.

    def place(self, node: fx.Node) -> Placement | None:
        """Where the rows live, if they do in one way."""
        places = self.flow.places(node)
        return places[0] if len(places) == 1 else None

    def place_of(self, value: Any) -> Placement | None:
        return self.place(value) if isinstance(value, fx.Node) else None

    def row_dims(self, node: fx.Node) -> tuple[int, ...]:
        place = self.place(node)
        return () if place is None else place.dims

    def width_dim(self, node: fx.Node) -> int | None:
        """The dim of a tensor inside that is neither rows nor of one position."""
        rows, shape = self.row_dims(node), shape_of(node)
        classes = [p.dims[0] for p in self.classes.places(node) if p.dims]
        wide = [d for d in range(len(shape)) if d not in rows and shape[d] != 1]
        return next(iter(classes or wide), None)

    def width(self, node: fx.Node) -> Size:
        """Numbers that a value inside has per row."""
        rows = self.row_dims(node)
        return product(size for d, size in enumerate(shape_of(node)) if d not in rows)

    def is_matrix(self, node: fx.Node) -> bool:
        """Whether a value has rows and classes; one class of them is a column."""
        return any(p.legs for p in self.classes.places(node)) and bool(self.flow.places(node))

    def late(self, node: fx.Node) -> bool:
        """Whether a node depends on the products."""
        return node in self.dependents or any(node is p.node for p in self.products)

    def _choose(self) -> RowSet:
        """The rows that every summary reads where they are the same; else all rows."""
        read = {
            self.rows.held(place)
            for node in self.classes.ends
            for operand in node.all_input_nodes
            if self.is_matrix(operand) and (place := self.place(operand)) is not None
        }
        only = read.pop() if len(read) == 1 else None
        if only is not None and self.groups > 1:
            spans = self.rows.spans(only)  # groups are not left out
            only = None if spans is None or spans[-1] != (0, self.groups) else only
        return only or self.rows.every

    # The nodes.

    def _translate(self) -> None:
        for i, each in enumerate(self.products):
            classes = val(each.node).shape[each.class_dim]
            logits = self.body.product(f"logits_{i}", each.node, classes)
            self.logits.append(logits)
            self.values[each.node] = logits
            if each.bias is not None and isinstance(b := self._bias(each), fx.Node):
                self.values[each.node] = self.biased[logits] = self.body(aten.add.Tensor, logits, b)
        for node in self.dependents:
            if (reason := self._visit(node)) is not None:
                self.outside[node] = reason

    def _visit(self, node: fx.Node) -> Refusal | None:
        """Translate a node if that is possible; otherwise say why not."""
        if any(a in self.totals for a in node.all_input_nodes):
            total = combined(node, self.totals, self.late)
            if total is None:
                return Refusal("it is computed from a sum over all rows", node)
            self.totals[node] = total
            return None
        if late := next((a for a in node.all_input_nodes if a in self.outside), None):
            return self.outside[late]
        if node in self.flow.unknown:
            return Refusal(self.flow.unknown[node].reason, node)
        handler = handler_of(node)
        if handler is None:
            return Refusal(f"{operator_name(node.target)} does not act on rows one by one", node)
        try:
            found = handler(self, node, arguments(node))
        except IllegalRewriteError as error:
            return Refusal(error.what, node)
        if isinstance(found, Refusal):
            return found
        if isinstance(found, Total):
            self.totals[node] = found
            return None
        if isinstance(found, Columns):
            self.columns[node] = found.matrix
            return None
        if isinstance(val(node), torch.Tensor) and (refusal := self._misplaced(node)):
            return refusal
        self.values[node] = found
        return None

    def _misplaced(self, node: fx.Node) -> Refusal | None:
        """Refuse a value whose rows or classes are no longer one axis each."""
        place, classes = self.place(node), [p for p in self.classes.places(node) if p.legs]
        if place is None or self.rows.held(place) is None:
            mix = self.flow.mixes.get(node)
            return Refusal(mix.reason if mix else "its rows are laid out in another way", node)
        if self._mixed(node, place):
            return Refusal("rows share an axis with something else", node)
        if len(classes) > 1 or any(p.dim is None for p in classes):
            return Refusal("the classes are split over several axes", node)
        if node in self.classes.unknown:
            return Refusal(self.classes.unknown[node].reason, node)
        return None

    def _mixed(self, node: fx.Node, place: Placement) -> bool:
        """Whether a dim holds more than rows, or what belongs to a row stands before them."""
        shape, width = shape_of(node), self.width_dim(node)
        whole = all(product(leg.size for leg in place.on(dim)) == shape[dim] for dim in place.dims)
        if not whole or width is None or self.is_matrix(node):
            return not whole
        return width < max(place.dims, default=0)

    def _bias(self, product: LargeProduct) -> fx.Node | Refusal:
        """``(V,)``, or the rows of ``(G, V)`` that belong to the groups."""
        bias = product.bias
        assert bias is not None
        if self.groups == 1:
            return self.whole(bias)

        def build(builder: Builder) -> Any:
            return builder(aten.reshape.default, bias, sizes)

        sizes = [self.groups, val(product.node).shape[product.class_dim]]
        table = self.body.input(f"whole_{len(self.whole_inputs)}", bias, sizes)
        self.whole_inputs[table] = build
        return self.of_group(table)

    # What handlers use.

    def rows_of(self, node: fx.Node) -> RowSet:
        """The rows that a value inside holds."""
        place = self.place(node)
        held = self.rows.held(place) if place is not None else None
        assert held is not None
        return held

    def count(self, rows: RowSet) -> Any:
        """The number of rows in a set, once the operator is being built."""
        assert self.flat is not None
        return self.flat.count(rows)

    def is_counted(self, rows: RowSet) -> bool:
        """Whether the number of rows in a set is a plain number."""
        sizes = self.rows.sizes if rows == self.rows.every else [s for s, _ in rows.digits]
        return all(isinstance(size, int) for size in sizes)

    def operand(self, value: fx.Node, at: fx.Node) -> fx.Node | Refusal:
        """An operand of an elementwise operator ``at``: inside, or brought in."""
        place = self.place(at)
        shift = val(at).dim() - val(value).dim() if isinstance(val(value), torch.Tensor) else 0
        if place is None:
            return Refusal("rows meet other rows", at)
        if value in self.values:
            mine = self.place(value)
            if mine is None or mine.moved({d: d + shift for d in mine.dims}) != place:
                return Refusal(f"rows of `{value.name}` meet other rows", at)
            return self.values[value]
        return bring.entered(self, value, place, at, shift)

    def beside(
        self, value: fx.Node, main: fx.Node, at: fx.Node, without: int | None = None
    ) -> fx.Node | Refusal:
        """A tensor with the dims of ``main`` (or all but one) that is read beside its rows."""
        place = self.place(main)
        assert place is not None
        dims = {d: d - (without is not None and d > without) for d in range(val(main).dim())}
        there = place.moved({d: k for d, k in dims.items() if d != without})
        if value in self.values:
            fits = self.place(value) == there
            return self.values[value] if fits else Refusal("its rows are others", value)
        if len(there.legs) != len(place.legs):
            return Refusal(f"`{value.name}` has only some of the row axes", at)
        return self.row_input(RowInput(value, there))

    def only_classes(self, node: fx.Node, dims: set[int]) -> Refusal | None:
        """Refuse an operator that does not act along the classes alone, and all of them."""
        main: Any = node.args[0]
        width = self.width_dim(main)
        if dims & set(self.row_dims(main)):
            return Refusal(f"{operator_name(node.target)} mixes rows", node)
        if width is not None and width not in dims:
            return Refusal(f"{operator_name(node.target)} acts on another axis", node)
        return None

    def of_group(self, table: fx.Node) -> fx.Node:
        """Of a body's ``(G, width)`` the row of the group that a row of the body is in."""
        if self._group is None:
            place = self.place(self.products[0].node)
            assert place is not None
            index = self._index_of_rows(RowInput(None, place))
            group = self.body(aten.remainder.Scalar, index, self.groups)
            self._group = self.body(aten.squeeze.dim, group, 1)
        return self.body(aten.embedding.default, table, self._group)

    def whole(self, value: fx.Node) -> fx.Node | Refusal:
        """A tensor without rows: one number, or one per class."""
        if self.late(value):
            return Refusal(f"`{value.name}` depends on all rows", value)
        known = next((b for b, source in self.whole_inputs.items() if source is value), None)
        if known is not None:
            return known
        fake, shape = val(value), shape_of(value)
        sizes = [fake.shape[d] for d in range(len(shape)) if shape[d] != 1]
        made = self.body.input(f"whole_{len(self.whole_inputs)}", value, sizes)
        self.whole_inputs[made] = value
        return made

    def row_input(self, given: RowInput) -> fx.Node | Refusal:
        """A tensor that is cut into rows with the products."""
        value, place = given.node, given.place
        if value is None:
            return self._index_of_rows(given)
        if self.late(value):
            return Refusal(f"`{value.name}` depends on other rows", value)
        held = self.rows.held(place)
        if held is None or (held != self.chosen and self.chosen != self.rows.every):
            return Refusal(f"`{value.name}` stands beside rows that are not read", value)
        known = next((b for b, other in self.row_inputs.items() if other == given), None)
        if known is None:
            known = self.body.input(
                f"rows_{len(self.row_inputs)}", value, [SAMPLE, *self._rest(given)]
            )
            self.row_inputs[known] = given
        return known if val(known).dim() > 1 else self.body(aten.unsqueeze.default, known, 1)

    def class_indices(self) -> fx.Node:
        """The index of each class, ``(V,)``."""
        first = self.products[0]
        classes = val(first.node).shape[first.class_dim]

        def build(builder: Builder) -> Any:
            size = builder.size(first.node, first.class_dim)
            return builder(aten.arange.default, size, device=val(first.node).device)

        made = self._index(f"whole_{len(self.whole_inputs)}", [classes])
        self.whole_inputs[made] = build
        return made

    def _index_of_rows(self, given: RowInput) -> fx.Node:
        made = self._index(f"rows_{len(self.row_inputs)}", [SAMPLE])
        self.row_inputs[made] = given
        return self.body(aten.unsqueeze.default, made, 1)

    def _index(self, name: str, sizes: list[Any]) -> fx.Node:
        made = self.body.input(name, self.products[0].node, sizes)
        made.meta["val"] = made.meta["val"].to(torch.int64)
        return made

    def _rest(self, given: RowInput) -> list[Any]:
        """Sizes of an input's dims that are no rows."""
        assert given.node is not None
        shape, shift = shape_of(given.node), 0
        if given.like is not None:
            shift = val(given.like).dim() - len(shape)
        dims = range(len(shape))
        wide = [d for d in dims if d + shift not in given.place.dims and shape[d] != 1]
        return [val(given.node).shape[d] for d in wide]
