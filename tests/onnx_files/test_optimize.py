"""The whole way: fusions, verification, rollback, metadata, external data, the verb."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir
import pytest
from graphs import (
    constants,
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
from onnx import TensorProto, helper

import graphopt
from graphopt.onnx_files import fuse, recipe
from graphopt.onnx_files.merge import MergeInitializers
from graphopt.onnx_files.steps import Change, OnnxPass, Outcome


def gelu(width=16, *, opset=18, functions=(), domains=(), activation=None):
    """Two layers with a GELU spelled by ``Erf`` between them, and a weight that is stored twice."""
    spelled = [
        node("Div", ["b", "root"], ["d"], name="div"),
        node("Erf", ["d"], ["e"], name="erf"),
        node("Add", ["e", "one"], ["f"], name="plus"),
        node("Mul", ["b", "f"], ["g"], name="times"),
        node("Mul", ["g", "half"], ["h"], name="halved"),
    ]
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="first"),
        node("Add", ["a", "bias"], ["b"], name="biased"),
        *(activation or spelled),
        node("MatMul", ["h", "v"], ["y"], name="second"),
    ]
    held = [
        *(tensor(weights(width, width), name) for name in ("w", "v")),
        tensor(weights(width, seed=1), "bias"),
        *(
            tensor(np.array(n, np.float32), name)
            for name, n in (("root", 2**0.5), ("one", 1), ("half", 0.5))
        ),
    ]
    made = model(
        nodes,
        [value("x", ["batch", width])],
        [value("y", ["batch", width])],
        held,
        opset=opset,
        functions=functions,
        domains=domains,
    )
    helper.set_model_props(made, {"author": "somebody"})
    made.producer_name, made.doc_string = "tests", "a perceptron"
    return made


BESIDE = {"save_as_external_data": True, "location": "m.bin", "size_threshold": 64}


@pytest.fixture
def source(tmp_path):
    return save(gelu(), tmp_path / "m.onnx")


def test_fusions_and_merged_weights_are_verified_and_written(source, tmp_path):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx")
    assert "BiasGelu" in operators(found.path) or any(
        m.stage == "profit" and "BiasGelu" in m.rule for m in found.report.missed
    )
    assert found.report.verified and set(constants(found.path)) & {"w", "v"} == {"w"}
    assert found.seconds is not None and min(found.seconds) > 0
    whole = found.report.whole[0]
    assert whole.rule == "whole file" and whole.runs >= 4 and whole.error <= whole.bound
    x = weights(5, 16, seed=4)
    np.testing.assert_allclose(
        outputs(source, {"x": x})[0], outputs(found.path, {"x": x})[0], atol=1e-5
    )


def test_fused_operators_name_what_they_replace(source, tmp_path):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", measure=False)
    fused = next(a for a in found.report.applied if a.rule == "fuse BiasGelu")
    assert set(fused.removed) == {"biased", "div", "erf", "plus", "times", "halved"}
    assert fused.certificate.numeric == "reassociated"
    assert operators(found.path) == ["MatMul", "BiasGelu", "MatMul"]


def test_fusions_leave_overridable_initializers_inputs(tmp_path):
    made = gelu()
    made.graph.input.append(value("bias", [16]))
    found = graphopt.optimize_onnx(
        save(made, tmp_path / "m.onnx"), tmp_path / "o.onnx", measure=False
    )
    assert "BiasGelu" in operators(found.path) and "bias" in constants(found.path)
    assert [v.name for v in onnx.load(found.path).graph.input] == ["x", "bias"]
    feed = {"x": weights(2, 16), "bias": weights(16, seed=7)}
    one, two = (outputs(tmp_path / name, feed)[0] for name in ("m.onnx", "o.onnx"))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_criterion_is_against_float64_where_that_runs(source, tmp_path, nudged):
    """ONNX Runtime has no ``Erf`` in float64; onnx's reference implementation has."""
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Nudged"], measure=False)
    proof = found.report.whole[0]
    assert 0 < proof.original_error < proof.error < proof.bound and not proof.notes


def test_where_there_is_no_float64_the_certificate_says_so(tmp_path, nudged):
    nodes = [node("ConvTranspose", ["x", "w"], ["y"])]
    held = [tensor(weights(2, 3, 3, 3), "w")]
    made = model(nodes, [value("x", [1, 2, 8, 8])], [value("y", None)], held)
    source = save(made, tmp_path / "m.onnx")
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Nudged"])
    proof = found.report.whole[0]
    assert "no float64 run" in proof.notes[0] and "ConvTranspose" in proof.notes[1]
    assert 0 < proof.error < proof.bound == 2e-5 and proof.original_error == 0


