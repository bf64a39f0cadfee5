"""What is wrong on some inputs only is found: other sizes and values, overridden initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from graphs import model, node, operators, save, tensor, value, weights
from onnx import TensorProto

import graphopt
from graphopt.onnx_files import recipe
from graphopt.onnx_files.steps import Change, OnnxPass, Outcome


def tried(made, tmp_path, monkeypatch, change, **options):
    """A pass that changes a model by a function; what became of its only rewrite."""

    class Touch(OnnxPass):
        def apply(self, model, around, allowed):
            if not allowed("touch"):
                return Outcome()
            change(model)
            return Outcome([Change("touch", "touch")])

    monkeypatch.setitem(recipe.OWN, "Touch", Touch)
    source = save(made, tmp_path / "m.onnx")
    options = {"measure": False, **options}
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Touch"], **options)
    assert found.report.verified
    failed = [m.reason for m in found.report.missed if m.stage == "verify"]
    return failed[0] if failed else ""


def set_constant(name, array):
    def change(made):
        made.graph.initializers[name].const_value = onnx_ir.tensor(array, name=name)

    return change


def reshaped(size=-1):
    nodes = [node("Reshape", ["x", "s"], ["h"]), node("Relu", ["h"], ["y"])]
    held = [tensor(np.array([size]), "s")]
    return model(nodes, [value("x", ["n", 3])], [value("y", None)], held)


def test_a_size_that_became_fixed(tmp_path, monkeypatch):
    """Right for the two rows that are drawn first, and for no others."""
    reason = tried(reshaped(), tmp_path, monkeypatch, set_constant("s", np.array([6])))
    assert "ONNX Runtime does not run it on sizes not seen before" in reason


def test_a_size_of_one_that_broadcasts(tmp_path, monkeypatch):
    """``x + x[:1]`` for ``x + x``: the same for one row alone."""
    nodes = [node("Add", ["x", "x"], ["a"]), node("Neg", ["a"], ["y"])]
    made = model(nodes, [value("x", ["n", 3])], [value("y", ["n", 3])])

    def change(made):
        first = made.graph.node(0)
        first.op_type = "Sum"
        first.resize_inputs(1)

    reason = tried(made, tmp_path, monkeypatch, change, inputs={"x": np.zeros((1, 3), np.float32)})
    assert "'y' is another one on fresh values" in reason


def test_an_initializer_that_was_taken_for_a_constant(tmp_path, monkeypatch):
    nodes = [node("Add", ["x", "w"], ["a"]), node("Neg", ["a"], ["y"])]
    made = model(nodes, [value("x", [3])], [value("y", [3])], [tensor(weights(3), "w")])
    made.graph.input.append(value("w", [3]))

    def change(made):
        held = onnx_ir.tensor(weights(3), name="fixed")
        fixed = onnx_ir.Value(
            name="fixed",
            shape=held.shape,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            const_value=held,
        )
        made.graph.register_initializer(fixed)
        made.graph.node(0).replace_input_with(1, fixed)

    reason = tried(made, tmp_path, monkeypatch, change)
    assert "on initializers overridden" in reason


def test_what_is_wrong_on_calibration_inputs_alone(tmp_path, monkeypatch):
    """``clip(x, -50, 50)`` for ``x``: drawn values are smaller."""
    nodes = [node("Clip", ["x", "low", "high"], ["a"]), node("Neg", ["a"], ["y"])]
    held = [tensor(np.array(n, np.float32), s) for n, s in ((-1e9, "low"), (1e9, "high"))]
    made = model(nodes, [value("x", ["n"])], [value("y", ["n"])], held)
    change = set_constant("high", np.array(50, np.float32))
    assert not tried(made, tmp_path, monkeypatch, change)
    far = [{"x": np.array([100, -1], np.float32)}]
    assert "on calibration inputs" in tried(made, tmp_path, monkeypatch, change, calibration=far)


def test_integers_texts_and_types_are_equal(tmp_path, monkeypatch):
    nodes = [node("Add", ["i", "k"], ["y"]), node("Concat", ["t", "t"], ["z"], axis=0)]
    texts = [onnx_text("t", b"a")]
    made = model(
        nodes,
        [value("i", ["n"], TensorProto.INT64)],
        [value("y", ["n"], TensorProto.INT64), value("z", [2], TensorProto.STRING)],
        [tensor(np.array(1), "k"), *texts],
    )
    reason = tried(made, tmp_path, monkeypatch, set_constant("k", np.array(2)))
    assert "'y'" in reason and "100.0% of its values differ" in reason

    def other_text(made):
        made.graph.initializers["t"].const_value = onnx_ir.StringTensor(
            np.array([b"b"], object), name="t"
        )

    assert "'z'" in tried(made, tmp_path, monkeypatch, other_text)


def onnx_text(name, text):
    from onnx import helper

    return helper.make_tensor(name, TensorProto.STRING, [1], [text])


def test_nan_where_there_was_none(tmp_path, monkeypatch):
    nodes = [node("Mul", ["x", "w"], ["a"]), node("Neg", ["a"], ["y"])]
    made = model(nodes, [value("x", [64])], [value("y", [64])], [tensor(weights(64), "w")])
    array = weights(64)
    array[7] = np.nan
    reason = tried(made, tmp_path, monkeypatch, set_constant("w", array))
    assert "infinities or NaN in other places" in reason


def test_one_element_that_is_off(tmp_path, monkeypatch):
    nodes = [node("Mul", ["x", "w"], ["a"]), node("Neg", ["a"], ["y"])]
    made = model(nodes, [value("x", [10000])], [value("y", [10000])], [tensor(weights(10000), "w")])
    array = weights(10000)
    array[7] *= 1.01
    assert "another one" in tried(made, tmp_path, monkeypatch, set_constant("w", array))


def test_outputs_that_change_their_names_or_types(tmp_path, monkeypatch):
    def renamed(made):
        made.graph.outputs[0].name = "z"

    assert "its inputs or outputs are others" in tried(reshaped(), tmp_path, monkeypatch, renamed)


def test_half_precision_is_held_to_float64(tmp_path, monkeypatch):
    """A weight off by half a percent, which is within 1e-2, and one off by five percent."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Neg", ["a"], ["y"])]
    kinds = [value(n, ["n", 16], TensorProto.FLOAT16) for n in ("x", "y")]
    array = weights(16, 16, dtype=np.float16)
    made = model(nodes, kinds[:1], kinds[1:], [tensor(array, "w")])
    near, far = ((array.astype(np.float32) * f).astype(np.float16) for f in (1.005, 1.05))
    assert not tried(made, tmp_path, monkeypatch, set_constant("w", near))
    assert "another one" in tried(made, tmp_path, monkeypatch, set_constant("w", far))


