"""Attention that an exporter spelled out, as one operator of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graphopt.onnx_files.attention.heads import TOKENS, Operand, value_of
from graphopt.onnx_files.attention.reading import Found, Missed, read
from graphopt.onnx_files.attention.writing import Writer
from graphopt.onnx_files.fuse import OLDEST, prepare
from graphopt.onnx_files.numbers import is_standard
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label

__all__ = ["FuseAttention"]

RULE, REGROUPED = "fuse attention", "attention on three axes"
_FINITE = (
    "where scores are NaN, as those of NaN are, the file gives NaN, as PyTorch does, and the "
    "original zero"
)


@dataclass(frozen=True)
class FuseAttention(OnnxPass):
    """``softmax(scale q k^T + mask) v`` as one operator, and transposes of heads with it.

    ``MultiHeadAttention`` of ONNX Runtime; without a mask and from operator set 23 on, ONNX's
    ``Attention``, which reads heads where they are. Rows that a mask hides entirely are what they
    were; see `_FINITE` for what is assumed of the scores.
    """

    timed = True

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        candidates = [n for n in model.graph if is_standard(n, "Softmax", "Attention")]
        if not candidates or model.opset_imports.get("", 1) < OLDEST:
            return Outcome()
        prepare(model)
        outcome, writer = Outcome(), Writer(model)
        for node in _in_order(model):
            if is_standard(node, "Attention"):
                self._regroup(node, writer, outcome, allowed)
            else:
                self._fuse(node, writer, outcome, allowed)
        return outcome

    def _fuse(self, softmax: Any, writer: Writer, outcome: Outcome, allowed: Allowed) -> None:
        found = read(softmax)
        if isinstance(found, Missed):
            outcome.missed.append(self.missed(RULE, found.reason, label(found.node)))
        if not isinstance(found, Found):
            return
        key = label(found.product)
        if allowed(key):
            made = writer.write(found)
            removed = sweep(found.product)
            assumes = _FINITE if found.safe else ""
            outcome.changes.append(
                Change(key, RULE, removed, tuple(map(label, made)), assumes=assumes)
            )

    def _regroup(self, node: Any, writer: Writer, outcome: Outcome, allowed: Allowed) -> None:
        operands = _grouped(node)
        key = label(node)
        if operands is not None and allowed(key):
            made = writer.regrouped(node, operands)
            removed = sweep(node)
            outcome.changes.append(Change(key, REGROUPED, removed, tuple(map(label, made))))


def _in_order(model: Any) -> Iterator[Any]:
    """Softmaxes and attention; those whose product comes first are first."""
    places = {id(node): place for place, node in enumerate(model.graph)}
    found: list[tuple[int, Any]] = []
    for node in model.graph:
        if is_standard(node, "Attention"):
            found.append((places[id(node)], node))
        elif is_standard(node, "Softmax"):
            known = read(node)
            last = known.product if isinstance(known, Found) else node
            found.append((places[id(last)], node))
    for _, node in sorted(found, key=lambda pair: pair[0]):
        yield node


def _grouped(node: Any) -> tuple[Operand, ...] | None:
    """Operands of ``Attention`` on four axes, where all have tokens before heads."""
    plain = len(node.outputs) == 1 or not any(v.uses() for v in node.outputs[1:])
    past = any(v is not None for v in node.inputs[4:])
    if not plain or past or "q_num_heads" in node.attributes:
        return None
    found = tuple(value_of(v, 4) for v in node.inputs[:3])
    fits = all(o.order == TOKENS and o.heads and o.factor == 1 for o in found)
    return found if fits and found[1].heads == found[2].heads else None


def sweep(node: Any) -> tuple[str, ...]:
    """Remove a node whose readers nothing reads, with them and with what only it read; names of
    all, in their order."""
    waiting, gone = [node, *(use.node for v in node.outputs for use in v.uses())], []
    while waiting:
        current = waiting.pop()
        if current.graph is None or any(v.uses() or v.is_graph_output() for v in current.outputs):
            continue
        waiting += [v.producer() for v in current.inputs if v is not None and v.producer()]
        gone.append(label(current))
        current.graph.remove(current, safe=True)
    return tuple(reversed(gone))
