"""What only looks like attention, or is slower as one operator, is left as it is."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import node, operators, weights
from spelled_attention import SIZE, WIDTH, Spelled, feed, same

import graphopt
from graphopt.onnx_files import pipeline
from graphopt.verify.timing import Pace

NEAR = {
    "its softmax runs over another axis": {"axis": 2},
    "in float32 alone, and this is float16": {"kind": np.float16},
    "in float32 alone, and this is double": {"kind": np.float64},
    "hidden scores are not put far below": {"mask": "hidden", "fill": -100.0},
    "its key is not transposed": {"key": "as it is", "tokens": SIZE},
}


@pytest.mark.parametrize("reason", NEAR)
def test_near_misses(fused, reason):
    found = fused(Spelled(**NEAR[reason]))
    assert not found.report.applied
    assert reason in found.report.missed[0].reason and "Softmax" in operators(found.path)


def middle(spelled):
    """The name of what the softmax gives, and a layer's result."""
    out = spelled.layer()
    return next(n.output[0] for n in spelled.nodes if n.op_type == "Softmax"), out


def test_weights_that_are_outputs_are_left(fused):
    spelled = Spelled()
    weighed, out = middle(spelled)
    found = fused(spelled, weighed, out=out)
    assert "read elsewhere" in found.report.missed[0].reason and not found.report.applied


def test_weights_that_something_else_reads_are_left(fused):
    spelled = Spelled(safe=True)
    weighed, out = middle(spelled)
    spelled.nodes.append(node("ReduceSum", [weighed], ["sum"]))
    found = fused(spelled, "sum", out=out)
    assert not found.report.applied and "Softmax" in operators(found.path)


def test_a_mask_that_is_scaled_is_left(fused):
    spelled = Spelled(scale=None, mask="added")
    masked = spelled.masked
    spelled.masked = lambda s: spelled.add("Mul", masked(s), spelled.floats("half", 0.5))
    found = fused(spelled)
    assert "scaled with them" in found.report.missed[0].reason and not found.report.applied


def test_scores_scaled_per_head_are_left(fused):
    spelled = Spelled(scale=None)
    each = np.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    spelled.masked = lambda s: spelled.add("Mul", s, spelled.floats("each", each))
    found = fused(spelled)
    assert "more than one number" in found.report.missed[0].reason and not found.report.applied


def test_heads_that_are_broadcast_are_left(fused):
    """One key for all heads."""
    spelled = Spelled()
    turned = spelled.turned

    def one(heads):
        spelled.nodes.pop()
        return turned(spelled.add("Reshape", spelled.nodes[-1].output[0],
                                  spelled.hold("single", np.array([0, 0, 1, SIZE]))))  # fmt: skip

    w = weights(WIDTH, SIZE, seed=4)
    spelled.turned = one
    spelled.floats("wk", w)
    found = fused(spelled)
    assert "differ in heads" in found.report.missed[0].reason and not found.report.applied


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_looked_through_where_it_drops_nothing(fused, training, tmp_path):
    spelled = Spelled()
    weighed = spelled.weighed
    more = [spelled.floats("ratio", 0.0), spelled.hold("on", np.array(True))] if training else []
    spelled.weighed = lambda s: spelled.add("Dropout", weighed(s), *more)
    found = fused(spelled)
    assert ("MultiHeadAttention" in operators(found.path)) is not training
    same(found, feed(), tmp_path)


def test_a_classifier_is_no_attention(fused):
    spelled = Spelled()
    logits = spelled.add("MatMul", "x", spelled.floats("w", weights(WIDTH, 5)))
    found = fused(spelled, out=spelled.weighed(logits))
    assert not found.report.applied and not found.report.missed


def test_the_original_is_kept_where_it_is_faster(fused, monkeypatch):
    monkeypatch.setattr(pipeline, "pace_of", lambda *_given: Pace(1.0, 1.2))
    spelled = Spelled()
    out = spelled.layer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphopt.onnx_files.optimize, "pace_of", lambda *_given: Pace(1.0, 1.0))
        found = fused(spelled, out=out, measure=True)
    assert "Softmax" in operators(found.path) and found.report.missed[0].stage == "profit"
