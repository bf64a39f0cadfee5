"""Attention that is spelled out: every spelling is found, and what only looks like it is left."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import constants, model, node, operators, outputs, save, tensor, value, weights
from onnx import TensorProto, helper

import graphopt
from graphopt.onnx_files import pipeline
from graphopt.verify.timing import Pace

HEADS, SIZE, WIDTH = 2, 4, 8
LOWEST = float(np.finfo(np.float32).min)


def number(name, given, dtype=np.float32):
    return tensor(np.array(given, dtype), name)


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


@pytest.fixture
def fused(tmp_path):
    """Optimizes with attention alone; the report and the file."""

    def run(spelled, *more, out=None, **options):
        out = spelled.layer() if out is None else out
        source = spelled.saved(tmp_path / "m.onnx", out, *more)
        target = tmp_path / "o.onnx"
        given = {"measure": False, "passes": ["FuseAttention"], "strict": True} | options
        return graphopt.optimize_onnx(source, target, **given)

    return run


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


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "operands", "key": "flattened", "safe": True},
        {"scale": "by", "key": "at once"},
        {"scale": None, "mask": "added"},
        {"mask": "row", "safe": True},
        {"mask": "hidden", "fill": LOWEST},
        {"mask": "hidden", "fill": -np.inf, "safe": True},
    ],
)
def test_spellings(fused, tmp_path, options, opset):
    found = fused(Spelled(opset=opset, **options))
    kinds = operators(found.path)
    standard = opset == 23 and not options.get("mask")
    assert kinds.count("Attention" if standard else "MultiHeadAttention") == 1
    gone = {"Softmax", "IsNaN"} | ({"Transpose"} if not options.get("mask") else set())
    assert not gone & set(kinds)
    same(found, feed(options.get("mask")), tmp_path)


def test_all_that_goes_is_named(fused):
    found = fused(Spelled(key="flattened", safe=True))
    (applied,) = found.report.applied
    names = {n.rstrip("0123456789") for n in applied.removed}
    assert names == {"matmul", "mul", "softmax", "isnan", "where", "transpose", "reshape",
                     "shape", "slice", "concat"}  # fmt: skip
    assert applied.certificate.numeric == "reassociated"


def test_what_is_assumed_of_nan_is_said_where_it_differs(fused):
    (safe,) = fused(Spelled(safe=True)).report.applied
    (plain,) = fused(Spelled()).report.applied
    assert "where scores are NaN" in safe.certificate.notes[0]
    assert not any("NaN" in note for note in plain.certificate.notes)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("mask", ["added", "row"])
def test_rows_that_see_nothing_stay_what_they_were(fused, tmp_path, safe, mask):
    """NaN after a plain softmax, zero after a safe one; equal weights under finite numbers."""
    found = fused(Spelled(mask=mask, safe=safe))
    given = feed(mask)
    given["mask"][0] = -np.inf
    given["mask"][1] = LOWEST
    same(found, given, tmp_path)
    nothing = outputs(found.path, given)[0][0]
    assert (nothing == 0).all() if safe else np.isnan(nothing).all()


def test_a_mask_that_adds_nothing_is_dropped(fused, tmp_path):
    found = fused(Spelled(mask="nothing"))
    held = onnx.load(found.path).graph.node
    (attention,) = [n for n in held if n.op_type == "MultiHeadAttention"]
    assert len(attention.input) == 3
    same(found, feed(), tmp_path)


def test_causal_masks_are_added(fused, tmp_path):
    found = fused(Spelled(mask="causal", tokens=5))
    assert "MultiHeadAttention" in operators(found.path)
    same(found, feed(), tmp_path)


def test_layers_share_their_mask(fused, tmp_path):
    spelled = Spelled(mask="row", safe=True)
    found = fused(spelled, out=spelled.layer(spelled.layer()))
    kinds = operators(found.path)
    assert (kinds.count("MultiHeadAttention"), kinds.count("ReduceMax")) == (2, 1)
    same(found, feed("row"), tmp_path)


def test_query_and_key_may_differ_in_tokens_and_values_in_width(fused, tmp_path):
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "v"], ["y"]),
    ]
    shapes = {"q": ["b", 2, "s", 4], "k": ["b", 2, "t", 4], "v": ["b", 2, "t", 6]}
    inputs = [value(n, s) for n, s in shapes.items()]
    made = model(nodes, inputs, [value("y", ["b", 2, "s", 6])])
    source = save(made, tmp_path / "m.onnx")
    found = graphopt.optimize_onnx(
        source, tmp_path / "o.onnx", passes=["FuseAttention"], measure=False, strict=True
    )
    assert "MultiHeadAttention" in operators(found.path)
    given = {"q": weights(3, 2, 5, 4), "k": weights(3, 2, 7, 4), "v": weights(3, 2, 7, 6)}
    same(found, given, tmp_path)


@pytest.mark.parametrize("way", ["Gather", "Slice", "Split"])
def test_query_key_and_value_that_are_transposed_together(fused, tmp_path, way):
    """One product for all three, as timm writes it: no transpose is left."""
    spelled = Spelled()
    w = spelled.floats("w", weights(WIDTH, 3 * HEADS * SIZE))
    five = spelled.hold("five", np.array([0, 0, 3, HEADS, SIZE]))
    whole = spelled.add("Reshape", spelled.add("MatMul", "x", w), five)
    turned = spelled.add("Transpose", whole, perm=[2, 0, 3, 1, 4])
    zero = spelled.hold("first", np.array([0]))
    if way == "Split":
        parts = ["p0", "p1", "p2"]
        ones = spelled.hold("ones", np.ones(3, np.int64))
        spelled.nodes.append(node("Split", [turned, ones], parts, name="split"))
        q, k, v = (spelled.add("Squeeze", p, zero) for p in parts)
    elif way == "Slice":
        at = [spelled.hold(f"at{n}", np.array([n])) for n in range(4)]
        cut = [spelled.add("Slice", turned, at[n], at[n + 1], zero) for n in range(3)]
        q, k, v = (spelled.add("Squeeze", p, zero) for p in cut)
    else:
        q, k, v = (
            spelled.add("Gather", turned, spelled.hold(f"at{n}", np.array(n))) for n in range(3)
        )
    scores = spelled.scaled(q, spelled.add("Transpose", k, perm=[0, 1, 3, 2]))
    out = spelled.add("MatMul", spelled.weighed(scores), v)
    found = fused(spelled, out=spelled.add("Transpose", out, perm=[0, 2, 1, 3]))
    kinds = operators(found.path)
    assert "MultiHeadAttention" in kinds and "Transpose" not in kinds
    same(found, feed(), tmp_path)


def test_attention_of_the_standard_reads_three_axes(fused, tmp_path):
    spelled = Spelled(opset=23)
    q, k, v = (spelled.add("Transpose", spelled.heads(c), perm=[0, 2, 1, 3]) for c in "qkv")
    mask = spelled.given("mask", ["batch", 1, "seq", "seq"])
    out = spelled.add("Attention", q, k, v, mask, scale=0.3)
    found = fused(spelled, out=spelled.add("Transpose", out, perm=[0, 2, 1, 3]))
    assert "Transpose" not in operators(found.path)
    (made,) = [n for n in onnx.load(found.path).graph.node if n.op_type == "Attention"]
    given = {a.name: helper.get_attribute_value(a) for a in made.attribute}
    assert given == {"q_num_heads": 2, "kv_num_heads": 2, "scale": pytest.approx(0.3)}
    same(found, feed("added"), tmp_path)


def test_a_product_that_is_an_output_keeps_its_name(fused, tmp_path):
    spelled = Spelled()
    out = spelled.layer()
    product = [n for n in spelled.nodes if n.op_type == "MatMul"][-1].output[0]
    found = fused(spelled, product, out=out)
    assert [o.name for o in onnx.load(found.path).graph.output] == ["y", product]
    assert "MultiHeadAttention" in operators(found.path)
    same(found, feed(), tmp_path)


def test_constants_of_an_earlier_run_are_read_again(fused, tmp_path):
    """A file that graphopt wrote, with attention added behind, and one that took its names."""
    spelled = Spelled(mask="row", safe=True)
    spelled.held.append(number("graphopt.zero", 7))
    spelled.nodes.append(node("Add", ["x", "graphopt.zero"], ["x7"], name="seven"))
    found = fused(spelled, out=spelled.layer("x7"))
    assert constants(found.path)["graphopt.zero"] == 7
    same(found, feed("row"), tmp_path)


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


def test_grouped_heads_that_are_repeated_are_heads(fused, tmp_path):
    spelled = Spelled()
    turned = spelled.turned

    def repeated(heads):
        one = spelled.add("Gather", heads, spelled.hold("head", np.array([0])), axis=2)
        shape = spelled.hold("twice", np.array([1, 1, HEADS, 1]))
        return turned(spelled.add("Expand", one, shape))

    spelled.turned = repeated
    found = fused(spelled)
    assert "MultiHeadAttention" in operators(found.path)
    same(found, feed(), tmp_path)


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


def test_torch_exports(tmp_path):
    """A mask, the scale on both sides and safe weights, as torch's exporter writes them."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "qkv")

        def forward(self, x, mask):
            q, k, v = (p(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in self.projections)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)

    given = (torch.randn(3, 5, WIDTH), torch.rand(3, 1, 1, 5) > 0.3)
    dims = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s")},) * 2
    dims = (dims[0], {0: dims[0][0], 3: dims[0][1]})
    torch.onnx.export(
        Layer().eval(), given, tmp_path / "m.onnx", dynamo=True, verbose=False, opset_version=18,
        input_names=["x", "mask"], dynamic_shapes=dims, external_data=False,
    )  # fmt: skip
    assert {"IsNaN", "Softmax"} <= set(operators(tmp_path / "m.onnx"))
    found = graphopt.optimize_onnx(tmp_path / "m.onnx", tmp_path / "o.onnx", measure=False)
    assert not {"IsNaN", "Softmax"} & set(operators(found.path))
    hidden = given[1].numpy().copy()
    hidden[0] = False
    same(found, {"x": given[0].numpy(), "mask": hidden}, tmp_path)
