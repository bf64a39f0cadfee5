"""Equal weights are stored once; what only looks equal, or must stay, stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import (
    FLOAT,
    constants,
    graph,
    model,
    node,
    operators,
    outputs,
    save,
    tensor,
    value,
    weights,
)
from onnx import TensorProto, helper

import graphopt

W = weights(8, 8)


def merged(made, tmp_path, **options):
    source = save(made, tmp_path / "m.onnx")
    options = {"passes": ["MergeInitializers"], "measure": False, **options}
    return graphopt.optimize_onnx(source, tmp_path / "o.onnx", **options)


def two(first, second, *, opset=18, element=FLOAT):
    """``x @ first + x @ second``."""
    nodes = [
        *(node("MatMul", ["x", "a"], ["p"]), node("MatMul", ["x", "b"], ["q"])),
        node("Add", ["p", "q"], ["y"]),
    ]
    held = [tensor(first, "a"), tensor(second, "b")]
    return model(nodes, [value("x", [2, 8], element)], [value("y", [2, 8], element)], held)


def test_equal_weights_are_one(tmp_path):
    found = merged(two(W, W.copy()), tmp_path)
    assert list(constants(found.path)) == ["a"]
    assert [(a.rule, a.removed, a.added) for a in found.report.applied] == [
        ("merge equal constants", ("b",), ("a",))
    ]
    assert found.report.certificates[0].numeric == "bitwise" and found.report.verified
    assert found.bytes[1] < found.bytes[0] + 1500 and found.report.passes[0].bytes_after == W.nbytes


@pytest.mark.parametrize("change", [-0.0, float("nan")], ids=["zero of the other sign", "nan"])
def test_other_bits_are_other_weights(change, tmp_path):
    first, second = W.copy(), W.copy()
    first[0, 0], second[0, 0] = (0.0 if change == 0 else 1.0), change
    assert set(constants(merged(two(first, second), tmp_path).path)) == {"a", "b"}


def test_nan_of_the_same_bits_is_the_same(tmp_path):
    first = W.copy()
    first[0, 0] = np.nan
    assert set(constants(merged(two(first, first.copy()), tmp_path).path)) == {"a"}


def test_equal_bytes_of_another_type_or_shape_stay(tmp_path):
    plain = np.arange(8, dtype=np.int32)
    nodes = [
        node("Cast", ["i"], ["fi"], to=FLOAT),
        node("Reshape", ["f", "s"], ["ff"]),
        node("Sum", ["x", "fi", "ff"], ["y"]),
    ]
    held = [
        tensor(plain, "i"),
        tensor(plain.view(np.float32).reshape(2, 4), "f"),
        tensor(np.array([8]), "s"),
    ]
    made = model(nodes, [value("x", [8])], [value("y", [8])], held)
    assert set(constants(merged(made, tmp_path).path)) == {"i", "f", "s"}


def test_outputs_and_inputs_stay(tmp_path):
    made = two(W, W)
    made.graph.output.append(value("b", [8, 8]))
    found = merged(made, tmp_path)
    assert set(constants(found.path)) == {"a", "b"}
    assert "it is an output" in found.report.missed[0].reason

    made = two(W, W)
    made.graph.input.append(value("b", [8, 8]))
    found = merged(made, tmp_path)
    assert set(constants(found.path)) == {"a", "b"}
    assert "callers may override it" in found.report.missed[0].reason
    x, other = weights(2, 8), weights(8, 8, seed=3)
    feeds = {"x": x, "b": other}
    wanted, held = (outputs(p, feeds)[0] for p in (tmp_path / "m.onnx", found.path))
    np.testing.assert_array_equal(wanted, held)


def test_files_where_all_initializers_are_inputs_keep_them(tmp_path):
    """As files had it before IR version 4, of which ONNX Runtime lets nobody override them."""
    made = two(W, W)
    made.ir_version = 3
    made.graph.input.extend([value("a", [8, 8]), value("b", [8, 8])])
    found = merged(made, tmp_path, passes="exact")
    assert not [m for m in found.report.missed if m.stage == "verify"]
    held = onnx.load(found.path)
    assert [v.name for v in held.graph.input] == ["x", "a", "b"] and held.ir_version == 3
    feeds = {"x": weights(2, 8)}
    np.testing.assert_allclose(
        *(outputs(p, feeds)[0] for p in (tmp_path / "m.onnx", found.path)), rtol=1e-6
    )


def test_a_transposed_copy_is_a_transposition(tmp_path):
    large = weights(64, 64)
    nodes = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])]
    held = [tensor(large, "a"), tensor(np.ascontiguousarray(large.T), "b")]
    made = model(nodes, [value("x", ["n", 64])], [value("y", ["n", 64])], held)
    found = merged(made, tmp_path)
    assert operators(found.path) == ["Transpose", "MatMul", "MatMul"]
    assert set(constants(found.path)) == {"a"}
    x = weights(3, 64)
    np.testing.assert_array_equal(
        outputs(tmp_path / "m.onnx", {"x": x})[0], outputs(found.path, {"x": x})[0]
    )


def test_small_and_almost_transposed_copies_stay(tmp_path):
    assert set(constants(merged(two(W, W.T.copy()), tmp_path).path)) == {"a", "b"}
    large = weights(64, 64)
    other = large.T.copy()
    other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
    nodes = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])]
    held = [tensor(large, "a"), tensor(other, "b")]
    made = model(nodes, [value("x", ["n", 64])], [value("y", ["n", 64])], held)
    assert set(constants(merged(made, tmp_path).path)) == {"a", "b"}


def branches(inner, names=("w", "w")):
    """``x + a @ ... `` under a condition, with an initializer in each branch."""
    held = []
    for index, (array, name) in enumerate(zip(inner, names, strict=True)):
        nodes = [node("MatMul", ["x", name], [f"r{index}"])]
        held.append(graph(nodes, [], [value(f"r{index}", [2, 8])], [tensor(array, name)]))
    nodes = [
        node("If", ["c"], ["h"], then_branch=held[0], else_branch=held[1]),
        node("MatMul", ["x", "a"], ["p"]),
        node("Add", ["h", "p"], ["y"]),
    ]
    inputs = [value("x", [2, 8]), value("c", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("y", [2, 8])], [tensor(W, "a")])


def test_initializers_of_subgraphs_are_captured(tmp_path):
    made = branches([W, W], names=("w", "v"))
    found = merged(made, tmp_path)
    held = onnx.load(found.path)
    assert [len(a.g.initializer) for a in held.graph.node[0].attribute] == [0, 0]
    for flag in (True, False):
        feeds = {"x": weights(2, 8, seed=5), "c": np.array(flag)}
        wanted, now = (outputs(p, feeds)[0] for p in (tmp_path / "m.onnx", found.path))
        np.testing.assert_array_equal(wanted, now)


def test_a_name_that_a_subgraph_uses_otherwise_is_not_captured(tmp_path):
    """The outer ``a`` would be hidden by the branch's own ``a``."""
    made = branches([weights(8, 8, seed=9), W], names=("a", "v"))
    found = merged(made, tmp_path)
    assert any("another value named `a`" in m.reason for m in found.report.missed)
    feeds = {"x": weights(2, 8, seed=5), "c": np.array(False)}
    wanted, now = (outputs(p, feeds)[0] for p in (tmp_path / "m.onnx", found.path))
    np.testing.assert_array_equal(wanted, now)


