"""What depends on constants alone is computed ahead of time, unless the file grows by it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import FLOAT, constants, graph, model, node, operators, outputs, save, tensor, value
from onnx import TensorProto, helper

import graphopt

STEPS = ["FoldConstants", "RemoveUnused", "RemoveIdentities", "EliminateCommonSubexpressions"]


def folded(made, tmp_path, steps=STEPS, **options):
    source = save(made, tmp_path / "m.onnx")
    return graphopt.optimize_onnx(
        source, tmp_path / "o.onnx", passes=steps, measure=False, **options
    )


def rolled_back(found):
    """What only verification prevented."""
    return [m.reason for m in found.report.missed if m.stage == "verify"]


def numbers(*values, dtype=np.float32):
    return np.array(values, dtype)


def one(nodes, held, shape=(4,), **options):
    """``y`` of ``x`` and what ``nodes`` make of ``held``."""
    return model(nodes, [value("x", shape)], [value("y", None)], held, **options)


def test_a_chain_of_constants_is_one_constant(tmp_path):
    nodes = [
        node("Sqrt", ["c"], ["r"]),
        node("Mul", ["r", "k"], ["s"]),
        node("Add", ["x", "s"], ["y"]),
    ]
    held = [tensor(numbers(1, 4, 9, 16), "c"), tensor(numbers(2), "k")]
    found = folded(one(nodes, held), tmp_path)
    assert operators(found.path) == ["Add"] and list(constants(found.path)) == ["s"]
    np.testing.assert_array_equal(constants(found.path)["s"], [2, 4, 6, 8])
    assert [a.rule for a in found.report.applied] == ["fold Mul"]


def test_what_makes_the_file_grow_stays(tmp_path):
    nodes = [node("Expand", ["k", "n"], ["c"]), node("Add", ["x", "c"], ["y"])]
    held = [tensor(numbers(2), "k"), tensor(np.array([4096]), "n")]
    found = folded(one(nodes, held, (4096,)), tmp_path)
    assert operators(found.path) == ["Expand", "Add"]
    assert any("the file would grow by" in m.reason for m in found.report.missed)
    assert found.report.passes[0].bytes_after == found.report.passes[0].bytes_before


def test_a_large_value_between_small_ones_is_no_matter(tmp_path):
    nodes = [
        node("Expand", ["k", "n"], ["c"]),
        node("ReduceSum", ["c"], ["s"], keepdims=0),
        node("Add", ["x", "s"], ["y"]),
    ]
    held = [tensor(numbers(2), "k"), tensor(np.array([4096]), "n")]
    found = folded(one(nodes, held), tmp_path)
    assert operators(found.path) == ["Add"] and constants(found.path)["s"] == 8192


def test_a_weight_that_something_else_reads_is_not_stored_twice(tmp_path):
    large = np.arange(4096, dtype=np.float32).reshape(64, 64)
    nodes = [
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["x", "t"], ["p"]),
        node("MatMul", ["p", "w"], ["y"]),
    ]
    found = folded(one(nodes, [tensor(large, "w")], (2, 64)), tmp_path)
    assert not rolled_back(found)
    assert operators(found.path) == ["Transpose", "MatMul", "MatMul"]


@pytest.mark.parametrize("draws", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_random_numbers_are_drawn_anew(draws, tmp_path):
    nodes = [
        *(node(draws, ["c"], ["r"], dtype=FLOAT), node(draws, ["c"], ["s"], dtype=FLOAT)),
        *(node("Sub", ["r", "s"], ["d"]), node("Add", ["x", "d"], ["y"])),
    ]
    held = [tensor(np.full(64, 0.5, np.float32), "c")]
    found = folded(one(nodes, held, (64,)), tmp_path, steps="exact")
    assert operators(found.path).count(draws) == 2
    if draws != "Bernoulli":  # of which ONNX Runtime itself makes one
        assert any("'y' is random" in note for note in found.report.notes)
        assert outputs(found.path, {"x": np.zeros(64, np.float32)})[0].any()


def test_a_dropout_in_training_mode_is_not_folded(tmp_path):
    nodes = [node("Dropout", ["c", "r", "t"], ["d"]), node("Add", ["x", "d"], ["y"])]
    held = [tensor(np.ones(64, np.float32), "c"), tensor(numbers(0.5)[0], "r")]
    held.append(tensor(np.array(True), "t"))
    found = folded(one(nodes, held, (64,)), tmp_path, steps="exact")
    assert "Dropout" in operators(found.path)


def test_what_callers_may_override_is_no_constant(tmp_path):
    nodes = [node("ReduceSum", ["c"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"])]
    made = one(nodes, [tensor(numbers(1, 4, 9, 16), "c")], (2,))
    made.graph.input.append(value("c", [4]))
    found = folded(made, tmp_path, steps="exact")
    assert operators(found.path) == ["ReduceSum", "Add"] and not rolled_back(found)
    x, other = np.zeros(2, np.float32), numbers(1, 1, 1, 1)
    np.testing.assert_array_equal(outputs(found.path, {"x": x})[0], [30, 30])
    np.testing.assert_array_equal(outputs(found.path, {"x": x, "c": other})[0], [4, 4])


def test_operators_of_other_domains_are_left(tmp_path):
    function = helper.make_function(
        "own", "Sqrt", ["a"], ["b"], [node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    nodes = [node("Sqrt", ["c"], ["r"], domain="own"), node("Add", ["x", "r"], ["y"])]
    held = [tensor(numbers(1, 4, 9, 16), "c")]
    made = one(nodes, held, functions=[function], domains=["own"])
    found = folded(made, tmp_path)
    assert operators(found.path) == ["Sqrt", "Add"]
    np.testing.assert_array_equal(
        outputs(found.path, {"x": np.zeros(4, np.float32)})[0], [-1, -4, -9, -16]
    )


def test_outputs_keep_their_nodes(tmp_path):
    nodes = [node("Sqrt", ["c"], ["r"]), node("Add", ["x", "r"], ["y"])]
    made = one(nodes, [tensor(numbers(1, 4, 9, 16), "c")])
    made.graph.output.append(value("r", [4]))
    found = folded(made, tmp_path)
    assert "Sqrt" in operators(found.path)
    assert [v.name for v in onnx.load(found.path).graph.output] == ["y", "r"]


def test_what_a_branch_reads_is_folded_outside(tmp_path):
    inner = [graph([node("Add", ["x", "r"], [n])], [], [value(n, [4])]) for n in ("t", "e")]
    nodes = [
        node("Sqrt", ["c"], ["r"]),
        node("If", ["f"], ["y"], then_branch=inner[0], else_branch=inner[1]),
    ]
    made = one(nodes, [tensor(numbers(1, 4, 9, 16), "c")])
    made.graph.input.append(value("f", [], TensorProto.BOOL))
    found = folded(made, tmp_path)
    assert operators(found.path) == ["If"]
    feeds = {"x": np.zeros(4, np.float32), "f": np.array(True)}
    np.testing.assert_array_equal(outputs(found.path, feeds)[0], [1, 2, 3, 4])


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 23])
def test_operator_sets_from_seven_upward(opset, tmp_path):
    nodes = [
        node("Add", ["a", "a"], ["b"]),
        node("Mul", ["x", "b"], ["h"]),
        node("Identity", ["h"], ["i"]),
        node("Relu", ["i"], ["y"]),
    ]
    held = [tensor(numbers(1, -1, 2, 3), "a")]
    found = folded(one(nodes, held, opset=opset, ir=3 if opset < 9 else 10), tmp_path, "exact")
    assert operators(found.path) == ["Mul", "Relu"] and list(constants(found.path)) == ["b"]


def test_nodes_without_names_and_dead_ones(tmp_path):
    nodes = [
        node("Neg", ["x"], ["a"]),
        node("Neg", ["x"], ["b"]),
        node("Abs", ["b"], ["c"]),
        node("Add", ["a", "c"], ["y"]),
        node("Exp", ["x"], ["dead"]),
    ]
    found = folded(one(nodes, []), tmp_path)
    assert operators(found.path) == ["Neg", "Abs", "Add"]
    names = {view.name for view in found.report.graph_before}
    assert len(names) == len(found.report.graph_before)
    x = numbers(1, -2, 3, -4)
    wanted, now = (outputs(p, {"x": x})[0] for p in (tmp_path / "m.onnx", found.path))
    np.testing.assert_array_equal(wanted, now)


def test_a_file_that_the_runtime_refuses_is_one_error(tmp_path):
    nodes = [node("Neg", ["x"], ["a"], name="n"), node("Neg", ["a"], ["y"], name="n")]
    with pytest.raises(graphopt.GraphoptError, match="two nodes with same node name"):
        folded(one(nodes, []), tmp_path)
    assert not (tmp_path / "o.onnx").exists()
