"""Quantized products of one input as one product: activations are quantized once, and read once.

Rows of a weight are quantized by themselves, so that the rows of several are those of one weight:
nothing is rounded otherwise than it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.emit.onnx_quantized.calls import PRODUCT, quantized_nodes
from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten
_BY_ROWS = ("codes", "scales", "zeros")
_SETTINGS = (
    *("bits", "dtype", "group_size", "symmetric", "activations", "layout"),
    *("input_scale", "input_zero"),
)


def merged_siblings(program: Program) -> Program | None:
    """A copy in which quantized products of one input are one; None where there is none such.

    Siblings have one format and one quantization of activations. Weights that something else reads
    too, and those with a scale for the whole (NVFP4), stay by themselves.
    """
    twin = program.copy()
    groups: dict[Any, list[fx.Node]] = {}
    for node in quantized_nodes(twin):
        if node.target is PRODUCT and _stands_alone(twin, node):
            groups.setdefault(_kind(node), []).append(node)
    found = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in found:
        _merge(twin, nodes)
    if not found:
        return None
    twin.drop_unused_state()
    twin.lint()
    return twin.recompile()


def _stands_alone(program: Program, node: fx.Node) -> bool:
    given = arguments(node)
    held = [given[name] for name in (*_BY_ROWS, "bias") if given[name] is not None]
    constant = all(program.is_constant(n) for n in held)
    return constant and given["tensor_scale"] is None and len(given["codes"].users) == 1


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What products have in common that may become one."""
    given = arguments(node)
    dtypes = (given[name] and val(given[name]).dtype for name in _BY_ROWS)
    settings = (given.get(name) for name in _SETTINGS)
    return (given["input"], val(node).dtype, *dtypes, *settings)


def _merge(program: Program, nodes: Sequence[fx.Node]) -> None:
    build = Builder(program, nodes[0], "merged", folds=False)
    build.on_behalf_of(nodes)
    parts = [arguments(node) for node in nodes]
    name = together([program.target_of(p["codes"]) or p["codes"].name for p in parts])
    given = dict(parts[0])
    for field in _BY_ROWS:
        if given[field] is not None:
            tensors = [program.tensor(part[field]) for part in parts]
            label = f"{name.removesuffix('_codes')}_{field}"
            given[field] = build.state(label, _rows(tensors), [p[field] for p in parts])
    given["bias"] = _bias(program, nodes, name.removesuffix("_codes"), build)
    made = build(PRODUCT, *given.values())
    widths = [val(node).shape[-1] for node in nodes]
    pieces = build(aten.split_with_sizes.default, made, widths, -1)
    items = [build.item(pieces, index) for index in range(len(nodes))]
    for node, item in zip(nodes, items, strict=True):
        node.replace_all_uses_with(item, propagate_meta=False)
        program.graph.erase_node(node)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of all; of what takes a byte as bytes, which torch joins whatever they stand for."""
    dtype = tensors[0].dtype
    plain = [t.view(torch.uint8) if dtype.itemsize == 1 else t for t in tensors]
    return torch.cat([t.detach() for t in plain]).view(dtype)


def _bias(program: Program, nodes: Sequence[fx.Node], name: str, build: Builder) -> fx.Node | None:
    """Biases one after the other, zeros where there is none."""
    given = [arguments(node)["bias"] for node in nodes]
    if all(bias is None for bias in given):
        return None
    dtype = next(val(bias).dtype for bias in given if bias is not None)
    rows = [
        torch.zeros(val(node).shape[-1], dtype=dtype) if bias is None else program.tensor(bias)
        for node, bias in zip(nodes, given, strict=True)
    ]
    held = torch.cat([row.detach().to(dtype) for row in rows])
    return build.state(f"{name}_bias", held, [bias for bias in given if bias is not None])


def together(names: Sequence[str]) -> str:
    """One name for several that differ in the middle: ``a.q.w`` and ``a.k.w`` as ``a.q_k.w``."""
    paths = [name.split(".") for name in names]
    head = _shared(paths)
    rest = [path[len(head) :] for path in paths]
    tail = _shared([path[::-1] for path in rest])[::-1]
    middle = "_".join(".".join(path[: len(path) - len(tail)]) for path in rest)
    return ".".join([*head, *([middle] if middle.strip("_") else []), *tail])


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """What all begin with."""
    level = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in level]
