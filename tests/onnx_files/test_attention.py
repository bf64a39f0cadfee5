"""Attention that is spelled out: every spelling is found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import constants, model, node, operators, outputs, save, value, weights
from onnx import helper
from spelled_attention import HEADS, LOWEST, SIZE, WIDTH, Spelled, feed, same

import graphopt


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
    spelled.floats("graphopt.zero", 7)
    spelled.nodes.append(node("Add", ["x", "graphopt.zero"], ["x7"], name="seven"))
    found = fused(spelled, out=spelled.layer("x7"))
    assert constants(found.path)["graphopt.zero"] == 7
    same(found, feed("row"), tmp_path)


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
