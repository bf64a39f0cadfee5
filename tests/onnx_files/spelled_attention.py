"""Attention in ONNX models, spelled out in the form that options say, and its comparison."""

from __future__ import annotations

import numpy as np
from graphs import model, node, outputs, save, tensor, value, weights
from onnx import TensorProto, helper

HEADS, SIZE, WIDTH = 2, 4, 8
LOWEST = float(np.finfo(np.float32).min)


class Spelled:
    """Attention over projections of ``x`` ``(batch, seq, 8)`` in the form that options say."""

    def __init__(self, **options):
        self.nodes, self.held, self.inputs = [], [], [value("x", ["batch", "seq", WIDTH])]
        self.kind, self.opset = options.get("kind", np.float32), options.get("opset", 18)
        self.options = {"scale": "scores", "key": "swapped", "mask": None, "safe": False} | options
        self.out = None

    def add(self, operator, *given, **attributes):
        name = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(node(operator, list(given), [name], name=name, **attributes))
        return name

    def hold(self, name, array):
        if name not in {t.name for t in self.held}:
            self.held.append(tensor(np.asarray(array), name))
        return name

    def floats(self, name, array):
        return self.hold(name, np.asarray(array).astype(self.kind))

    def heads(self, letter, source="x"):
        """``(B, S, H, D)``."""
        width = HEADS * SIZE
        seed = "qkv".index(letter)
        w = self.floats(f"w{letter}", weights(WIDTH, width, seed=seed))
        flat = self.add("MatMul", source, w)
        shape = self.hold("shape", np.array([0, 0, HEADS, SIZE]))
        return self.add("Reshape", flat, shape)

    def layer(self, source="x"):
        q = self.add("Transpose", self.heads("q", source), perm=[0, 2, 1, 3])
        k = self.turned(self.heads("k", source))
        v = self.add("Transpose", self.heads("v", source), perm=[0, 2, 1, 3])
        scores = self.scaled(q, k)
        weighed = self.weighed(self.masked(scores))
        out = self.add("MatMul", weighed, v)
        back = self.add("Transpose", out, perm=[0, 2, 1, 3])
        shape = self.hold("flat", np.array([0, 0, HEADS * SIZE]))
        return self.add("Reshape", back, shape)

    def turned(self, heads):
        """The key as ``(B, H, D, T)``."""
        if self.options["key"] == "at once":
            return self.add("Transpose", heads, perm=[0, 2, 3, 1])
        k = self.add("Transpose", heads, perm=[0, 2, 1, 3])
        if self.options["key"] == "swapped":
            return self.add("Transpose", k, perm=[0, 1, 3, 2])
        return self.flattened(k) if self.options["key"] == "flattened" else k

    def flattened(self, k):
        """As torch's exporter does it."""
        ends = [self.hold(f"i{n}", np.array([n])) for n in (-1, -2, -9, 2**62)]
        shape = self.add("Shape", k)
        last, rows, first = (
            self.add("Slice", shape, ends[a], ends[b]) for a, b in ((0, 3), (1, 0), (2, 1))
        )
        joined = self.add("Concat", self.hold("i-1", np.array([-1])), rows, last, axis=0)
        flat = self.add("Transpose", self.add("Reshape", k, joined), perm=[0, 2, 1])
        return self.add("Reshape", flat, self.add("Concat", first, last, rows, axis=0))

    def scaled(self, q, k):
        where, root = self.options["scale"], self.floats("root", SIZE**-0.25)
        if where == "operands":
            q, k = self.add("Mul", q, root), self.add("Mul", k, root)
        scores = self.add("MatMul", q, k)
        if where == "scores":
            return self.add("Mul", scores, self.floats("scale", SIZE**-0.5))
        return self.add("Div", scores, self.floats("by", 3.0)) if where == "by" else scores

    def masked(self, scores):
        mask = self.options["mask"]
        if mask is None:
            return scores
        if mask == "added":
            return self.add("Add", scores, self.given("mask", ["batch", 1, "seq", "seq"]))
        if mask == "row":
            return self.add("Add", self.given("mask", ["batch", 1, 1, "seq"]), scores)
        if mask == "causal":
            hidden = np.triu(np.full((1, 1, 5, 5), -np.inf), 1)
            return self.add("Add", scores, self.floats("causal", hidden))
        if mask == "nothing":
            return self.add("Add", scores, self.floats("nothing", np.zeros((1, 1, 1, 1))))
        hidden = self.given("hidden", ["batch", 1, 1, "seq"], TensorProto.BOOL)
        return self.add("Where", hidden, self.floats("fill", self.options["fill"]), scores)

    def given(self, name, shape, kind=TensorProto.FLOAT):
        if name not in {v.name for v in self.inputs}:
            self.inputs.append(value(name, shape, kind))
        return name

    def weighed(self, scores):
        weighed = self.add("Softmax", scores, axis=self.options.get("axis", -1))
        if self.options["safe"]:
            nan = self.add("IsNaN", weighed)
            weighed = self.add("Where", nan, self.floats("zero", 0.0), weighed)
        return weighed

    def saved(self, path, out, *more):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        self.nodes.append(node("Identity", [out], ["y"]))
        ends = [value(n, None, kind) for n in ("y", *more)]
        inputs = [*self.inputs]
        inputs[0] = value("x", ["batch", self.options.get("tokens", "seq"), WIDTH], kind)
        made = model(self.nodes, inputs, ends, self.held, opset=self.opset)
        return save(made, path)


def feed(mask=None, seq=5, batch=3):
    made = {"x": weights(batch, seq, WIDTH, seed=9)}
    if mask in ("added", "row"):
        rows = 1 if mask == "row" else seq
        hidden = np.where(weights(batch, 1, rows, seq, seed=5) > 0.3, LOWEST, 0)
        made["mask"] = hidden.astype(np.float32)
    if mask == "hidden":
        made["hidden"] = weights(batch, 1, 1, seq, seed=5) > 0.5
    return made


def same(found, given, tmp_path):
    old, new = (outputs(tmp_path / name, given) for name in ("m.onnx", "o.onnx"))
    for a, b in zip(old, new, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert found.report.verified
