"""Folding and arranging graphs: nothing lost, no circles, wires that only lead down."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import deep_report, node, small_graphs

from graphopt.report import NodeView
from graphopt.report.changes import Change, changes
from graphopt.report.fold import LONG, Box, Kind, fold, nodes_of, reads_of
from graphopt.report.layers import level

MODULES = ["", "a", "a.b", "a.b.0", "a.b.1", "a.b.2", "c", "c.0.x", "c.1.x", "c.2.x", "a..b", "."]


def boxes(box: Box) -> Iterator[Box]:
    yield box
    for item in box.items:
        if isinstance(item, Box):
            yield from boxes(item)


def folded(views: Sequence[NodeView]) -> Box:
    return fold(views, {v.name: Change.SAME for v in views})


def find(root: Box, name: str) -> Box:
    return next(b for b in boxes(root) if b.name == name)


def labels(box: Box) -> list[str]:
    return [item.label for item in box.items if isinstance(item, Box)]


@st.composite
def graphs(draw: st.DrawFn) -> list[NodeView]:
    size = draw(st.integers(0, 60))
    views: list[NodeView] = []
    for i in range(size):
        reads = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        module = draw(st.sampled_from(MODULES))
        line = draw(st.sampled_from(["m.py:1", "m.py:2", None]))
        op = draw(st.sampled_from(["aten.add", "aten.mul", "parameter"]))
        inputs = tuple(f"n{r}" for r in reads)
        views.append(node(f"n{i}", op, inputs, module, source=line))
    return views


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_drawn_node_stands_in_one_place(views: list[NodeView]) -> None:
    root = folded(views)
    placed = Counter(i for b in boxes(root) for i in b.items if isinstance(i, int))
    assert placed == Counter(reads_of(views).keys())
    for box in boxes(root):
        assert sorted(n for item in box.items for n in nodes_of(item)) == sorted(box.nodes)
    names = [b.name for b in boxes(root)]
    assert len(names) == len(set(names))


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_no_level_has_a_circle_and_items_come_in_order(views: list[NodeView]) -> None:
    reads = reads_of(views)
    for box in boxes(folded(views)):
        owner = {n: i for i, item in enumerate(box.items) for n in nodes_of(item)}
        edges = {(owner[r], mine) for n, mine in owner.items() for r in reads[n] if r in owner}
        crossing = {(a, b) for a, b in edges if a != b}
        assert all(a < b for a, b in crossing)
        assert nx.is_directed_acyclic_graph(nx.DiGraph(crossing))


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_wires_lead_down_and_every_dependence_is_drawn(views: list[NodeView]) -> None:
    reads = reads_of(views)
    users = defaultdict(list)
    for reader, sources in reads.items():
        for source in sources:
            users[source].append(reader)
    for box in boxes(folded(views)):
        drawn = level(box, reads, users)
        rank = {n: i for i, row in enumerate(drawn.rows) for n in row if n >= 0}
        assert sorted(n for n in rank if n < len(box.items)) == list(range(len(box.items)))
        owner = {n: i for i, item in enumerate(box.items) for n in nodes_of(item)}
        top, bottom = len(box.items), len(box.items) + 1
        wanted = {(owner.get(r, top), mine) for n, mine in owner.items() for r in reads[n]}
        wanted |= {(mine, bottom) for n, mine in owner.items() if set(users[n]) - owner.keys()}
        assert set(drawn.edges) == {(a, b) for a, b in wanted if a != b}
        for source, target in drawn.edges:
            assert rank[source] < rank[target]
            lanes = [i for i, row in enumerate(drawn.rows) if -1 - source in row]
            assert set(range(rank[source] + 1, rank[target])) <= set(lanes)
        assert all(len(row) == len(set(row)) for row in drawn.rows)


def test_layers_fold_into_rows_of_equal_blocks() -> None:
    report = deep_report(12, odd=5)
    before, _ = changes(report.graph_before, report.graph_after)
    root = fold(report.graph_before, before)
    layers = find(root, "encoder.layer")
    assert labels(layers) == ["layer.0 … 4", "layer.5", "layer.6 … 11"]
    assert [b.kind for b in layers.items if isinstance(b, Box)] == [
        Kind.REPEAT,
        Kind.MODULE,
        Kind.REPEAT,
    ]
    assert labels(find(root, "encoder.layer.7")) == ["attention", "intermediate", "output"]


def test_a_list_that_is_one_row_is_one_box() -> None:
    root = folded(deep_report(4).graph_before)
    assert labels(root) == ["encoder.layer.0 … 3"]
    assert labels(find(root, "encoder.layer")) == ["layer.0", "layer.1", "layer.2", "layer.3"]


def test_blocks_that_differ_do_not_fold_together() -> None:
    views = [node("x", "input", ())]
    for i, op in enumerate(["aten.add", "aten.add", "aten.add", "aten.mul", "aten.add"]):
        previous = views[-1].name
        views.append(node(f"p{i}", op, (previous,), f"list.{i}"))
        views.append(node(f"q{i}", "aten.relu", (f"p{i}",), f"list.{i}"))
    assert labels(find(folded(views), "list")) == ["list.0 … 2", "list.3", "list.4"]


def test_a_module_of_one_node_is_that_node() -> None:
    root = folded(small_graphs()[0])
    assert labels(root) == ["norm", "attention"]
    assert all(isinstance(item, int) for item in find(root, "norm").items)


def test_a_module_entered_twice_is_cut_where_it_would_close_a_circle() -> None:
    views = [node("x", "input", ())]
    for i, module in enumerate(["twice", "between", "twice"]):
        views.append(node(f"a{i}", "aten.add", (views[-1].name,), module))
        views.append(node(f"b{i}", "aten.mul", (f"a{i}",), module))
    assert labels(folded(views)) == ["twice #1", "between #1", "twice #2"]


def test_containers_with_something_between_their_blocks_give_way() -> None:
    views = [node("x", "input", ())]
    for i in range(3):
        views.append(node(f"a{i}", "aten.add", (views[-1].name,), f"net.blocks.{i}"))
        views.append(node(f"b{i}", "aten.mul", (f"a{i}",), f"net.blocks.{i}"))
        views.append(node(f"mix{i}", "aten.roll", (f"b{i}",), "net"))
    assert labels(find(folded(views), "net")) == ["blocks.0", "blocks.1", "blocks.2"]


def test_many_nodes_of_one_line_fold() -> None:
    views = [node("x", "input", ())]
    for i in range(30):
        line = f"/a/m.py:{1 if i < 20 else i}"
        views.append(node(f"n{i}", "aten.add", (views[-1].name,), source=line))
    root = folded(views)
    assert labels(root) == ["m.py:1"]
    assert find(root, "@m.py:1").kind is Kind.LINE
    assert len(find(root, "@m.py:1").items) == 20


@pytest.mark.parametrize("count", [LONG + 2, 400, 2000])
def test_long_lists_are_cut_into_parts(count: int) -> None:
    views = [node("x", "input", (), source=None)]
    for i in range(count):
        views.append(node(f"n{i}", "aten.add", (views[-1].name,), source=None))
    for box in boxes(folded(views)):
        assert len(box.items) <= LONG


def test_changes() -> None:
    before, after = changes(*small_graphs())
    assert before["mean"] is Change.REMOVED
    assert after["rms_norm"] is Change.ADDED
    assert before["root"] is after["root"] is Change.SAME, "only its input has a new name"
    assert before["weight"] is Change.SAME


def test_a_name_used_again_for_something_else_is_removed_and_added() -> None:
    old, new = [node("n", "aten.add", ())], [node("n", "aten.mul", ())]
    before, after = changes(old, new)
    assert (before["n"], after["n"]) == (Change.REMOVED, Change.ADDED)


@pytest.mark.parametrize("field", ["shape", "literals"])
def test_a_node_with_other_content_is_altered(field: str) -> None:
    before, after = changes(
        [node("n", "aten.sum", ())], [node("n", "aten.sum", (), **{field: "z"})]
    )
    assert before["n"] is after["n"] is Change.ALTERED


def test_other_weights_alter_a_node() -> None:
    def graph(weight: str) -> list[NodeView]:
        return [node(weight, "parameter", ()), node("n", "aten.linear", (weight,))]

    assert changes(graph("w"), graph("w_folded"))[1]["n"] is Change.ALTERED


def test_one_graph_alone_has_no_changes() -> None:
    before, after = changes(small_graphs()[0], [])
    assert set(before.values()) == {Change.SAME}
    assert not after
