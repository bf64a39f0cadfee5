"""What ONNX Runtime is given instead of operators whose translation it runs slowly."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.kernels.rounded_attention import rounded_attention
from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten


def spelled_for_runtime(program: Program) -> Program:
    """The same program; itself where it has no such operator.

    Attention with grouped heads reads keys and values where they are, group by group: translated,
    they would be repeated and transposed for every call, which for one new token is most of its
    time. Attention on rounded operands is that on operands as they are: kernels of ONNX Runtime's
    CPU provider are in float32.
    """
    twin, target = program.copy(), aten.scaled_dot_product_attention.default
    rounded = twin.graph.find_nodes(op="call_function", target=rounded_attention)
    for node in rounded:
        *given, is_causal, scale, enable_gqa, _ = arguments(node).values()
        node.target, node.args = target, (*given, 0.0, is_causal)
        node.kwargs = {"scale": scale, "enable_gqa": enable_gqa}
    calls = twin.graph.find_nodes(op="call_function", target=target)
    grouped = [node for node in calls if _groups(node) > 1]
    if not (grouped or rounded):
        return program
    for node in grouped:
        made = _attention(node, Builder(twin, node, "spelled", folds=False))
        node.replace_all_uses_with(made, propagate_meta=False)
    twin.graph.eliminate_dead_code()
    twin.lint()
    return twin.recompile()


def _groups(node: fx.Node) -> int:
    """Heads of the query for each head of keys, where there is no more to it than a mask."""
    given = arguments(node)
    if not given["enable_gqa"] or given["is_causal"] or given["dropout_p"]:
        return 1
    query, key = val(given["query"]), val(given["key"])
    mask = given["attn_mask"]
    fits = query.dim() == 4 and (mask is None or (val(mask).dim() == 4 and val(mask).shape[1] == 1))
    return int(query.shape[1] // key.shape[1]) if fits else 1


def _size(node: fx.Node, dim: int, build: Builder) -> object:
    """An extent, read off the tensor where it is no number."""
    extent = val(node).shape[dim]
    return extent if isinstance(extent, int) else build(aten.sym_size.int, node, dim)


def _attention(node: fx.Node, build: Builder) -> fx.Node:
    """``softmax(scale q k^T + mask) v`` with queries ``(B, H, n L, D)`` of H groups of n heads."""
    given = arguments(node)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    heads, count, width = val(key).shape[1], _groups(node), val(query).shape[3]
    batch, rows = (_size(query, dim, build) for dim in (0, 2))
    scale = width**-0.5 if given["scale"] is None else given["scale"]
    scaled = build(aten.mul.Tensor, query, scale)
    together = build(aten.reshape.default, scaled, [batch, heads, -1, width])
    scores = build(aten.matmul.default, together, build(aten.transpose.int, key, 2, 3))
    if mask is not None:
        scores = _masked(scores, mask, batch, heads, count, rows, build)
    weights = build(aten.softmax.int, scores, -1)
    if mask is not None:
        shape = [batch, heads, -1, build(aten.sym_size.int, key, 2)]
        weights = build(aten.reshape.default, weights, shape)
    made = build(aten.matmul.default, weights, given["value"])
    depth = val(given["value"]).shape[3]
    found: fx.Node = build(aten.reshape.default, made, [batch, heads * count, rows, depth])
    return found


def _masked(
    scores: fx.Node,
    mask: fx.Node,
    batch: object,
    heads: int,
    count: int,
    rows: object,
    build: Builder,
) -> fx.Node:
    """Scores ``(B, H, n, L, S)`` plus the mask; what is hidden is the least float32, not NaN.

    Of truth values numbers are made that are added, which attention of all layers shares: choosing
    among the scores takes ONNX Runtime twice as long.
    """
    apart = build(aten.reshape.default, scores, [batch, heads, count, rows, -1])
    wide = build(aten.unsqueeze.default, mask, 1)
    dtype = val(scores).dtype
    if val(mask).dtype == torch.bool:
        wide = build(aten.where.Scalar, wide, 0.0, torch.finfo(dtype).min)
        if val(wide).dtype != dtype:
            wide = build(aten._to_copy.default, wide, dtype=dtype)
    added: fx.Node = build(aten.add.Tensor, apart, wide)
    return added
