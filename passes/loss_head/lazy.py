"""Logits that are an output of the model, computed when somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx

from graphopt.kernels.chunked_rows import spell
from graphopt.kernels.deferred import VIEWS, deferred
from graphopt.passes.loss_head.call import cut, whole
from graphopt.passes.loss_head.rows import Flat, RowSet, shape_of
from graphopt.passes.loss_head.translate import Translation
from graphopt.program import Program
from graphopt.rewrite import Builder
from graphopt.signature import OutputKind

aten = torch.ops.aten


def returned(program: Program, translations: Sequence[Translation]) -> dict[fx.Node, Translation]:
    """Matrices that the caller gets or sees through views, each with a translation to defer it."""
    pairs = zip(program.results(), program.outputs, strict=True)
    written = {value for value, spec in pairs if spec.kind is not OutputKind.USER}
    found: dict[fx.Node, Translation] = {}
    for t in (t for t in translations if t.groups == 1):
        for node in t.values:
            shown = node not in written and any(shows(user, t) for user in node.users)
            if shown and t.is_matrix(node) and _rows(t, _base(t, node)) is not None:
                found.setdefault(node, t)
    return found


def shows(user: fx.Node, t: Translation) -> bool:
    """Whether a reader outside is the model's output, or views that only the output reads."""
    if user.op == "output":
        return True
    known = any(user in nodes for nodes in (t.values, t.totals, t.columns))
    inside = known or not user.users
    return user.target in VIEWS and not inside and all(shows(u, t) for u in user.users)


def emit(t: Translation, node: fx.Node, build: Builder, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value that stands for a matrix: a call, and views of it.

    Args:
        made: matrix -> its value, for those that are there already; it is added to.
    """
    if node not in made:
        below = _below(t, node)
        if below is None:
            made[node] = _call(t, node, build)
        else:
            shown = emit(t, below, build, made)
            made[node] = build(node.target, shown, *node.args[1:], **node.kwargs)
    return made[node]


def _below(t: Translation, node: fx.Node) -> fx.Node | None:
    """The matrix that a view shows."""
    below = node.all_input_nodes[0]
    alone = len(node.all_input_nodes) == 1 and below in t.values
    return below if node.target in VIEWS and alone and t.is_matrix(below) else None


def _base(t: Translation, node: fx.Node) -> fx.Node:
    below = _below(t, node)
    return node if below is None else _base(t, below)


def _rows(t: Translation, node: fx.Node) -> RowSet | None:
    """The rows to promise, all if that is possible; ``None`` where a matrix cannot be deferred."""
    place, inputs = t.place(node), _inputs(t, node)
    held = None if place is None else t.rows.held(place)
    beside = {t.rows.held(given.place) for i, given in t.row_inputs.items() if i in inputs}
    if held is None or not beside <= {t.rows.every}:
        return held if beside == {held} else None
    return t.rows.every


def _call(t: Translation, node: fx.Node, build: Builder) -> fx.Node:
    place, rows, inputs = t.place(node), _rows(t, node), _inputs(t, node)
    assert place is not None and rows is not None
    flat = Flat(t.rows, rows, build)
    pairs = zip(t.products, t.logits, strict=True)
    products = {logits: p for p, logits in pairs if logits in inputs}
    beside = {i: given for i, given in t.row_inputs.items() if i in inputs}
    others = {i: given for i, given in t.whole_inputs.items() if i in inputs}
    with _rounded(t) as rounded:
        value = rounded.get(t.values[node], t.values[node])
        text = spell([*products, *beside, *others], [value], [])
    made = build(
        deferred,
        [flat.hidden(p.hidden.build(build)) for p in products.values()],
        [p.weight.build(build) for p in products.values()],
        [cut(given, t, flat) for given in beside.values()],
        [whole(given, build) for given in others.values()],
        text,
    )
    if t.values[node] not in t.body.smooth:
        made = build(aten.detach.default, made)
    return flat.restored(made, place, shape_of(node))


@contextmanager
def _rounded(t: Translation) -> Iterator[dict[fx.Node, fx.Node]]:
    """Within, a product plus its bias is of the product's dtype, as ``linear`` is under autocast.

    Yields:
        sum -> what stands for it.
    """
    graph, made = t.body.graph, dict[fx.Node, fx.Node]()
    for logits, total in t.biased.items():
        with graph.inserting_after(total):
            made[total] = graph.call_function(aten.type_as.default, (total, logits))
        users = [u for u in total.users if u is not made[total]]
        for user in users:
            user.replace_input_with(total, made[total])
    try:
        yield made
    finally:
        for total, cast in made.items():
            cast.replace_all_uses_with(total)
            graph.erase_node(cast)


def _inputs(t: Translation, node: fx.Node) -> set[fx.Node]:
    """The parameters of the body that a matrix is computed from."""
    seen, queue = set[fx.Node](), [t.values[node]]
    while queue:
        value = queue.pop()
        if value not in seen:
            seen.add(value)
            queue += value.all_input_nodes
    return {value for value in seen if value.op == "placeholder"}
