"""What ONNX Runtime is given instead of operators whose translation it runs slowly."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten


def spelled_for_runtime(program: Program) -> Program:
    """The same program; itself where it has no such operator.

    Attention with grouped heads reads keys and values where they are, group by group: translated,
    they would be repeated and transposed for every call, which for one new token is most of its
    time. A norm without a scale has one of ones: norms that have one are fused.
    """
    twin = program.copy()
    grouped = [n for n in _calls(twin, aten.scaled_dot_product_attention.default) if _groups(n) > 1]
    bare = [n for n in _calls(twin, aten.rms_norm.default) if arguments(n)["weight"] is None]
    for node in grouped:
        _replace(node, _attention(node, Builder(twin, node, "spelled", folds=False)))
    _give_scales(twin, bare)
    if not grouped and not bare:
        return program
    twin.graph.eliminate_dead_code()
    twin.lint()
    return twin.recompile()


def _calls(program: Program, target: object) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def _groups(node: fx.Node) -> int:
    """Heads of the query for each head of keys, where there is no more to it than a mask."""
    given = arguments(node)
    if not given["enable_gqa"] or given["is_causal"] or given["dropout_p"]:
        return 1
    query, key = val(given["query"]), val(given["key"])
    mask = given["attn_mask"]
    fits = query.dim() == 4 and (mask is None or (val(mask).dim() == 4 and val(mask).shape[1] == 1))
    return int(query.shape[1] // key.shape[1]) if fits else 1


def _replace(node: fx.Node, made: fx.Node) -> None:
    node.replace_all_uses_with(made, propagate_meta=False)


def _attention(node: fx.Node, build: Builder) -> fx.Node:
    """``softmax(scale q k^T + mask) v`` with queries ``(B, H, n L, D)`` of H groups of n heads."""
    given = arguments(node)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    heads, count, width = val(key).shape[1], _groups(node), val(query).shape[3]
    rows = build(aten.sym_size.int, query, 2) if not isinstance(val(query).shape[2], int) else None
    batch = build(aten.sym_size.int, query, 0) if not isinstance(val(query).shape[0], int) else None
    batch = val(query).shape[0] if batch is None else batch
    rows = val(query).shape[2] if rows is None else rows
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
    """Scores ``(B, H, n, L, S)`` plus the mask; what is hidden is the least float32, not NaN."""
    apart = build(aten.reshape.default, scores, [batch, heads, count, rows, -1])
    wide = build(aten.unsqueeze.default, mask, 1)
    if val(mask).dtype != torch.bool:
        found: fx.Node = build(aten.add.Tensor, apart, wide)
        return found
    hidden = build(aten.logical_not.default, wide)
    least = torch.finfo(val(scores).dtype).min
    added: fx.Node = build(aten.masked_fill.Scalar, apart, hidden, least)
    return added


def _give_scales(program: Program, norms: list[fx.Node]) -> None:
    ones: dict[tuple[object, ...], fx.Node] = {}
    for node in norms:
        given = arguments(node)
        kind = (tuple(given["normalized_shape"]), val(node).dtype)
        if kind not in ones:
            build = Builder(program, node, "spelled", folds=False)
            ones[kind] = build.state(
                "ones", torch.ones(given["normalized_shape"], dtype=val(node).dtype)
            )
        node.args = (given["input"], given["normalized_shape"], ones[kind], given["eps"])
