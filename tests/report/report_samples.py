"""Reports for tests: a small one with every kind of entry, and transformers of any depth."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from graphopt.report import (
    Applied,
    Certificate,
    FloatWeight,
    MissedRewrite,
    NodeView,
    OutputFidelity,
    PassSummary,
    Quantization,
    QuantizedLayer,
    Report,
    Trade,
)

SOURCE = "/home/user/project/model.py"


def certificate(rule: str = "FuseNorm", **changes: object) -> Certificate:
    values: dict[str, object] = {
        "rule": rule,
        "version": 1,
        "numeric": "reassociated",
        "nodes": ("pow_1", "mean"),
        "source": f"{SOURCE}:12",
        "inputs_hash": hashlib.sha256(rule.encode()).hexdigest(),
        "error": 1.5e-7,
        "max_error": 9e-7,
        "original_error": 2e-7,
        "bound": 4e-7,
        "runs": 2,
    }
    return Certificate(**(values | changes))


def applied(
    rule: str, removed: tuple[str, ...], added: tuple[str, ...], **changes: object
) -> Applied:
    values: dict[str, object] = {
        "pass_name": f"{rule}Pass",
        "rule": rule,
        "removed": removed,
        "added": added,
        "source": f"{SOURCE}:12",
        "certificate": certificate(rule, nodes=removed),
        "speedup": 1.4,
    }
    return Applied(**(values | changes))


def missed(rule: str = "FuseAttention", **changes: object) -> MissedRewrite:
    values: dict[str, object] = {
        "pass_name": "Attention",
        "rule": rule,
        "reason": "the mask is added after `softmax_1`",
        "node": "add_1",
        "source": f"{SOURCE}:40",
        "option": "approximate=True",
        "stage": "check",
    }
    return MissedRewrite(**(values | changes))


def summary(name: str = "Norms", **changes: object) -> PassSummary:
    values: dict[str, object] = {
        "name": name,
        "options": {},
        "matched": 24,
        "kept": 20,
        "slower": 4,
        "rolled_back": 0,
        "nodes_before": 300,
        "nodes_after": 240,
        "seconds": 1.25,
        "verify_seconds": 0.5,
        "bytes_before": 90_000_000,
        "bytes_after": 89_000_000,
    }
    return PassSummary(**(values | changes))


def small_report() -> Report:
    """One of everything, a graph of a dozen nodes included."""
    before, after = small_graphs()
    return Report(
        "Encoder",
        applied=[applied("FuseNorm", ("pow_1", "mean"), ("rms_norm",))],
        missed=[
            missed(),
            missed(reason="the mask is added after `softmax_2`", node="add_2"),
            missed("MergeSiblings", stage="profit", reason="12 us instead of 9 us", option=None),
            missed("FoldScale", stage="verify", reason="error 3e-2 above the bound", node=None),
            missed("FuseGelu", stage="match", reason="the constant is 0.5, not 0.044715"),
        ],
        passes=[summary(options={"chunk": 4}), summary("Attention", rolled_back=1, kept=19)],
        whole=[certificate("whole program", nodes=(), gradient_error=1e-7, gradient_bound=1e-6)],
        verified=True,
        notes=["quality 0.91 before, 0.91 after"],
        environment={"torch": "2.13.0", "device": "cpu"},
        seconds={"capture": 1.5, "optimize": 3.25},
        recipe=[{"pass": "Norms", "chunk": 4}],
        trades=[Trade(400, 0.5), Trade(800, 0.02, 0.9, chosen=True), Trade(900, 0.03, 0.8)],
        quantization=quantization(),
        graph_before=before,
        graph_after=after,
    )


def layer(name: str = "encoder.layer.0.up.weight", **changes: object) -> QuantizedLayer:
    values: dict[str, object] = {
        "names": (name,),
        "node": "quantized_up",
        "operators": ("linear",),
        "shape": (64, 32),
        "dtype": "int",
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "activations": "none",
        "bytes_before": 8192,
        "bytes_after": 1280,
        "error": 0.1,
        "sqnr": 20.0,
        "cosine": 0.995,
        "source": f"{SOURCE}:12",
    }
    return QuantizedLayer(**(values | changes))


def quantization() -> Quantization:
    down = {"bits": 8, "group_size": None, "symmetric": True, "activations": "dynamic"}
    return Quantization(
        layers=(
            layer(note="`up` saw no calibration rows"),
            layer("encoder.layer.1.down.weight", **down, seconds_before=0.002, seconds_after=0.001),
        ),
        floats=(
            FloatWeight(("table",), (100, 32), "float32", 12800, "the model writes `table`", "x=1"),
        ),
        outputs=(
            OutputFidelity("logits", (2, 10), 0.05, 26.0206, 0.9988, 0.0125),
            OutputFidelity("state", (2, 32), 0.0, None, 1.0),
        ),
        inputs="calibration",
        bytes_before=30000,
        bytes_after=16000,
        seconds_before=0.04,
        seconds_after=0.02,
    )


def node(name: str, op: str, inputs: tuple[str, ...], module: str = "", **more: object) -> NodeView:
    values: dict[str, object] = {"shape": "f32[2, 16, 384]", "source": f"{SOURCE}:12"}
    return NodeView(name=name, op=op, inputs=inputs, module=module, **(values | more))


def small_graphs() -> tuple[list[NodeView], list[NodeView]]:
    head = [
        node("x", "input", ()),
        node("weight", "parameter", (), "norm", target="norm.weight"),
    ]
    tail = [node("scaled", "aten.mul.Tensor", ("root", "weight"), "norm")]
    old = [
        node("pow_1", "aten.pow", ("x",), "norm", literals="exponent=2"),
        node("mean", "aten.mean", ("pow_1",), "norm", literals="dim=[-1]"),
        node("root", "aten.rsqrt", ("mean",), "norm"),
    ]
    new = [
        node("rms_norm", "aten.rms_norm", ("x",), "norm", rewritten_by=("FuseNorm",)),
        node("root", "aten.rsqrt", ("rms_norm",), "norm"),
    ]
    rest = [
        node("softmax_1", "aten.softmax", ("scaled",), "attention"),
        node("add_1", "aten.add.Tensor", ("softmax_1", "x"), "attention"),
        node("softmax_2", "aten.softmax", ("add_1",), "attention"),
        node("add_2", "aten.add.Tensor", ("softmax_2", "x"), "attention"),
        node("output", "output", ("add_2",)),
    ]
    return [*head, *old, *tail, *rest], [*head, *new, *tail, *rest]


def deep_report(layers: int, *, odd: int | None = None) -> Report:
    """A transformer of about 41 nodes per layer, 16 of them parameters.

    In layer ``odd`` the attention is left alone.
    """
    report = Report(
        "DeepEncoder",
        verified=True,
        passes=[summary("Attention", matched=layers)],
        whole=[certificate("whole program")],
        environment={"torch": "2.13.0"},
        seconds={"capture": 3.0, "optimize": 9.0},
    )
    for i in range(layers):
        here = f"{SOURCE}:{100 + i % 7}"
        if i == odd:
            row = missed(
                "FuseAttention", reason=f"`matmul_{i}` has another user", node=f"softmax_{i}"
            )
            report.missed.append(row)
        else:
            core = tuple(f"{op}_{i}" for op in ("matmul", "scale", "softmax", "context"))
            report.applied.append(applied("FuseAttention", core, (f"sdpa_{i}",), source=here))
        report.missed.append(missed("FuseGelu", reason=f"`gelu_{i}` is fused", node=f"gelu_{i}"))
    report.graph_before = list(_deep(layers, set()))
    report.graph_after = list(_deep(layers, set(range(layers)) - {odd}))
    return report


def _deep(layers: int, fused: set[int]) -> Iterator[NodeView]:
    yield node("ids", "input", (), shape="i64[2, 16]")
    yield node("mask", "input", (), shape="i64[2, 16]")
    yield node("table", "parameter", (), "embeddings", target="embeddings.table")
    yield node("embedding", "aten.embedding", ("table", "ids"), "embeddings")
    yield node("bias", "aten.where", ("mask",), "", literals="other=-inf")
    before = "embedding"
    for i in range(layers):
        yield from _layer(i, before, i in fused)
        before = f"second_norm_{i}"
    yield node("output", "output", (before,))


def _layer(i: int, x: str, fused: bool) -> Iterator[NodeView]:
    home = f"encoder.layer.{i}"
    attention = f"{home}.attention.self"
    for name in ("query", "key", "value"):
        yield from _linear(f"{name}_{i}", x, f"{attention}.{name}")
        yield node(f"{name}_view_{i}", "aten.view", (f"{name}_{i}",), attention)
        yield node(f"{name}_heads_{i}", "aten.transpose.int", (f"{name}_view_{i}",), attention)
    heads = tuple(f"{name}_heads_{i}" for name in ("query", "key", "value"))
    if fused:
        op = "aten.scaled_dot_product_attention"
        made = ("FuseAttention",)
        yield node(f"sdpa_{i}", op, (*heads, "bias"), attention, rewritten_by=made)
    else:
        yield node(f"matmul_{i}", "aten.matmul", heads[:2], attention)
        yield node(f"scale_{i}", "aten.mul.Tensor", (f"matmul_{i}",), attention)
        yield node(f"softmax_{i}", "aten.softmax.int", (f"scale_{i}", "bias"), attention)
        yield node(f"context_{i}", "aten.matmul", (f"softmax_{i}", heads[2]), attention)
    context = f"sdpa_{i}" if fused else f"context_{i}"
    yield node(f"merge_{i}", "aten.transpose.int", (context,), attention)
    yield node(f"flat_{i}", "aten.view", (f"merge_{i}",), attention)
    yield from _linear(f"project_{i}", f"flat_{i}", f"{home}.attention.output.dense")
    yield from _residual(f"first_norm_{i}", x, f"project_{i}", f"{home}.attention.output")
    yield from _linear(f"up_{i}", f"first_norm_{i}", f"{home}.intermediate.dense")
    yield node(f"gelu_{i}", "aten.gelu", (f"up_{i}",), f"{home}.intermediate.act")
    yield from _linear(f"down_{i}", f"gelu_{i}", f"{home}.output.dense")
    yield from _residual(f"second_norm_{i}", f"first_norm_{i}", f"down_{i}", f"{home}.output")


def _linear(name: str, x: str, module: str) -> Iterator[NodeView]:
    yield from _state(name, module)
    yield node(name, "aten.linear", (x, f"{name}_weight", f"{name}_bias"), module)


def _residual(name: str, x: str, y: str, module: str) -> Iterator[NodeView]:
    yield from _state(name, f"{module}.LayerNorm")
    yield node(f"{name}_sum", "aten.add.Tensor", (y, x), module)
    inputs = (f"{name}_sum", f"{name}_weight", f"{name}_bias")
    yield node(name, "aten.layer_norm", inputs, f"{module}.LayerNorm")


def _state(name: str, module: str) -> Iterator[NodeView]:
    for kind in ("weight", "bias"):
        yield node(f"{name}_{kind}", "parameter", (), module, target=f"{module}.{kind}")
