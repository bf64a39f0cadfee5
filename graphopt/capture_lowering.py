"""The last step to the dialect, done in place where a trace needs little of it.

A trace without in-place writes differs from the dialect in a few operators that torch always takes
apart. Rewriting those nodes takes milliseconds, where `ExportedProgram.run_decompositions` traces
the whole graph twice more. A graph that needs anything else is left to torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import is_mutating, val

aten = torch.ops.aten
# The schema spells its default, the contiguous format, as 0.
_PLAIN_FORMATS = (None, 0, torch.preserve_format, torch.contiguous_format)
Lowering = Callable[[fx.Graph, fx.Node], Any]


def lower_in_place(graph: fx.Graph) -> bool:
    """Bring a functional trace into the dialect; ``False``, and no change, where torch has to."""
    steps: list[tuple[fx.Node, Lowering]] = []
    for node in graph.nodes:
        if node.op != "call_function" or not _is_foreign(node):
            continue
        lowering = _LOWERINGS.get(node.target)
        if lowering is None or not _applies(node):
            return False
        steps.append((node, lowering))
    for node, lowering in steps:
        with graph.inserting_before(node):
            value = lowering(graph, node)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return True


def _is_foreign(node: fx.Node) -> bool:
    """Whether the dialect has no such node."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) or is_mutating(target):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        name, module = getattr(target, "__name__", ""), getattr(target, "__module__", "")
        return module not in ("_operator", "math") and not name.startswith("sym_")
    if target in _LOWERINGS:
        return True
    key = "CompositeImplicitAutograd"
    taken_apart = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)
    return taken_apart and target not in _kept_composites()


@cache
def _kept_composites() -> frozenset[Any]:
    try:
        from torch._export.utils import _collect_all_valid_cia_ops
    except ImportError:  # every composite then goes through torch
        return frozenset()
    return frozenset(_collect_all_valid_cia_ops())


def _applies(node: fx.Node) -> bool:
    arguments = _arguments(node)
    if node.target is aten.batch_norm.default:
        return not arguments["training"]
    if node.target is aten.detach_.default:
        return getattr(node.args[0], "target", None) is aten.lift_fresh_copy.default
    if node.target is aten.chunk.default:
        return isinstance(val(node.args[0]).shape[arguments["dim"]], int)
    return arguments.get("memory_format") in _PLAIN_FORMATS


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {s.name: a for s, a in zip(schema, node.args, strict=False)}
    return {s.name: s.default_value for s in schema} | given | dict(node.kwargs)


def _make(
    graph: fx.Graph, source: fx.Node, target: Any, args: tuple[Any, ...], value: Any, **kwargs: Any
) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {**source.meta, "val": value}
    return node


def _to(graph: fx.Graph, node: fx.Node) -> Any:
    before, after = val(node.args[0]), val(node)
    wanted = {"dtype": after.dtype, "device": after.device}
    changed = {k: v for k, v in wanted.items() if getattr(before, k) != v}
    if not changed and not _arguments(node)["copy"]:
        return node.args[0]
    return _make(graph, node, aten._to_copy.default, (node.args[0],), after, **changed)


def _contiguous(graph: fx.Graph, node: fx.Node) -> Any:
    if val(node.args[0]).is_contiguous():
        return node.args[0]
    return _contiguous_clone(graph, node)


def _contiguous_clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    given = val(node.args[0])
    with given.fake_mode:
        value = given.clone(memory_format=torch.contiguous_format)
    layout = {"memory_format": torch.contiguous_format}
    return _make(graph, node, aten.clone.default, (node.args[0],), value, **layout)


def _reshape(graph: fx.Graph, node: fx.Node) -> Any:
    return _viewed(graph, node, list(_arguments(node)["shape"]))


def _flatten(graph: fx.Graph, node: fx.Node) -> Any:
    arguments, given = _arguments(node), val(node.args[0])
    if given.dim() == 0:
        return _viewed(graph, node, [1])
    first, last = (arguments[k] % given.dim() for k in ("start_dim", "end_dim"))
    if first == last:
        return node.args[0]
    merged = val(node).shape[first]
    sizes = [_size(graph, node, axis) for axis in range(given.dim())]
    middle = merged if isinstance(merged, int) else -1
    return _viewed(graph, node, [*sizes[:first], middle, *sizes[last + 1 :]])


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> Any:
    size = val(node.args[0]).shape[axis]
    if isinstance(size, int):
        return size
    return _make(graph, node, aten.sym_size.int, (node.args[0], axis), size)


def _viewed(graph: fx.Graph, node: fx.Node, shape: list[Any]) -> fx.Node:
    """A view where the strides allow one, else a contiguous copy under a view."""
    given, after = val(node.args[0]), val(node)
    if _is_viewable(given, after.shape):
        return _make(graph, node, aten.view.default, (node.args[0], shape), after)
    copy = _contiguous_clone(graph, node)
    known = [n if isinstance(n, int) else s for s, n in zip(shape, after.shape, strict=True)]
    return _make(graph, node, aten._unsafe_view.default, (copy, known), after)


def _is_viewable(given: Tensor, shape: Any) -> bool:
    try:
        with given.fake_mode:  # type: ignore[attr-defined]
            given.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _dropout(graph: fx.Graph, node: fx.Node) -> Any:
    arguments = _arguments(node)
    if not arguments["train"] or arguments["p"] == 0:
        return node.args[0]
    mask = torch.empty_like(val(node), dtype=torch.bool)
    both = _make(graph, node, aten.native_dropout.default, node.args, (val(node), mask))
    return _item(graph, node, both, 0)


def _item(graph: fx.Graph, node: fx.Node, several: fx.Node, index: int) -> fx.Node:
    return _make(graph, node, operator.getitem, (several, index), val(several)[index])


def _batch_norm(graph: fx.Graph, node: fx.Node) -> Any:
    a = _arguments(node)
    names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    empty = val(node).new_empty((0,))
    target = aten._native_batch_norm_legit_no_training.default
    args = tuple(a[name] for name in names)
    return _item(graph, node, _make(graph, node, target, args, (val(node), empty, empty)), 0)


def _chunk(graph: fx.Graph, node: fx.Node) -> Any:
    a = _arguments(node)
    size = math.ceil(val(node.args[0]).shape[a["dim"]] / a["chunks"])
    args = (node.args[0], size, a["dim"])
    return _make(graph, node, aten.split.Tensor, args, val(node))


def _copy(graph: fx.Graph, node: fx.Node) -> Any:
    return _make(graph, node, aten.clone.default, (node.args[0],), val(node))


def _unchanged(_graph: fx.Graph, node: fx.Node) -> Any:
    return node.args[0]


_LOWERINGS: dict[Any, Lowering] = {
    **dict.fromkeys((aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other), _to),
    aten.contiguous.default: _contiguous,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.dropout.default: _dropout,
    aten.batch_norm.default: _batch_norm,
    aten.chunk.default: _chunk,
    aten.lift_fresh_copy.default: _copy,
    aten.detach_.default: _unchanged,  # of a literal tensor
}
