"""The trace: placements under views, verdicts, several seeds, aligned operands, reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from axis_graphs import capture, inputs, one, result, trace
from torch import Tensor
from torch.fx import Graph

from graphopt.analysis.axes import (
    Leg,
    Mix,
    Parallel,
    Placement,
    Unknown,
    rule,
    trace_axis,
)
from graphopt.analysis.axis_rules import RULES
from graphopt.analysis.axis_rules.pointwise import elementwise, same
from graphopt.errors import GraphoptError

x = torch.randn(2, 6, 4)


def test_softmax_mixes_and_leaves_the_axis_in_place() -> None:
    flow, out = trace(lambda t: t.softmax(1) * 2, x)
    assert one(flow, Mix).kind == "softmax"
    assert flow.placement(out) is None
    assert [place.dim for place in flow.places(out)] == [1]
    assert not flow.ends


def test_a_reduction_ends_the_axis_and_says_where() -> None:
    flow, out = trace(lambda t: t.relu().sum(1), x)
    ((node, mix),) = flow.ends.items()
    assert (node, mix.kind) == (out, "reduce")
    assert "dim 1" in mix.reason
    assert "axis_graphs.py:" in mix.where
    assert flow.depends(out) and not flow.places(out)


def test_what_does_not_depend_on_the_axis_is_absent() -> None:
    graph = capture(lambda t, w: (t * 2, w * 2), x, x + 1)
    flow = trace_axis(inputs(graph)[0], 1)
    assert flow.depends(result(graph, 0)) and not flow.depends(result(graph, 1))


def test_position_table_is_aligned_and_scale_is_not() -> None:
    table, scale = torch.randn(1, 6, 4), torch.randn(1, 1, 4)
    graph = capture(lambda t, p, c: t * c + p, x, table, scale)
    _, position, _ = inputs(graph)
    flow = trace_axis(inputs(graph)[0], 1)
    ((aligned,),) = flow.aligned.values()
    assert (aligned.node, aligned.placement.dim, aligned.partial) == (position, 1, False)


def test_rows_over_batch_and_tokens_align_in_part() -> None:
    graph = capture(lambda t, p: (t + p).flatten(0, 1) * 1, x, torch.randn(6, 4))
    flow = trace_axis(inputs(graph)[0], (0, 1))
    assert flow.extent == 12
    assert flow.placement(result(graph)) == Placement((Leg(0, 12),))
    ((aligned,),) = flow.aligned.values()
    assert aligned.partial and aligned.placement.dims == (0,)


def test_neighbours_added_are_a_join() -> None:
    flow, out = trace(lambda t: t[:, 1:] + t[:, :-1], x)
    assert one(flow, Mix).kind == "join"
    assert {place.start for place in flow.places(out)} == {0, 1}


def test_more_than_two_neighbours_have_no_place() -> None:
    flow, out = trace(lambda t: t[:, 2:] + t[:, 1:-1] + t[:, :-2], x)
    assert [mix.kind for mix in flow.mixes.values()] == ["join", "join"]
    assert flow.places(out) == ()


def _attention(t: Tensor, wq: Tensor, wk: Tensor, mask: Tensor) -> Tensor:
    scores = (t @ wq) @ (t @ wk).mT + mask
    return scores.softmax(-1) @ t


def test_hand_written_attention_has_a_row_and_a_column_role() -> None:
    w = torch.randn(4, 4)
    graph = capture(_attention, x, w, w + 1, torch.randn(1, 6, 6))
    flow = trace_axis(inputs(graph)[0], 1)
    scores = next(node for node in graph.nodes if len(flow.places(node)) == 2)
    assert {place.dim for place in flow.places(scores)} == {1, 2}
    assert {a.placement.dim for pair in flow.aligned.values() for a in pair} == {1, 2}
    assert [mix.kind for mix in flow.mixes.values()] == ["join", "softmax", "contract"]
    assert [place.dim for place in flow.places(result(graph))] == [1]
    assert flow.placement(result(graph)) is None


def test_attention_of_other_queries_keeps_them_apart() -> None:
    q, kv = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 5, 4)
    graph = capture(F.scaled_dot_product_attention, q, kv, kv + 1)
    query, key, _ = inputs(graph)
    assert trace_axis(query, 2).placement(result(graph)) == Placement((Leg(2, 6),))
    assert one(trace_axis(key, 2), Mix).kind == "softmax"


def _head(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).flatten(0, 1).float(), labels.flatten())


def test_loss_head_rows_and_classes() -> None:
    graph = capture(_head, x, torch.randn(9, 4), torch.randint(9, (2, 6)))
    logits = next(node for node in graph.nodes if node.target is torch.ops.aten.linear.default)
    rows, classes = trace_axis(logits, (0, 1)), trace_axis(logits, 2)
    both = [node for node in graph.nodes if rows.placement(node) and classes.placement(node)]
    assert both[0] is logits and len(both) >= 2
    ((end, mix),) = classes.ends.items()
    assert end.target is torch.ops.aten.cross_entropy_loss.default and mix.kind == "reduce"
    (labels,) = rows.aligned[end]
    assert labels.placement == Placement((Leg(0, 12),))


def test_row_summary_of_a_log_sum_exp() -> None:
    def z_loss(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w).logsumexp(-1).square().mean()

    graph = capture(z_loss, x, torch.randn(9, 4))
    logits = next(node for node in graph.nodes if node.target is torch.ops.aten.linear.default)
    rows, classes = trace_axis(logits, (0, 1)), trace_axis(logits, 2)
    (summary,) = [node for node in classes.ends if rows.placement(node)]
    assert summary.target is torch.ops.aten.logsumexp.default


def test_labels_shifted_by_one_join_unless_seeded_with_their_shift() -> None:
    def shifted(h: Tensor, labels: Tensor) -> Tensor:
        return h[:, :-1] * labels[:, 1:]

    graph = capture(shifted, torch.randn(2, 6), torch.randn(2, 6))
    h, labels = inputs(graph)
    assert one(trace_axis(h, 1, {labels: 1}), Mix).kind == "join"
    flow = trace_axis(h, 1, {labels: Placement((Leg(1, 6),), start=-1)})
    assert flow.placement(result(graph)) == Placement((Leg(1, 5),))


def test_an_index_that_counts_reads_its_dim_in_order() -> None:
    def last(t: Tensor, at: Tensor) -> Tensor:
        return t[torch.arange(t.shape[0], device=t.device), at]

    def elsewhere(t: Tensor, at: Tensor) -> Tensor:
        return t[torch.arange(1, 1 + at.shape[0]), at]

    for read, size in ((last, 3), (elsewhere, 4)):
        graph = capture(read, torch.randn(size, 6, 4), torch.tensor([5, 0, 2]))
        t, at = inputs(graph)
        assert trace_axis(at, 0).placement(result(graph)) == Placement((Leg(0, 3),))
        known = trace_axis(t, 0).placement(result(graph))
        assert known == (Placement((Leg(0, 3),)) if read is last else None)
        assert one(trace_axis(t, 1), Mix).kind == "reindex"
        assert not any(verdict.as_is for verdict in trace_axis(t, 0).parallel.values())


def test_contrastive_logits_have_a_row_axis_and_a_column_axis() -> None:
    graph = capture(lambda a, b: a @ b.mT, torch.randn(5, 4), torch.randn(5, 4))
    image, text = inputs(graph)
    assert trace_axis(image, 0).placement(result(graph)) == Placement((Leg(0, 5),))
    assert trace_axis(text, 0).placement(result(graph)) == Placement((Leg(1, 5),))
    assert one(trace_axis(image, 0, {text: 0}), Mix).kind == "join"


def test_dropout_is_parallel_and_random() -> None:
    flow, _ = trace(lambda t: F.dropout(t, 0.5), x)
    assert one(flow, Parallel).random


@pytest.mark.parametrize(
    ("fn", "as_is"),
    [
        (lambda t: t.relu(), True), (lambda t: t.mT, True), (lambda t: t[:, 1:], False),
        (lambda t: t[:, :, 1:], True), (lambda t: t.sum(2), True), (lambda t: t.tril(), False),
        (lambda t: t.flatten(1), False), (lambda t: t[:, :, None], True),
        (lambda t: torch.cat([t, t], 2), True), (lambda t: F.layer_norm(t, [4]), True),
    ],
)  # fmt: skip
def test_as_is_says_which_calls_run_on_a_slice(fn: Callable[[Tensor], Tensor], as_is: bool) -> None:
    flow, _ = trace(fn, x)
    assert [verdict.as_is for verdict in flow.parallel.values()] == [as_is]


def test_a_number_read_from_the_axis_taints_what_it_scales() -> None:
    def scaled(t: Tensor, y: Tensor) -> Tensor:
        return y * t.sum().item()

    graph = capture(scaled, x, x + 1)
    t, y = inputs(graph)
    assert trace_axis(t, 1).places(result(graph)) == () and trace_axis(t, 1).depends(result(graph))
    flow = trace_axis(y, 1, {t: 1})
    assert flow.placement(result(graph)) is None
    assert flow.places(result(graph)) == (Placement((Leg(1, 6),)),)


def test_a_view_through_the_axis_is_unknown_with_its_line() -> None:
    flow, out = trace(lambda t: t.reshape(2, 4, 6) * 1, x)
    unknown = one(flow, Unknown)
    assert "cuts" in unknown.reason and "axis_graphs.py:" in unknown.where
    assert out in flow.stopped and flow.placement(out) is None and flow.depends(out)


@torch.library.custom_op("graphopt_tests::opaque", mutates_args=())
def opaque(t: Tensor) -> Tensor:
    return t.clone()


@opaque.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)


def test_an_operator_without_a_rule_stops_only_what_depends_on_it() -> None:
    graph = capture(lambda t: (opaque(t.relu()) + 1, t * 2), x)
    flow = trace_axis(inputs(graph)[0], 1)
    assert one(flow, Unknown).reason == "no rule for graphopt_tests::opaque.default"
    assert flow.placement(result(graph, 0)) is None and flow.depends(result(graph, 0))
    assert flow.placement(result(graph, 1)) == Placement((Leg(1, 6),))


def test_a_rule_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "graphopt_tests::opaque.default", same)  # undone afterwards
    rule("graphopt_tests::opaque")(elementwise)
    flow, out = trace(lambda t: opaque(t), x)
    assert flow.placement(out) == Placement((Leg(1, 6),))


def test_a_write_in_place_is_unknown() -> None:
    graph = Graph()
    t = graph.placeholder("t")
    t.meta["val"] = x
    node = graph.call_function(torch.ops.aten.relu_.default, (t,))
    node.meta["val"] = x
    graph.output((node,))
    assert "relu_" in one(trace_axis(t, 1), Unknown).reason


@pytest.mark.parametrize(
    ("dims", "words"),
    [(3, "has dims 0 to 2, not 3"), ((), "has dims 0 to 2"), (0, "one index")],
)
def test_a_bad_seed_is_refused(dims: int, words: str) -> None:
    graph = capture(lambda t: t * 1, torch.randn(1, 6, 4))
    with pytest.raises(GraphoptError, match=words):
        trace_axis(inputs(graph)[0], dims)


def test_seeds_of_two_sizes_are_refused() -> None:
    graph = capture(lambda a, b: (a * 1, b * 1), torch.randn(2, 6), torch.randn(2, 5))
    a, b = inputs(graph)
    with pytest.raises(GraphoptError, match=r"6 indices in .* and 5 in"):
        trace_axis(a, 1, {b: 1})


def test_a_seed_that_is_no_tensor_is_refused() -> None:
    graph = capture(lambda t: t.topk(2).values, x)
    pair = next(node for node in graph.nodes if node.target is torch.ops.aten.topk.default)
    with pytest.raises(GraphoptError, match="no single tensor"):
        trace_axis(pair, 0)
