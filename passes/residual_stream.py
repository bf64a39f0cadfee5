"""Residual streams: values that are only ever summed, viewed, and normalised.

A stream is found from a norm's input: backwards through sums and views to its *writers*, forwards
from every value to its *readers*. All that reads a stream must be known before it may be changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Refusal, arguments

aten = torch.ops.aten

NORM = aten.layer_norm.default
SAME_AXES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default})
DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default})


@dataclass
class Stream:
    """One residual stream.

    Attributes:
        width: extent of the feature axis.
        values: nodes that hold the stream or a part of it -> their feature axis, from the front.
        inner: sums and views among them; the others are writers.
        norms: layer norms that read the stream.
        refusal: why it may not be changed, if so.
    """

    width: Any
    values: dict[fx.Node, int] = field(default_factory=dict)
    inner: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    refusal: Refusal | None = None

    def writers(self) -> list[fx.Node]:
        return [n for n in self.values if n not in self.inner]

    def refuse(self, reason: str, node: fx.Node) -> None:
        self.refusal = self.refusal or Refusal(reason, node)


def find_streams(program: Program) -> Iterator[Stream]:
    """Every stream that a layer norm over the last axis reads, in graph order."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    seen: set[fx.Node] = set()
    for norm in program.graph.find_nodes(op="call_function", target=NORM):
        source = norm.args[0]
        if source in seen or len(arguments(norm)["normalized_shape"]) != 1:
            continue
        stream = _grow(source)
        seen.update(stream.values)
        stream.norms.sort(key=order.__getitem__)
        yield stream


def _grow(source: fx.Node) -> Stream:
    """Follow sums and views both ways from one value until nothing new is found."""
    axis = val(source).dim() - 1
    stream = Stream(val(source).shape[axis])
    queue = [(source, axis)]
    while queue:
        node, axis = queue.pop()
        if node in stream.values:
            if stream.values[node] != axis:
                stream.refuse("the stream is transposed onto itself", node)
            continue
        stream.values[node] = axis
        queue.extend(_sources(node, axis, stream))
        queue.extend(_readers(node, axis, stream))
    return stream


def _sources(node: fx.Node, axis: int, stream: Stream) -> list[tuple[fx.Node, int]]:
    """The parts a sum or view is made of, with their feature axes; none for a writer."""
    parts = source_axes(node, axis)
    if parts is None:
        return []
    for part, at in parts:
        if not statically_known_true(val(part).shape[at] == stream.width):
            stream.refuse(f"`{part.name}` is broadcast over the features", node)
            return []
    stream.inner[node] = [part for part, _ in parts]
    return parts


def _readers(node: fx.Node, axis: int, stream: Stream) -> Iterable[tuple[fx.Node, int]]:
    for user in node.users:
        if user.op == "output":
            stream.refuse("the residual stream is also an output of the model", node)
        elif user.target is NORM and _normalises(user, node, axis):
            stream.norms.append(user)
        elif isinstance(val(user), int | torch.SymInt):
            continue
        elif (at := user_axis(user, node, axis)) is not None:
            yield user, at
        else:
            name = operator_name(user.target)
            stream.refuse(f"the residual stream is also read by `{user.name}` ({name})", user)


def _normalises(norm: fx.Node, node: fx.Node, axis: int) -> bool:
    """Whether a layer norm reads the value over exactly its feature axis."""
    last = axis == val(node).dim() - 1
    given = arguments(norm)
    alone = node not in (given["weight"], given["bias"])
    return last and alone and norm.args[0] is node and len(given["normalized_shape"]) == 1


def user_axis(user: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Feature axis of a sum or view of the value; ``None`` where it is neither."""
    rank = val(user).dim() if isinstance(val(user), Tensor) else 0
    for at in range(rank):
        parts = source_axes(user, at)
        if parts is not None and (node, axis) in parts:
            return at
    return None


def source_axes(node: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
    """What a sum or view along other axes is made of, and where its features lie there."""
    if node.op != "call_function":
        return None
    if node.target is aten.add.Tensor:
        return _summands(node, axis)
    if node.target is aten.cat.default:
        rank = val(node).dim()
        along = arguments(node)["dim"] % rank
        return None if along == axis else [(part, axis) for part in node.args[0]]
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(val(source), Tensor):
        return None
    at = _viewed_axis(node, source, axis)
    return None if at is None else [(source, at)]


def _summands(node: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
    """Both operands; their axes count from the back, as broadcasting does."""
    given = arguments(node)
    if given["alpha"] != 1 or not isinstance(given["other"], fx.Node):
        return None
    back = axis - val(node).dim()
    operands = given["self"], given["other"]
    if any(not isinstance(val(o), Tensor) or val(o).dim() < -back for o in operands):
        return None
    return [(o, val(o).dim() + back) for o in operands]


def _viewed_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    given, rank = arguments(node), val(source).dim()
    if node.target in SAME_AXES or _inert_dropout(node, given):
        return axis
    if node.target is aten.transpose.int:
        first, second = given["dim0"] % rank, given["dim1"] % rank
        return {first: second, second: first}.get(axis, axis)
    if node.target is aten.permute.default:
        return int(given["dims"][axis] % rank)
    if node.target is aten.expand.default:
        at = axis - val(node).dim() + rank
        return at if at >= 0 else None
    if node.target is aten.slice.Tensor:
        return axis if given["dim"] % rank != axis else None
    if node.target is aten.select.int:
        gone = given["dim"] % rank
        return axis + (axis >= gone)
    if node.target is aten.unsqueeze.default:
        new = given["dim"] % (rank + 1)
        return None if new == axis else axis - (axis > new)
    return _reshaped_axis(node, source, axis)


def _inert_dropout(node: fx.Node, given: dict[str, Any]) -> bool:
    return node.target is aten.dropout.default and (given["p"] == 0 or given["train"] is False)


def _reshaped_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where a reshape leaves the feature axis whole: as the last one, or with all before it."""
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    old, new = val(source).shape, val(node).shape
    if axis == len(new) - 1:
        return len(old) - 1 if statically_known_true(old[-1] == new[-1]) else None
    same = len(old) > axis and all(
        statically_known_true(a == b) for a, b in zip(old[: axis + 1], new[: axis + 1], strict=True)
    )
    return axis if same else None


def between(program: Program, ends: Iterable[fx.Node]) -> list[fx.Node]:
    """All call nodes on any path from one of ``ends`` to another, in graph order."""
    marked = set(ends)
    below = set(marked)
    for node in program.graph.nodes:
        if any(a in below for a in node.all_input_nodes):
            below.add(node)
    above = set(marked)
    for node in reversed(program.graph.nodes):
        if any(u in above for u in node.users):
            above.add(node)
    return [n for n in program.graph.nodes if n.op == "call_function" and n in below and n in above]
