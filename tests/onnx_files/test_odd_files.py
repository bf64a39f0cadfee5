"""Files that are odd in one way: types, names, shapes, sizes, values that are no tensors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import FLOAT, graph, model, node, operators, outputs, save, tensor, value, weights
from onnx import TensorProto, helper, numpy_helper
from test_quantize_files import WIDTH, chain, error, linear

import graphopt
from graphopt.onnx_files import document
from graphopt.onnx_files.values import run


def optimized(made, tmp_path, passes="exact", **options):
    source = save(made, tmp_path / "m.onnx")
    options = {"measure": False, **options}
    return graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=passes, **options)


def both(tmp_path, feed):
    """Outputs of both files, of types that numpy lacks too."""
    files = (document.read_document(tmp_path / name) for name in ("m.onnx", "o.onnx"))
    return [run(document.session_of(file.model), feed) for file in files]


@pytest.mark.parametrize("kind", ["int4", "uint4", "int2", "uint2", "float4_e2m1fn"])
def test_numbers_of_less_than_a_byte_are_packed_and_read_back(kind):
    import ml_dtypes

    from graphopt.onnx_files.values import _packed, _unpacked

    dtype = np.dtype(getattr(ml_dtypes, kind))
    bits = 2 if kind.endswith("2") else 4
    every = np.arange(2**bits, dtype=np.uint8)
    if kind.startswith("int"):
        numbers = np.where(every >= 2 ** (bits - 1), every.astype(int) - 2**bits, every)
        array = numbers.astype(np.int8).astype(dtype)
    else:
        array = every.view(dtype) if kind.startswith("float") else every.astype(dtype)
    array = array[:-1].reshape(1, -1)  # of an odd number
    raw = _packed(array, bits)
    stored = numpy_helper.from_array(array).raw_data  # as onnx packs them
    assert raw == stored
    again = _unpacked(raw, bits, array.shape, dtype)
    np.testing.assert_array_equal(again.astype(float), array.astype(float))


@pytest.mark.parametrize("element", ["BFLOAT16", "FLOAT16", "DOUBLE", "FLOAT8E4M3FN", "UINT4"])
def test_inputs_of_every_width(element, tmp_path):
    """Two identical conversions of an input; what cannot be drawn is given."""
    import ml_dtypes

    code = getattr(TensorProto, element)
    nodes = [
        node("Cast", ["x"], ["a"], to=FLOAT),
        node("Cast", ["x"], ["b"], to=FLOAT),
        node("Add", ["a", "b"], ["s"]),
        node("Cast", ["s"], ["y"], to=code),
    ]
    made = model(nodes, [value("x", ["n"], code)], [value("y", ["n"], code)], opset=21)
    names = {"FLOAT8E4M3FN": "float8_e4m3fn", "UINT4": "uint4"}
    given = None
    if element in names:
        kind = getattr(ml_dtypes, names[element])
        given = {"x": np.array([0, 1, 2, 3, 4]).astype(kind)}
        with pytest.raises(graphopt.GraphoptError, match="cannot draw values"):
            optimized(made, tmp_path)
    found = optimized(made, tmp_path, inputs=given)
    assert operators(found.path) == ["Cast", "Add", "Cast"] and found.report.verified
    if given is not None:
        one, two = both(tmp_path, given)
        np.testing.assert_array_equal(one[0].astype(float), two[0].astype(float))
        np.testing.assert_array_equal(one[0].astype(float), [0, 2, 4, 6, 8])


def test_sequences_optionals_and_texts_are_given_from_python(tmp_path):
    """A sequence of which an element is taken, twice the same way, and a text that goes through."""
    sequence = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    maybe = helper.make_value_info(
        "o", helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [2]))
    )
    nodes = [
        node("SequenceAt", ["s", "zero"], ["a"]),
        node("SequenceAt", ["s", "zero"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("SequenceInsert", ["s", "c"], ["y"]),
        node("OptionalHasElement", ["o"], ["has"]),
        node("Identity", ["t"], ["u"]),
    ]
    results = [
        helper.make_tensor_sequence_value_info("y", FLOAT, None),
        value("has", [], TensorProto.BOOL),
        value("u", [2], TensorProto.STRING),
    ]
    inputs = [sequence, maybe, value("t", [2], TensorProto.STRING)]
    made = model(nodes, inputs, results, [tensor(np.array(0), "zero")])
    given = {"s": [weights(2), weights(3)], "o": None, "t": np.array(["a", "bc"], object)}
    found = optimized(made, tmp_path, inputs=given)
    assert operators(found.path).count("SequenceAt") == 1
    one, two = both(tmp_path, given)
    assert len(one[0]) == 3 and not one[1] and one[2].tolist() == two[2].tolist() == ["a", "bc"]
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(graphopt.GraphoptError, match="needs the input 's'"):
        optimized(made, tmp_path, inputs={"t": given["t"]})


def test_axes_without_names_are_each_their_own(tmp_path):
    nodes = [
        node("Identity", ["x"], ["a"]),
        node("ReduceSum", ["a"], ["b"], keepdims=0),
        node("Add", ["z", "b"], ["y"]),
    ]
    made = model(nodes, [value("x", [None, 3]), value("z", [None])], [value("y", None)])
    found = optimized(made, tmp_path)
    assert found.report.whole[0].runs == 4 and not found.report.notes[:-1]


def test_sizes_that_the_original_refuses_are_told(tmp_path):
    nodes = [node("Identity", ["x"], ["a"]), node("Reshape", ["a", "s"], ["y"])]
    made = model(nodes, [value("x", ["n"])], [value("y", None)], [tensor(np.array([2, 1]), "s")])
    found = optimized(made, tmp_path)
    told = [n for n in found.report.notes if "were not tried" in n]
    assert len(told) == 2 and "sizes not seen before" in told[0] and found.report.verified


def test_a_scan_and_a_loop_capture_what_is_outside(tmp_path):
    """Inner graphs read outer weights that are merged and folded."""
    body = graph(
        [node("Add", ["s", "e"], ["t"]), node("Mul", ["t", "v"], ["u"])],
        [value("s", [4]), value("e", [4])],
        [value("t", [4]), value("u", [4])],
    )
    turn = graph(
        [node("Mul", ["q", "w"], ["r"]), node("Identity", ["c"], ["d"])],
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("q", [4])],
        [value("d", [], TensorProto.BOOL), value("r", [4])],
    )
    nodes = [
        node("Sqrt", ["k"], ["w"]),
        node("Scan", ["start", "x"], ["last", "all"], body=body, num_scan_inputs=1),
        node("Loop", ["n", "yes", "last"], ["z"], body=turn),
        node("Add", ["all", "z"], ["y"]),
    ]
    held = [
        *(tensor(np.array([1, 4, 9, 16], np.float32), name) for name in ("k", "v", "copy")),
        tensor(np.zeros(4, np.float32), "start"),
        tensor(np.array(3), "n"),
        tensor(np.array(True), "yes"),
    ]
    made = model(nodes, [value("x", ["m", 4])], [value("y", ["m", 4])], held)
    found = optimized(made, tmp_path)
    assert "Sqrt" not in operators(found.path)
    x = weights(5, 4)
    one, two = (outputs(tmp_path / name, {"x": x})[0] for name in ("m.onnx", "o.onnx"))
    np.testing.assert_array_equal(one, two)


def test_names_that_new_nodes_would_take(tmp_path):
    """ONNX Runtime loads no file with two nodes of one name."""
    nodes = [
        node("MatMul", ["x", "layer.weight"], ["val_0"], name="node_MatMulNBits_0"),
        node("Add", ["val_0", "val_0"], ["val_1"], name="node_Slot_0"),
        node("Tanh", ["val_1"], ["val_2"], name="node_Mul_1"),
        node("MatMul", ["val_2", "other"], ["h"], name="node_ReduceMax_2"),
    ]
    other = tensor(weights(WIDTH, WIDTH, seed=4), "other")
    for step in ("QuantizeMatmul:bits=4,activations=null,group_size=32", "QuantizeMatmul:bits=8"):
        found = optimized(chain(nodes, [linear(), other]), tmp_path, ["exact", step])
        assert len(found.report.quantization.layers) == 2
        assert error(tmp_path, {"x": weights(3, WIDTH)}) < 0.3


def test_weights_that_are_many_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "EXTERNAL_ABOVE", 1000)
    found = optimized(chain([node("MatMul", ["x", "layer.weight"], ["h"])], [linear()]), tmp_path)
    assert [p.name for p in found.external] == ["o.onnx.data"] and found.path.stat().st_size < 3000
    assert error(tmp_path, {"x": weights(3, WIDTH)}) == 0
    held = onnx.load(found.path, load_external_data=False).graph.initializer[0]
    assert held.data_location == TensorProto.EXTERNAL


def test_sparse_initializers_are_left_as_they_are(tmp_path):
    made = model([node("Identity", ["x"], ["a"]), node("Add", ["a", "w"], ["y"])],
                 [value("x", [4])], [value("y", [4])])  # fmt: skip
    values = tensor(np.array([2.0], np.float32), "w")
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, tensor(np.array([1]), "w_at"), [4])
    )
    found = optimized(made, tmp_path)
    assert operators(found.path) == ["Identity", "Add"]
    assert "sparse initializers" in found.report.missed[0].reason
    held = onnx.load(found.path).graph.sparse_initializer[0]
    assert numpy_helper.to_array(held.values).tolist() == [2.0]


def test_a_file_without_inputs_or_without_weights(tmp_path):
    nodes = [node("Constant", [], ["c"], value_floats=[1.0, 4.0]), node("Sqrt", ["c"], ["y"])]
    found = optimized(model(nodes, [], [value("y", [2])]), tmp_path)
    assert found.report.verified
    np.testing.assert_array_equal(outputs(found.path, {})[0], [1, 2])


def test_a_model_that_is_all_identity(tmp_path):
    made = model([node("Identity", ["x"], ["y"])], [value("x", ["n"])], [value("y", ["n"])])
    found = optimized(made, tmp_path)
    assert operators(found.path) == ["Identity"] and not found.report.applied


def test_operators_that_the_runtime_has_in_the_domain_of_the_standard(tmp_path):
    """An RMS norm, which becomes ``SimplifiedLayerNormalization``: onnx's checker knows none."""
    nodes = [
        node("Pow", ["x", "two"], ["q"]),
        node("ReduceMean", ["q", "last"], ["m"], keepdims=1, noop_with_empty_axes=0),
        node("Add", ["m", "eps"], ["e"]),
        node("Sqrt", ["e"], ["s"]),
        node("Reciprocal", ["s"], ["i"]),
        node("Mul", ["x", "i"], ["n"]),
        node("Mul", ["n", "w"], ["h"]),
        node("Neg", ["h"], ["y"]),
    ]
    held = [
        tensor(np.array([-1]), "last"),
        tensor(np.array(1e-5, np.float32), "eps"),
        tensor(np.array(2.0, np.float32), "two"),
        tensor(weights(16), "w"),
    ]
    made = model(nodes, [value("x", ["b", "s", 16])], [value("y", None)], held)
    found = optimized(made, tmp_path)
    assert "SimplifiedLayerNormalization" in operators(found.path)
    assert 0 <= error(tmp_path, {"x": weights(2, 3, 16)}) < 1e-6


def test_one_value_that_is_two_outputs(tmp_path):
    nodes = [
        node("Neg", ["x"], ["a"]),
        node("Identity", ["a"], ["y"]),
        node("Identity", ["a"], ["z"]),
    ]
    made = model(nodes, [value("x", ["n"])], [value("y", ["n"]), value("z", ["n"])])
    found = optimized(made, tmp_path)
    assert [v.name for v in onnx.load(found.path).graph.output] == ["y", "z"]
    one, two = (outputs(tmp_path / name, {"x": weights(3)}) for name in ("m.onnx", "o.onnx"))
    np.testing.assert_array_equal(one, two)
