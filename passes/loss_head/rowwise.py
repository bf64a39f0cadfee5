"""Operators that act on the rows of a product one by one, and the same on some of the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.axes import rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.analysis.axis_rules.losses import elementwise_loss
from graphopt.errors import IllegalRewriteError
from graphopt.passes.loss_head.products import LargeProduct
from graphopt.passes.loss_head.registry import dims_named, name_of
from graphopt.program import is_random, val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten

SELECTIONS = (aten.index.Tensor, aten.index_select.default)
"""Operators that take positions by index or by mask."""

_RESHAPES = {aten.reshape.default: "shape", aten.view.default: "size", aten.expand.default: "size"}
"""Views that name every size of their result -> under which name."""

_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)
_ALONG = frozenset(
    {"softmax", "log_softmax", "_softmax", "_log_softmax", "logsumexp", "amax", "sum", "mean"}
)


def path(node: fx.Node, products: Mapping[fx.Node, LargeProduct]) -> list[fx.Node]:
    """From large products to a selection of their rows, what acts on each row, the selection
    aside; empty where it selects no rows of one."""
    found: dict[fx.Node, bool] = {}

    def leads(value: fx.Node) -> bool:
        if value not in found:
            found[value] = value in products or any(map(leads, _operands(value)))
        return found[value]

    selected = _operands(node)
    return [n for n, reached in found.items() if reached] if any(map(leads, selected)) else []


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose last dim is the node's, and whose rows are the node's or become them."""
    if node.op != "call_function" or not isinstance(val(node), torch.Tensor):
        return []
    if is_move(node) or node.target in _COPIES:
        return [node.args[0]]  # type: ignore[list-item]
    if not acts_on_rows(node):
        return []
    return [a for a in _tensors(node) if _same_rows(a, node)]


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if isinstance(val(a), torch.Tensor)]


def _same_rows(value: fx.Node, other: fx.Node) -> bool:
    rows, wanted = val(value).shape[:-1], val(other).shape[:-1]
    pairs = zip(rows, wanted, strict=False)
    return len(rows) == len(wanted) > 0 and all(statically_known_true(a == b) for a, b in pairs)


def is_move(node: fx.Node) -> bool:
    """Whether an operator moves, drops or repeats rows, each of them whole."""
    main: Any = node.args[0] if node.args else None
    if not isinstance(main, fx.Node) or not isinstance(val(main), torch.Tensor):
        return False
    last, rank, given = val(main).dim() - 1, val(node).dim(), arguments(node)
    if last < 1 or rank < 1:
        return False
    if node.target in _RESHAPES:
        return statically_known_true(val(main).shape[-1] == val(node).shape[-1])
    if node.target is aten.index.Tensor:
        return _dims_indexed(given["indices"]) <= last
    if node.target is aten.permute.default:
        return bool(given["dims"][-1] % (last + 1) == last)
    if node.target is aten.transpose.int:
        return last not in {given["dim0"] % (last + 1), given["dim1"] % (last + 1)}
    if node.target is aten.unsqueeze.default:
        return bool(given["dim"] % rank < rank - 1)
    if node.target in _ALONG_ONE_DIM:
        return last not in dims_named(node, given["dim"])
    return False


_ALONG_ONE_DIM = (
    aten.index_select.default, aten.slice.Tensor, aten.select.int, aten.squeeze.dim,
    aten.squeeze.dims,
)  # fmt: skip


def _dims_indexed(indices: Sequence[fx.Node | None]) -> int:
    """How many dims in front indices take part in, `None` among them."""
    masks = (torch.bool, torch.uint8)
    return sum(val(i).dim() if i is not None and val(i).dtype in masks else 1 for i in indices)


def acts_on_rows(node: fx.Node) -> bool:
    """Whether each row of the result comes from the same row of the operands."""
    if is_random(node):
        return False
    if name_of(node) in _ALONG:
        given = arguments(node)
        keeps = given.get("keepdim", True)
        return bool(keeps) and dims_named(node, given.get("dim")) == {val(node).dim() - 1}
    rule = rule_of(node.target)
    if rule is elementwise_loss:
        return arguments(node)["reduction"] == 0
    return rule in (pointwise.elementwise, pointwise.same)


class Selected:
    """Values on a path with rows moved as they are behind it, computed from hidden rows moved so.

    Attributes:
        inner: the path.
        hidden: the left factors of the products so far.
    """

    def __init__(
        self,
        products: Mapping[fx.Node, LargeProduct],
        inner: Collection[fx.Node],
        build: Builder,
    ) -> None:
        self.products, self.inner, self.build = products, inner, build
        self.hidden: list[fx.Node] = []
        self._made: dict[tuple[fx.Node, ...], fx.Node] = {}

    def of(self, node: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
        """What the moves make of a value on the path.

        Args:
            moves: operators that move rows, in the order in which they are applied.
        """
        key = (node, *moves)
        if key not in self._made:
            self._made[key] = self._of(node, moves)
        return self._made[key]

    def _of(self, node: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
        if node in self.products:
            return self._product(self.products[node], moves)
        if node.target in _COPIES:
            return self.of(node.args[0], moves)  # type: ignore[arg-type]
        if is_move(node):
            return self.of(node.args[0], [node, *moves])  # type: ignore[arg-type]
        given = arguments(node)
        if name_of(node) in _ALONG:
            given["dim"] = [-1] if isinstance(given["dim"], list | tuple) else -1
        args = {k: self._operand(v, node, moves) for k, v in given.items()}
        schema = node.target._schema  # type: ignore[union-attr]
        named = {a.name for a in schema.arguments if a.kwarg_only}
        made: fx.Node = self.build(
            node.target,
            *(v for k, v in args.items() if k not in named),
            **{k: v for k, v in args.items() if k in named},
        )
        return made

    def _product(self, product: LargeProduct, moves: Sequence[fx.Node]) -> fx.Node:
        build = self.build
        hidden = self._moved(product.hidden.build(build), moves)
        self.hidden.append(hidden)
        made: fx.Node = build(
            aten.linear.default, hidden, product.weight.build(build), product.bias
        )
        return made

    def _operand(self, value: Any, at: fx.Node, moves: Sequence[fx.Node]) -> Any:
        """An operand of an operator that acts on rows."""
        if not isinstance(value, fx.Node) or not isinstance(val(value), torch.Tensor):
            return value
        if value in self.inner:
            return self.of(value, moves)
        shape = val(value).shape
        if all(statically_known_true(n == 1) for n in shape[:-1]):
            return self.build(aten.reshape.default, value, [-1]) if len(shape) > 1 else value
        if not _same_rows(value, at):
            raise IllegalRewriteError(f"`{value.name}` has only some of the row axes")
        return self._moved(value, moves)

    def _moved(self, value: fx.Node, moves: Sequence[fx.Node]) -> fx.Node:
        """A tensor with the rows that the first move takes, moved."""
        for move in moves:
            given = arguments(move)
            if move.target in _RESHAPES:
                sizes = given[_RESHAPES[move.target]]
                value = self.build(move.target, value, [*sizes[:-1], self.build.size(value, -1)])
            elif move.target in SELECTIONS:
                sizes = [*val(move).shape[:-1], val(value).shape[-1]]
                value = self.build.of_size(sizes, move.target, value, *move.args[1:])
            else:
                value = self.build(move.target, value, *move.args[1:], **move.kwargs)
        return value
