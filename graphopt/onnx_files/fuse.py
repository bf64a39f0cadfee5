"""ONNX Runtime's fused operators, by the rewriter of onnxscript."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from graphopt.emit import onnx_sums
from graphopt.emit.onnx_translate import quiet
from graphopt.onnx_files.document import node_count, stored_bytes
from graphopt.onnx_files.fold import unfolded
from graphopt.onnx_files.guard import guarded, silent
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label

SPARE, SHARE = 1024, 1e-3
"""Bytes by which constants may grow, or this share of all, where that is more: fused operators have
some of their own, such as the joined biases of query, key and value, of which each may be shared.
"""
OLDEST = 7
"""Operator sets before this one have other broadcasting; the rewriter does not know it."""
_SIMPLIFY = "simplify"
_PLAIN = frozenset(
    {
        *("Add", "Cast", "Concat", "Constant", "Expand", "Identity", "MatMul", "Mul", "Neg"),
        *("Reshape", "Shape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
        *("Gather", "ConstantOfShape", "Div"),
    }
)
"""What rewriting leaves between fused operators: none itself."""


@dataclass(frozen=True)
class FuseOperators(OnnxPass):
    """Attention, norms, activations and more as one operator each, as ONNX Runtime has them.

    Found by ``onnxscript.rewriter.ort_fusions``. Functions of the model are inlined for it.
    """

    timed = True

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        if node_count(model) < 2:
            return Outcome()
        version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
        if version < OLDEST:
            reason = f"operator set {version} is older than {OLDEST}"
            return Outcome(missed=[self.missed("fuse operators", reason)])
        prepare(model)
        original = model.clone()
        outcome = self._fused(model, original, lambda _node: False)
        denied = {n for c in outcome.changes if not allowed(c.key) for n in c.removed}
        if any(c.key == _SIMPLIFY and not allowed(_SIMPLIFY) for c in outcome.changes):
            return Outcome()
        if denied:
            again = original.clone()
            outcome = self._fused(again, original, lambda node: label(node) in denied)
            outcome = replace(outcome, model=again)
        held = all(allowed(change.key) for change in outcome.changes)
        return outcome if held else Outcome()

    def alternative(self, _model: Any) -> Any | None:
        """Norms of sums, of which ONNX Runtime is slow on CPUs, as two operators."""
        apart = onnx_sums.sums_apart(SimpleNamespace(model=_model))
        return None if apart is None else apart.model

    def _fused(self, model: Any, original: Any, hides: Callable[[Any], bool]) -> Outcome:
        kept = {id(node) for node in unfolded(model)}
        try:
            _fuse(model, lambda node: id(node) in kept or hides(node))
        except Exception as error:  # a rewriter that fails on a graph raises anything
            reason = f"onnxscript fails: {' '.join(str(error).split())[:200]}"
            return Outcome(missed=[self.missed("fuse operators", reason)])
        made = _operators(model) - _operators(original)
        kinds = {kind for kind in made if kind[1] not in _PLAIN}
        if not kinds and node_count(model) >= node_count(original):
            return Outcome()
        before = stored_bytes(original)
        if (grown := stored_bytes(model) - before) > max(SPARE, SHARE * before):
            reason = f"constants would grow by {grown} bytes"
            return Outcome(missed=[self.missed("fuse operators", reason)])
        return Outcome(list(_changes(original, model, kinds)))


@dataclass(frozen=True)
class SplitNormsOfSums(OnnxPass):
    """Norms of sums as ``Sum`` and the norm, where ONNX Runtime is seen to run that faster."""

    timed = True

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:
        if not around.measure or not allowed("norms of sums"):
            return Outcome()  # what is faster differs from machine to machine
        before = [label(n) for n in model.graph.all_nodes() if n.op_type.startswith("Skip")]
        if not before:
            return Outcome()
        apart = onnx_sums.sums_apart(SimpleNamespace(model=model))
        if apart is None:
            return Outcome()
        left = {label(n) for n in apart.model.graph.all_nodes()}
        removed = tuple(name for name in before if name not in left)
        change = Change("norms of sums", "split norms of sums", removed)
        return Outcome([change], model=apart.model)


def prepare(model: Any) -> None:
    """Functions inlined, and types and shapes of all values, of those too that are hidden later."""
    from onnx_ir.passes.common import InlinePass, ShapeInferencePass

    with silent():
        if model.functions:
            InlinePass()(model)
        ShapeInferencePass()(model)


def _fuse(model: Any, hides: Callable[[Any], bool]) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with quiet(), guarded(model, hides):
        optimize_for_ort(model)
    onnx_sums.doubles_apart(model)


Kind = tuple[str, str]


def _operators(model: Any) -> Counter[Kind]:
    holders = [model.graph, *model.functions.values()]
    return Counter((n.domain, n.op_type) for holder in holders for n in holder.all_nodes())


def _changes(original: Any, model: Any, kinds: set[Kind]) -> Iterator[Change]:
    """One for each fused operator, with the nodes whose place it takes; one for the rest."""
    producers = {v.name: n for n in original.graph.all_nodes() for v in n.outputs}
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) in kinds and not _was(node, producers):
            removed = tuple(label(n) for n in _cone(node, producers))
            taken.update(removed)
            yield Change(node.op_type, f"fuse {node.op_type}", removed, (label(node),))
    left = {label(n) for n in model.graph.all_nodes()}
    every = (label(n) for n in original.graph.all_nodes())
    rest = tuple(name for name in every if name not in left and name not in taken)
    if rest or not kinds:
        yield Change(_SIMPLIFY, "simplify what stands around", rest)


def _was(node: Any, producers: dict[str, Any]) -> bool:
    """Whether the original has the same operator there."""
    old = producers.get(node.outputs[0].name)
    return old is not None and (old.domain, old.op_type) == (node.domain, node.op_type)


def _cone(node: Any, producers: dict[str, Any]) -> list[Any]:
    """Nodes of the original from a fused operator's outputs back to its inputs."""
    ends = {v.name for v in node.inputs if v is not None}
    stack = [producers[v.name] for v in node.outputs if v.name in producers]
    found: dict[int, Any] = {}
    while stack:
        current = stack.pop()
        if id(current) in found:
            continue
        found[id(current)] = current
        sources = (v.name for v in current.inputs if v is not None and v.name not in ends)
        stack += [producers[name] for name in sources if name in producers]
    return list(found.values())