def test_a_float64_run_of_something_else_is_no_reference(source, tmp_path, nudged, monkeypatch):
    """It would make the original's own error large, and with it what is allowed."""
    from graphopt.onnx_files import examine

    def other(model):
        runs, lacking = examine_widened(model)
        return lambda feed: [1.01 * v for v in runs(feed)], lacking

    examine_widened = examine.widened
    monkeypatch.setattr(examine, "widened", other)
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Nudged"], measure=False)
    proof = found.report.whole[0]
    assert "does not give what the original gives" in proof.notes[1]
    assert proof.bound == 2e-5


def test_metadata_is_kept_and_more_is_added(source, tmp_path):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", measure=False)
    held, made = metadata(found.path), onnx.load(found.path)
    assert held["author"] == "somebody"
    assert (made.producer_name, made.doc_string) == ("tests", "a perceptron")
    facts = json.loads(held["graphopt"])
    assert facts["recipe"] == found.report.recipe and facts["certificates"]
    assert facts["source"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_bytes_are_the_same_in_every_process(source, tmp_path):
    graphopt.optimize_onnx(source, tmp_path / "a.onnx", measure=False)
    code = "import graphopt; graphopt.optimize_onnx('m.onnx', 'b.onnx', measure=False)"
    environment = {**os.environ, "PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_functions_of_the_model_are_inlined_for_fusions_only(tmp_path):
    body = [node("Mul", ["b", "b"], ["c"]), node("Tanh", ["c"], ["h"])]
    function = helper.make_function("own", "Act", ["b"], ["h"], body, [helper.make_opsetid("", 18)])
    activation = [node("Act", ["b"], ["h"], domain="own")]
    made = gelu(activation=activation, functions=[function], domains=["own"])
    found = graphopt.optimize_onnx(save(made, tmp_path / "m.onnx"), tmp_path / "o.onnx")
    assert "Act" in operators(found.path) and found.report.verified


class Wrong(OnnxPass):
    """Doubles some weights, which is wrong; renames a node, which is not."""

    wrong = ("w", "bias")

    def apply(self, model, around, allowed):
        changes = []
        for name in (*self.wrong, "one"):
            if allowed(name):
                held = model.graph.initializers[name]
                array = held.const_value.numpy() * (2 if name in self.wrong else 1)
                held.const_value = onnx_ir.tensor(array, name=name)
                changes.append(Change(name, f"touch {name}", (name,)))
        return Outcome(changes)


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setitem(recipe.OWN, "Wrong", Wrong)


class Nudged(OnnxPass):
    """Adds to a weight what is less than the rounding of the product."""

    def apply(self, model, around, allowed):
        held = model.graph.initializers["w"]
        held.const_value = onnx_ir.tensor(held.const_value.numpy() * np.float32(1 + 1e-6), name="w")
        return Outcome([Change("w", "nudge", ("w",))])


@pytest.fixture
def nudged(monkeypatch):
    monkeypatch.setitem(recipe.OWN, "Nudged", Nudged)


def test_what_fails_is_taken_back_by_name_and_the_rest_kept(source, tmp_path, wrong):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Wrong"], measure=False)
    assert [a.rule for a in found.report.applied] == ["touch one"]
    failed = {m.rule: m for m in found.report.missed}
    assert set(failed) == {"touch w", "touch bias"} and failed["touch w"].stage == "verify"
    assert "the output 'y' is another one" in failed["touch w"].reason
    assert found.report.passes[0].rolled_back == 2 and found.report.verified


def test_strict_raises_and_writes_nothing(source, tmp_path, wrong):
    with pytest.raises(graphopt.GraphoptError, match=r"Wrong .* does not verify"):
        graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes=["Wrong"], strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_differs_from_what_was_examined_is_not_written(source, tmp_path, monkeypatch):
    """What is compared at last is the file as it lies on disk."""
    import graphopt.onnx_files.optimize as module

    def spoiled(model, path, *, external):
        twin = gelu()
        twin.graph.node[0].op_type = "Sub"
        save(twin, path)

    monkeypatch.setattr(module, "write_model", spoiled)
    with pytest.raises(graphopt.GraphoptError, match="the optimized file is not the original"):
        graphopt.optimize_onnx(source, tmp_path / "o.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_fusion_that_is_wrong_is_named_and_the_others_stay(tmp_path, monkeypatch):
    """Nodes of the kind that fails are hidden from the rewriter when it runs again."""
    right = fuse._fuse

    def spoils(model, hides):
        right(model, hides)
        for found in model.graph.all_nodes():
            if found.op_type == "BiasGelu":
                given = found.inputs[1]
                given.const_value = onnx_ir.tensor(given.const_value.numpy() + 1, name=given.name)

    monkeypatch.setattr(fuse, "_fuse", spoils)
    made = gelu()
    made.graph.node.append(node("Transpose", ["y"], ["t"], perm=[1, 0]))
    made.graph.node.append(node("MatMul", ["y", "t"], ["z"]))
    made.graph.output.append(value("z", ["batch", "batch"]))
    source = save(made, tmp_path / "m.onnx")
    found = graphopt.optimize_onnx(
        source, tmp_path / "o.onnx", passes=["FuseOperators"], measure=False
    )
    assert "BiasGelu" not in operators(found.path) and "FusedMatMul" in operators(found.path)
    failed = [m.rule for m in found.report.missed if m.stage == "verify"]
    assert "fuse BiasGelu" in failed and "fuse FusedMatMul" not in failed


def test_external_data_stays_outside(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    onnx.save(gelu(64), folder / "m.onnx", **BESIDE)
    found = graphopt.optimize_onnx(folder / "m.onnx", tmp_path / "o.onnx", measure=False)
    assert found.external == (tmp_path / "o.onnx.data",)
    assert (tmp_path / "o.onnx").stat().st_size < 4000 + 64 * 64
    x = weights(3, 64)
    np.testing.assert_allclose(
        outputs(folder / "m.onnx", {"x": x})[0], outputs(found.path, {"x": x})[0], atol=1e-4
    )
    (tmp_path / "o.onnx").rename(tmp_path / "p.onnx")
    with pytest.raises(graphopt.GraphoptError, match="would overwrite that of the original"):
        graphopt.optimize_onnx(tmp_path / "p.onnx", tmp_path / "o.onnx")


def test_external_data_outside_of_the_folder_is_refused(tmp_path):
    onnx.save(
        gelu(64),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.bin",
        size_threshold=64,
    )
    made = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    made.graph.initializer[0].external_data[0].value = "../m.bin"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(graphopt.GraphoptError, match="not a path below the model's folder"):
        graphopt.optimize_onnx(tmp_path / "m.onnx", tmp_path / "o.onnx")


def test_types_that_cannot_be_drawn_must_be_given(tmp_path):
    nodes = [node("StringNormalizer", ["x"], ["h"]), node("Identity", ["h"], ["i"])]
    nodes.append(node("Identity", ["i"], ["y"]))
    made = model(
        nodes, [value("x", [2], TensorProto.STRING)], [value("y", None, TensorProto.STRING)]
    )
    source = save(made, tmp_path / "m.onnx")
    with pytest.raises(graphopt.GraphoptError, match="cannot draw values"):
        graphopt.optimize_onnx(source, tmp_path / "o.onnx")


def test_what_rewriting_would_lose_is_left_alone(source, tmp_path):
    made = onnx.load(source)
    info = made.training_info.add()
    info.algorithm.CopyFrom(
        helper.make_graph([], "t", [], [value("q", [1])], [tensor(weights(1), "q")])
    )
    found = graphopt.optimize_onnx(save(made, tmp_path / "t.onnx"), tmp_path / "o.onnx")
    assert not found.report.applied
    assert all("how to train it" in m.reason for m in found.report.missed) and found.report.missed
    held = onnx.load(found.path)
    assert held.graph == made.graph and len(held.training_info) == 1


def test_float64_norms_of_sums_come_through(tmp_path):
    nodes = [
        node("Add", ["x", "x"], ["s"]),
        node("LayerNormalization", ["s", "scale", "bias"], ["y"], axis=-1),
    ]
    held = [tensor(weights(16, dtype=np.float64), n) for n in ("scale", "bias")]
    kinds = [value(n, [2, 3, 16], TensorProto.DOUBLE) for n in ("x", "y")]
    made = model(nodes, kinds[:1], kinds[1:], held)
    found = graphopt.optimize_onnx(save(made, tmp_path / "m.onnx"), tmp_path / "o.onnx")
    assert found.report.verified


def test_passes_are_listed_in_a_preset(tmp_path):
    from graphopt.onnx_files.recipe import resolve_onnx

    assert resolve_onnx("none") == []
    assert MergeInitializers in {type(step) for step in resolve_onnx("exact")}
    assert resolve_onnx(["exact", "MergeInitializers"]) == resolve_onnx("exact")