class Slow(OnnxPass):
    """A pass that is timed, and makes the product a hundred times more."""

    timed = True

    def apply(self, model, around, allowed):
        first = model.graph.node(0)
        last = list(model.graph)[-1]
        made, total = [], last.inputs[0]
        for _ in range(100):
            again = onnx_ir.node("MatMul", list(first.inputs))
            most = onnx_ir.node("Max", [total, again.outputs[0]])
            made, total = [*made, again, most], most.outputs[0]
        model.graph.insert_before(last, made)
        last.replace_input_with(0, total)
        return Outcome([Change("slow", "slow down")])


class Rescued(Slow):
    """The same, with another form that makes it once."""

    factor = 1

    def alternative(self, model):
        twin = model.clone()
        nodes = list(twin.graph)
        nodes[-1].replace_input_with(0, nodes[0].outputs[0])
        for found in reversed(nodes[1:-1]):
            twin.graph.remove(found, safe=True)
        nodes[-1].op_type = "Neg" if self.factor == 1 else "Abs"
        return twin


class Spoiled(Rescued):
    """The same, with another form that is wrong."""

    factor = 2


@pytest.mark.parametrize(
    ("kind", "measure", "kept"),
    [(Slow, True, False), (Slow, False, True), (Rescued, True, True), (Spoiled, True, False)],
)
def test_a_slower_file_is_not_kept(kind, measure, kept, tmp_path, monkeypatch):
    """Unless another form of it pays, and is right."""
    monkeypatch.setitem(recipe.OWN, "Slow", kind)
    nodes = [
        *(node("MatMul", ["x", "x"], ["a"]), node("MatMul", ["x", "x"], ["b"])),
        *(node("Max", ["a", "b"], ["m"]), node("Neg", ["m"], ["y"])),
    ]
    made = model(nodes, [value("x", [256, 256])], [value("y", [256, 256])])
    source = save(made, tmp_path / "m.onnx")
    monkeypatch.setattr("onnxruntime.SessionOptions", _plain_options)
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Slow"], measure=measure)
    assert bool(found.report.applied) is kept
    if not kept:
        assert found.report.missed[0].stage == "profit"
        assert "the file is slower with it" in found.report.missed[0].reason
    if kind is Rescued:
        assert operators(found.path) == ["MatMul", "Neg"]


def _plain_options():
    """ONNX Runtime would compute the same product once."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    options = state.SessionOptions()
    options.graph_optimization_level = state.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
