"""Weights of MatMul and Gemm in few bits: what they share, how they are read, what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from graphs import (
    FLOAT,
    constants,
    graph,
    metadata,
    model,
    node,
    operators,
    outputs,
    save,
    tensor,
    value,
    weights,
)
from onnx import TensorProto

import graphopt
from graphopt.cli import main

WIDTH = 64
STEP = "QuantizeMatmul:bits=8"


def chain(nodes, held, *, shape=("batch", WIDTH), element=FLOAT, opset=18, more=()):
    """``nodes`` from ``x`` to ``h``, and what hides that ``h`` would be a head."""
    last = [node("Relu", ["h"], ["r"]), node("Neg", ["r"], ["y"])]
    inputs = [value("x", list(shape), element), *more]
    return model([*nodes, *last], inputs, [value("y", None, element)], held, opset=opset)


def linear(dtype=np.float32, rows=WIDTH):
    return tensor(weights(WIDTH, rows, dtype=dtype), "layer.weight")


MATMUL = [node("MatMul", ["x", "layer.weight"], ["h"], name="product")]


def quantized(made, tmp_path, steps=(STEP,), **options):
    source = save(made, tmp_path / "m.onnx")
    options = {"measure": False, **options}
    return graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=list(steps), **options)


def error(tmp_path, feed):
    """Relative RMS difference of the two files' first outputs."""
    a, b = (outputs(tmp_path / n, feed)[0].astype(np.float64) for n in ("m.onnx", "o.onnx"))
    assert a.shape == b.shape
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))


def left(found):
    """Reasons by weight."""
    return {row.weights[0]: row.reason for row in found.report.missed if row.weights}


def stored(path):
    return sum(array.nbytes for array in constants(path).values())


def test_a_product_is_stored_in_eight_bits(tmp_path):
    found = quantized(chain(MATMUL, [linear()]), tmp_path)
    assert "MatMul" not in operators(found.path) and stored(found.path) < 0.4 * WIDTH * WIDTH * 4
    assert 0 < error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < 0.02
    row = found.report.quantization.layers[0]
    assert row.names == ("layer.weight",) and row.bits == 8 and row.sqnr > 35 and row.cosine > 0.999
    assert row.bytes_after < row.bytes_before / 3
    proof = found.report.applied[0].certificate
    assert proof.error == row.error < proof.bound and proof.numeric == "lossy"
    assert found.report.applied[0].removed == ("product",)
    whole = found.report.whole[0]
    assert whole.numeric == "lossy" and whole.error < whole.bound < 0.1
    assert json.loads(metadata(found.path)["graphopt"])["recipe"][0]["QuantizeMatmul"]["bits"] == 8


@pytest.mark.parametrize(
    ("step", "most"),
    [
        ("QuantizeMatmul:bits=8,activations=null", 0.02),
        ("QuantizeMatmul:bits=4,group_size=32,activations=null", 0.2),
        ("QuantizeMatmul:bits=4,group_size=32", 0.2),
        ("QuantizeMatmul:bits=3,group_size=32,symmetric=false,activations=null", 0.4),
        ("QuantizeMatmul:bits=2,group_size=16,symmetric=false,activations=null", 0.8),
        ("QuantizeMatmul:bits=4,dtype=nf4,group_size=64,activations=null", 0.2),
        ("QuantizeMatmul:bits=4,group_size=32,symmetric=false,method=hqq,activations=null", 0.2),
    ],
)
def test_formats(step, most, tmp_path):
    found = quantized(chain(MATMUL, [linear()]), tmp_path, [step])
    assert [a.pass_name for a in found.report.applied] == ["QuantizeMatmul"]
    assert "layer.weight" not in constants(found.path)
    assert 0 < error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < most


GEMMS = {
    "plain": {},
    "transB": {"transB": 1},
    "alpha and beta": {"alpha": 0.5, "beta": 3.0},
    "all": {"transB": 1, "alpha": -2.0, "beta": 0.25},
}