def test_texts_and_four_bits_are_compared_by_value(tmp_path):
    texts = [helper.make_tensor(n, TensorProto.STRING, [2], [b"a", t]) for n, t in
             (("s", b"bc"), ("t", b"bc"), ("u", b"bd"))]  # fmt: skip
    fours = [helper.make_tensor(n, TensorProto.INT4, [4], [1, 2, 3, k]) for n, k in
             (("i", -4), ("j", -4), ("k", 4))]  # fmt: skip
    scale = [tensor(np.array(0.5, np.float32), "scale")]
    nodes = [node("Concat", ["s", "t", "u"], ["y"], axis=0)]
    nodes += [node("DequantizeLinear", [n, "scale"], [f"d{n}"]) for n in "ijk"]
    nodes += [node("Sum", ["di", "dj", "dk", "x"], ["z"])]
    results = [value("y", [6], TensorProto.STRING), value("z", [4])]
    made = model(nodes, [value("x", [4])], results, [*texts, *fours, *scale], opset=21)
    found = merged(made, tmp_path)
    held = {t.name for t in onnx.load(found.path).graph.initializer}
    assert held == {"s", "u", "i", "k", "scale"}


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float16"])
def test_narrow_floats_merge_by_bits(kind, tmp_path):
    import ml_dtypes

    element = getattr(ml_dtypes, kind, None) or np.float16
    array = np.array([1.0, -2.0, 0.0, 0.5]).astype(element)
    other = np.array([1.0, -2.0, -0.0, 0.5]).astype(element)
    held = [tensor(a, n) for n, a in (("a", array), ("b", array.copy()), ("c", other))]
    nodes = [node("Cast", [n], [f"f{n}"], to=FLOAT) for n in "abc"]
    nodes += [node("Sum", ["x", "fa", "fb", "fc"], ["y"])]
    made = model(nodes, [value("x", [4])], [value("y", [4])], held, opset=19)
    found = merged(made, tmp_path)
    assert {t.name for t in onnx.load(found.path).graph.initializer} == {"a", "c"}


def test_constants_without_names_of_their_nodes(tmp_path):
    """Weights as ``Constant`` nodes, unnamed, as some exporters write them."""
    nodes = [
        node("Constant", [], ["a"], value=tensor(W, "")),
        node("MatMul", ["x", "a"], ["p"]),
        node("Constant", [], ["b"], value=tensor(W, "")),
        node("MatMul", ["p", "b"], ["y"]),
    ]
    made = model(nodes, [value("x", [2, 8])], [value("y", [2, 8])])
    assert operators(merged(made, tmp_path).path) == ["Constant", "MatMul", "MatMul"]
