"""Runs in float64, which both files are held to: by ONNX Runtime, or by definition."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from graphs import graph, model, node, outputs, save, tensor, value, weights
from onnx import TensorProto, helper
from test_backend_nodes import array, cases

from graphopt.onnx_files.definitions import OPERATORS
from graphopt.onnx_files.document import document_of, read_document
from graphopt.onnx_files.wide import widened


def wide(made, tmp_path, feed):
    """Outputs in float64, and in ONNX Runtime as they are."""
    source = save(made, tmp_path / "m.onnx")
    runs, lacking = widened(read_document(source).model)
    assert runs is not None, lacking
    return runs(feed), outputs(source, feed)


def test_weights_constants_and_casts_are_wide(tmp_path):
    """A sum that float32 rounds away."""
    nodes = [
        node("Constant", [], ["tiny"], value=tensor(np.array([1e-9], np.float32), "")),
        node("Constant", [], ["two"], value_float=2.0),
        node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        node("Add", ["c", "tiny"], ["a"]),
        node("Sub", ["a", "x"], ["s"]),
        node("Mul", ["s", "two"], ["y"]),
    ]
    made = model(nodes, [value("x", [1])], [value("y", [1])])
    exact, plain = wide(made, tmp_path, {"x": np.ones(1, np.float32)})
    assert plain[0][0] == 0 and exact[0].dtype == np.float64
    assert exact[0][0] == pytest.approx(2 * float(np.float32(1e-9)), rel=1e-6)


def test_integers_and_subgraphs_come_along(tmp_path):
    inner = [
        graph([node(kind, ["x", "w"], [n])], [], [value(n, None)])
        for kind, n in (("Mul", "t"), ("Add", "e"))
    ]
    nodes = [
        node("If", ["c"], ["h"], then_branch=inner[0], else_branch=inner[1]),
        node("Gather", ["h", "i"], ["y"]),
    ]
    held = [tensor(weights(4), "w"), tensor(np.array([2, 0]), "i")]
    inputs = [value("x", [4]), value("c", [], TensorProto.BOOL)]
    made = model(nodes, inputs, [value("y", [2])], held)
    for flag in (True, False):
        feed = {"x": weights(4, seed=3), "c": np.array(flag)}
        exact, plain = wide(made, tmp_path, feed)
        np.testing.assert_allclose(exact[0], plain[0], rtol=1e-6)
        assert exact[0].dtype == np.float64 and (exact[0] != plain[0]).any()


def test_what_computes_in_its_own_types_has_no_float64(tmp_path):
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"]), node("Add", ["x", "w"], ["y"])]
    held = [tensor(np.arange(4, dtype=np.int8), "q"), tensor(np.array(0.5, np.float32), "s")]
    made = model(nodes, [value("x", [4])], [value("y", [4])], held)
    runs, lacking = widened(read_document(save(made, tmp_path / "m.onnx")).model)
    assert runs is None and "DequantizeLinear" in lacking


KINDS = [kind.__name__ for kind in OPERATORS]


@pytest.mark.parametrize("kind", KINDS)
def test_definitions_agree_with_what_onnx_stores(kind):
    """On its own node tests, those in float32 and those that a definition takes."""
    count = 0
    for case in cases():
        operators = {n.op_type for n in case.model.graph.node}
        kinds = {v.type.tensor_type.elem_type for v in case.model.graph.input}
        if operators != {kind} or TensorProto.FLOAT not in kinds:
            continue
        evaluator = onnx.reference.ReferenceEvaluator(case.model, new_ops=OPERATORS)
        named = zip(case.model.graph.input, case.data_sets[0][0], strict=True)
        given = {v.name: array(a) for v, a in named}
        try:
            found = evaluator.run(None, given)
        except NotImplementedError:
            continue
        count += 1
        np.testing.assert_allclose(found[0], case.data_sets[0][1][0], rtol=1e-4, atol=1e-6)
    assert count >= (1 if kind == "Erf" else 3)


def test_gathered_elements_of_a_part(tmp_path):
    """Fewer indices than data on the other axis."""
    nodes = [node("GatherElements", ["x", "i"], ["g"], axis=1), node("Erf", ["g"], ["y"])]
    held = [tensor(np.array([[2, 0, 1]]), "i")]
    made = model(nodes, [value("x", [4, 5])], [value("y", [1, 3])], held)
    exact, plain = wide(made, tmp_path, {"x": weights(4, 5)})
    np.testing.assert_allclose(exact[0], plain[0], rtol=1e-5)


def test_convolutions_in_float64(tmp_path):
    nodes = [
        node("Conv", ["x", "w", "b"], ["h"], pads=[1, 0, 2, 1], strides=[2, 1], group=2),
        node("AveragePool", ["h"], ["p"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
        node("MaxPool", ["p"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    held = [tensor(weights(6, 2, 3, 3), "w"), tensor(weights(6), "b")]
    made = model(nodes, [value("x", [2, 4, 9, 8])], [value("y", None)], held)
    x = weights(2, 4, 9, 8, seed=4)
    exact, plain = wide(made, tmp_path, {"x": x})
    np.testing.assert_allclose(exact[0], plain[0], rtol=1e-4, atol=1e-5)
    h = torch.nn.functional.pad(torch.from_numpy(x).double(), (0, 1, 1, 2))
    w, b = (torch.from_numpy(a.copy()).double() for a in (weights(6, 2, 3, 3), weights(6)))
    h = torch.nn.functional.conv2d(h, w, b, stride=(2, 1), groups=2)
    h = torch.nn.functional.avg_pool2d(h, 2, 1, 1, count_include_pad=False)
    np.testing.assert_allclose(exact[0], torch.nn.functional.max_pool2d(h, 2, 2), rtol=1e-12)


def test_functions_are_wide_too(tmp_path):
    body = [node("Mul", ["a", "a"], ["b"])]
    function = helper.make_function(
        "own", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 18)]
    )
    nodes = [node("Square", ["x"], ["y"], domain="own")]
    made = model(nodes, [value("x", [3])], [value("y", [3])], functions=[function], domains=["own"])
    runs, lacking = widened(document_of(made, tmp_path / "m.onnx").model)
    x = weights(3)
    assert runs is not None, lacking
    np.testing.assert_array_equal(runs({"x": x})[0], x.astype(np.float64) ** 2)