@pytest.mark.parametrize("attributes", GEMMS.values(), ids=GEMMS)
@pytest.mark.parametrize("bias", ["constant", "computed", "scalar", "none"])
def test_gemm(attributes, bias, tmp_path):
    held, more = [linear(rows=WIDTH)], []
    names = ["x", "layer.weight"]
    if bias in ("constant", "scalar"):
        held.append(tensor(10 * weights(*((WIDTH,) if bias == "constant" else ())), "bias"))
        names.append("bias")
    elif bias == "computed":
        names.append("c")
        more = [value("c", [WIDTH])]
    made = chain([node("Gemm", names, ["h"], **attributes)], held, more=more)
    found = quantized(made, tmp_path)
    assert "Gemm" not in operators(found.path)
    feed = {"x": weights(7, WIDTH, seed=2)}
    feed |= {"c": 10 * weights(WIDTH, seed=5)} if bias == "computed" else {}
    assert 0 < error(tmp_path, feed) < 0.02


@pytest.mark.parametrize("shape", [("b", 3, WIDTH), (2, "s", 3, WIDTH), (WIDTH,)], ids=str)
def test_inputs_of_other_ranks(shape, tmp_path):
    quantized(chain(MATMUL, [linear()], shape=shape), tmp_path)
    assert "MatMul" not in operators(tmp_path / "o.onnx")
    sizes = [s if isinstance(s, int) else 5 for s in shape]
    assert 0 < error(tmp_path, {"x": weights(*sizes, seed=2)}) < 0.02


@pytest.mark.parametrize("opset", [13, 15, 17, 21, 23])
def test_operator_sets(opset, tmp_path):
    quantized(chain(MATMUL, [linear()], opset=opset), tmp_path)
    assert onnx.load(tmp_path / "o.onnx").opset_import[0].version == opset
    assert 0 < error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < 0.02


def test_older_operator_sets_have_no_form(tmp_path):
    found = quantized(chain(MATMUL, [linear()], opset=11), tmp_path)
    assert not found.report.applied
    assert "operator set 11" in found.report.missed[0].reason


def test_halves_are_cast_around_the_product(tmp_path):
    made = chain(MATMUL, [linear(np.float16)], element=TensorProto.FLOAT16)
    found = quantized(made, tmp_path)
    assert operators(found.path).count("Cast") == 2
    assert 0 < error(tmp_path, {"x": weights(7, WIDTH, seed=2, dtype=np.float16)}) < 0.02


def test_a_weight_that_two_products_read_is_stored_once(tmp_path):
    nodes = [
        node("MatMul", ["x", "layer.weight"], ["a"]),
        node("Tanh", ["a"], ["b"]),
        node("MatMul", ["b", "layer.weight"], ["h"]),
    ]
    found = quantized(chain(nodes, [linear()]), tmp_path)
    assert len(found.report.quantization.layers) == 1
    assert stored(found.path) < 0.4 * WIDTH * WIDTH * 4
    assert 0 < error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < 0.05


def test_a_weight_is_read_by_inputs_of_two_ranks(tmp_path):
    nodes = [
        node("MatMul", ["x", "layer.weight"], ["a"]),
        node("ReduceMax", ["x", "zero"], ["m"], keepdims=0),
        node("Squeeze", ["m", "zero"], ["v"]),
        node("MatMul", ["v", "layer.weight"], ["b"]),
        node("Add", ["a", "b"], ["h"]),
    ]
    made = chain(nodes, [linear(), tensor(np.array([0]), "zero")], shape=(1, "n", WIDTH))
    made.graph.node[1].input[1] = "one"
    made.graph.initializer.append(tensor(np.array([1]), "one"))
    step = "QuantizeMatmul:bits=4,group_size=32,symmetric=false,activations=null"
    found = quantized(made, tmp_path, [step])
    assert len(found.report.quantization.layers) == 1
    assert 0 < error(tmp_path, {"x": weights(1, 7, WIDTH, seed=2)}) < 0.2


def stays(nodes, tmp_path, words, *, held=None, more=(), shape=("batch", WIDTH), steps=(STEP,)):
    """The weight is left alone, for a reason with these words, and the file is as it was."""
    held = [linear()] if held is None else held
    found = quantized(chain(nodes, held, more=more, shape=shape), tmp_path, steps)
    assert words in left(found)["layer.weight"]
    assert not found.report.applied and operators(found.path)[0] != "Slot"
    assert stored(found.path) == sum(onnx.numpy_helper.to_array(t).nbytes for t in held)
    return found


