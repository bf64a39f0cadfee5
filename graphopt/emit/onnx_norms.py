"""RMS norms as one operator of ONNX Runtime, or of the standard, instead of six or seven.

What normalises alone (its scale was folded into the products behind it) gets a scale of ones: the
operators want one. ``SimplifiedLayerNormalization`` is ONNX Runtime's own, though it stands in the
standard's domain there; onnxscript's fusions join it with the addition before it. The standard has
``RMSNormalization`` from operator set 23.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments

STANDARD_FROM = 23
"""The first operator set that has ``RMSNormalization``."""

_RMS_NORM = torch.ops.aten.rms_norm.default
_OWN = "SimplifiedLayerNormalization"
_DTYPES = (torch.float32, torch.float16)

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("onnx_rms_norm(Tensor input, Tensor weight, int axis, float eps) -> Tensor")
NORM = torch.ops.graphopt.onnx_rms_norm.default


def _norm(x: Tensor, _weight: Tensor, _axis: int, _eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_fake("graphopt::onnx_rms_norm", _norm, lib=_library)


def with_norms(program: Program) -> Program:
    """A copy with a node to be translated by `translations` for each RMS norm that has one form.

    Itself where there is none. Such a program is not run.
    """
    twin = program.copy()
    norms = [n for n in twin.graph.find_nodes(op="call_function", target=_RMS_NORM) if _fits(n)]
    if not norms:
        return program
    ones: dict[Any, fx.Node] = {}
    for node in norms:
        given, build = arguments(node), Builder(twin, node, "norm", folds=False)
        weight = given["weight"]
        if weight is None:
            weight = _ones(node, ones, build)
        axis, eps = -len(given["normalized_shape"]), _epsilon(given["eps"])
        made = build(NORM, given["input"], weight, axis, eps)
        node.replace_all_uses_with(made, propagate_meta=False)
        twin.graph.erase_node(node)
    twin.lint()
    return twin.recompile()


def _fits(node: fx.Node) -> bool:
    """Whether ONNX Runtime has a kernel for it: one dtype, sizes of the normalised axes known."""
    given = arguments(node)
    dtype, weight = val(given["input"]).dtype, given["weight"]
    same = weight is None or val(weight).dtype == dtype
    return dtype in _DTYPES and same and all(isinstance(s, int) for s in given["normalized_shape"])


def _ones(node: fx.Node, known: dict[Any, fx.Node], build: Builder) -> fx.Node:
    shape, dtype = tuple(arguments(node)["normalized_shape"]), val(node).dtype
    if (shape, dtype) not in known:
        sizes = "x".join(map(str, shape))
        known[shape, dtype] = build.state(f"ones_{sizes}", torch.ones(shape, dtype=dtype))
    return known[shape, dtype]


def _epsilon(given: float | None) -> float:
    """torch's own where none is given: it computes halves in float32."""
    return torch.finfo(torch.float32).eps if given is None else float(given)


def count(model: Any) -> int:
    """How many norms of an ``onnx_ir`` model are ONNX Runtime's own operator."""
    return sum(n.op_type == _OWN and not n.domain for n in model.graph.all_nodes())


def translations(*, standard: bool) -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` takes as ``custom_translation_table``.

    Args:
        standard: `with_norms` is for operator set `STANDARD_FROM` or later then.
    """

    def norm(input: Any, weight: Any, axis: int, eps: float) -> Any:
        return _operator(standard)(input, weight, axis=axis, epsilon=eps)

    return {NORM: norm}


@cache
def _operator(standard: bool) -> Any:
    """The ONNX operator; onnxscript calls only what has a schema, which ONNX Runtime's has not."""
    from onnxscript import values

    if standard:
        return values.Op(values.Opset("", STANDARD_FROM), "RMSNormalization")
    from onnx.defs import OpSchema

    kinds = [f"tensor({kind})" for kind in ("float", "float16")]
    schema = OpSchema(
        _OWN,
        "",
        1,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("X", "scale")],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", kinds, "")],
        attributes=[
            OpSchema.Attribute("axis", OpSchema.AttrType.INT),
            OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT),
        ],
    )
    return values.Op(values.Opset("", 1), _OWN, schema)