def test_a_weight_that_is_looked_up_too_stays(tmp_path):
    nodes = [
        node("Gather", ["layer.weight", "i"], ["g"]),
        node("MatMul", ["x", "layer.weight"], ["a"]),
        node("Add", ["a", "g"], ["h"]),
    ]
    ids = [value("i", [1], TensorProto.INT64)]
    stays(nodes, tmp_path, "`Gather` reads the weight too", more=ids)


def test_a_weight_that_is_read_in_two_ways_stays(tmp_path):
    nodes = [
        node("MatMul", ["x", "layer.weight"], ["a"]),
        node("Gemm", ["a", "layer.weight"], ["h"], transB=1),
    ]
    stays(nodes, tmp_path, "in different ways")


def test_weights_that_callers_override_stay(tmp_path):
    more = [value("layer.weight", [WIDTH, WIDTH])]
    found = quantized(chain(MATMUL, [linear()], more=more), tmp_path)
    assert not found.report.applied and "MatMul" in operators(found.path)


def test_left_operands_and_batched_weights_stay(tmp_path):
    nodes = [node("MatMul", ["layer.weight", "x"], ["h"])]
    stays(nodes, tmp_path, "left operand", shape=(WIDTH, "batch"))
    cube = [tensor(weights(2, WIDTH, WIDTH), "layer.weight")]
    stays(MATMUL, tmp_path, "3 axes", held=cube, shape=(2, "batch", WIDTH))


def test_odd_numbers_stay(tmp_path):
    array = weights(WIDTH, WIDTH)
    array[1, 1] = np.inf
    stays(MATMUL, tmp_path, "NaN or infinity", held=[tensor(array, "layer.weight")])
    group = ("QuantizeMatmul:bits=4,group_size=48,activations=null",)
    stays(MATMUL, tmp_path, "group", steps=group)
    tiny = [tensor(weights(4, 2), "layer.weight")]
    stays(MATMUL, tmp_path, "few bits save 16 bytes", held=tiny, shape=("batch", 4))


def test_products_in_subgraphs_stay(tmp_path):
    inner = [
        graph([node("MatMul", ["x", "layer.weight"], [n])], [], [value(n, ["batch", WIDTH])])
        for n in ("t", "e")
    ]
    nodes = [node("If", ["f"], ["h"], then_branch=inner[0], else_branch=inner[1])]
    more = [value("f", [], TensorProto.BOOL)]
    stays(nodes, tmp_path, "in a subgraph", more=more)


def test_heads_are_asked_for(tmp_path):
    nodes = [
        node("MatMul", ["x", "layer.weight"], ["a"]),
        node("Add", ["a", "bias"], ["b"]),
        node("Reshape", ["b", "s"], ["y"]),
    ]
    held = [linear(), tensor(weights(WIDTH), "bias"), tensor(np.array([-1]), "s")]
    made = model(nodes, [value("x", ["batch", WIDTH])], [value("y", None)], held)
    found = quantized(made, tmp_path)
    assert not found.report.applied and found.report.missed[0].option == "QuantizeMatmul:head=True"
    found = quantized(made, tmp_path, ["QuantizeMatmul:bits=8,head=true"])
    assert found.report.applied and error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < 0.02


def two_layers():
    nodes = [
        node("MatMul", ["x", "a.weight"], ["p"]),
        node("Relu", ["p"], ["q"]),
        node("MatMul", ["q", "b.weight"], ["h"]),
    ]
    return chain(nodes, [tensor(weights(WIDTH, WIDTH, seed=i), n) for i, n in
                         enumerate(("a.weight", "b.weight"))])  # fmt: skip


def test_skip_and_layers_are_by_name(tmp_path):
    found = quantized(two_layers(), tmp_path, ["QuantizeMatmul:bits=8,skip=b"])
    assert set(left(found)) == {"b.weight"} and "skipped by 'b'" in left(found)["b.weight"]
    step = "QuantizeMatmul:bits=8,activations=null,layers={b.*: {bits: 4, group_size: 32}}"
    rows = quantized(two_layers(), tmp_path, [step]).report.quantization.layers
    assert [(r.names[0], r.bits) for r in rows] == [("a.weight", 8), ("b.weight", 4)]
    rows = quantized(two_layers(), tmp_path, ["QuantizeMatmul:layers={a: float}"])
    assert [r.names[0] for r in rows.report.quantization.layers] == ["b.weight"]
    with pytest.raises(graphopt.GraphoptError, match=r"skip: no weight or module .* 'c'"):
        quantized(two_layers(), tmp_path, ["QuantizeMatmul:bits=8,skip=c"])


def test_a_weight_above_the_tolerance_stays(tmp_path):
    step = "QuantizeMatmul:bits=8,tolerance=0.000001"
    found = quantized(two_layers(), tmp_path, [step])
    assert not found.report.applied
    assert {m.option for m in found.report.missed} == {"QuantizeMatmul:tolerance"}


def test_gptq_learns_from_calibration_inputs(tmp_path):
    few = weights(WIDTH, 8, seed=3) @ weights(8, WIDTH, seed=4) / 8  # inputs of rank 8
    batches = [{"x": weights(32, WIDTH, seed=s) @ few} for s in range(3)]
    usual = "QuantizeMatmul:bits=3,group_size=64,activations=null,tolerance=0.9"
    errors = []
    for method in ("rtn", "gptq"):
        quantized(chain(MATMUL, [linear()]), tmp_path, [f"{usual},method={method}"],
                  inputs={"x": weights(32, WIDTH)}, calibration=batches)  # fmt: skip
        errors.append(error(tmp_path, {"x": weights(32, WIDTH, seed=9) @ few}))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(graphopt.GraphoptError, match="gptq learns from calibration inputs"):
        quantized(chain(MATMUL, [linear()]), tmp_path, [f"{usual},method=gptq"])


REFUSED = [
    "activations=static",
    "method=awq",
    "method=smoothquant",
    "method=rotate",
    "method=outliers",
    "method=lowrank",
    "method=learned",
    "method=gptq+propagate",
    "embeddings=true",
    "method=gptq,importance=norm",
    "'bits=(2,4,8),size=50%'",
    "layers={a: {activations: static}}",
    "sensitivity=hessian",
]


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_a_file_has_nothing_for_are_refused(options, tmp_path):
    text = options.strip("'").replace("bits=(2,4,8)", "bits=[2,4,8]")
    with pytest.raises(graphopt.GraphoptError) as caught:
        quantized(two_layers(), tmp_path, [f"QuantizeMatmul:{text}"])
    assert caught.type.__name__ == "RecipeError"
    assert not (tmp_path / "o.onnx").exists()


def test_presets_quantize_before_they_fuse(tmp_path):
    from graphopt.onnx_files.recipe import resolve_onnx

    for recipe in ("balanced", ["exact", "QuantizeMatmul:bits=4,activations=null"]):
        names = [step.name for step in resolve_onnx(recipe)]
        assert names.index("QuantizeMatmul") == names.index("FuseOperators") - 1
    assert len(resolve_onnx(["balanced", "QuantizeMatmul:bits=4,activations=null"])) == len(
        resolve_onnx("balanced")
    )


def test_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(two_layers(), tmp_path / "m.onnx")
    reports = ("-o", "r.html", "-o", "r.yaml")
    main(["optimize", "m.onnx", "-o", "o.onnx", *reports, "--recipe", "balanced"])
    out = capsys.readouterr().out
    main(["optimize", "m.onnx", "-o", "p.onnx", "--recipe", "r.yaml"])
    assert "2 weights in few bits" in capsys.readouterr().out
    assert "2 weights in few bits" in out and "before" in out
    assert "a.weight" in (tmp_path / "r.html").read_text()
    assert error(tmp_path, {"x": weights(7, WIDTH, seed=2)}) < 0.05


def test_a_weight_that_does_not_verify_in_the_whole_is_taken_back(tmp_path, monkeypatch):
    """What is written in its place is wrong: only the whole shows it."""
    from graphopt.onnx_files import quantize

    right = quantize.place

    def spoils(made, choices):
        right(made, choices)
        for name, held in made.graph.initializers.items():
            if name.startswith("b.weight.") and "scales" in name:
                import onnx_ir

                held.const_value = onnx_ir.tensor(3 * held.const_value.numpy(), name=name)

    monkeypatch.setattr(quantize, "place", spoils)
    found = quantized(two_layers(), tmp_path)
    assert [r.names[0] for r in found.report.quantization.layers] == ["a.weight"]
    failed = [m for m in found.report.missed if m.stage == "verify"]
    assert [m.node for m in failed] == ["b.weight"] and found.report.verified
    with pytest.raises(graphopt.GraphoptError, match="does not verify"):
        quantized(two_layers(), tmp_path, strict=True)
