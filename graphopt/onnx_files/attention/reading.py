"""Attention that is spelled out in an ONNX graph: from scores over a softmax to the product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from graphopt.onnx_files.attention.heads import Operand, key_of, perm_of, query_of, times, value_of
from graphopt.onnx_files.numbers import is_standard, number, uniform
from graphopt.onnx_files.random_nodes import is_random

ABSORBING = -1e9
"""A score that this or less is put in the place of leaves nothing of it in float32."""
_PASSED = ("Identity", "Cast", "Dropout")
_FARTHEST = 12
"""Nodes between a product and its softmax, at most."""


@dataclass(frozen=True)
class Mask:
    """What is added to scores, or what is put in their place where a condition says so.

    Attributes:
        value: added numbers, or the condition.
        fill: what is put in the place of scores; None where ``value`` is added.
        when: which truth value of the condition does so.
    """

    value: Any
    fill: float | None = None
    when: bool = True


@dataclass(frozen=True)
class Missed:
    """Why attention is left as it is."""

    reason: str
    node: Any


@dataclass(frozen=True)
class Found:
    """``softmax(scale q k^T + masks) v``.

    Attributes:
        masks: in the order in which they meet the scores.
        safe: rows of weights that are NaN are zero instead.
        product: the last one.
    """

    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: tuple[Mask, ...]
    safe: bool
    product: Any


@dataclass
class _Scores:
    product: Any = None
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)


def read(softmax: Any) -> Found | Missed | None:
    """Attention around a softmax; None where there is none, as in a classifier."""
    scores = _scores(softmax)
    if scores is None:
        return None
    after = _weighing(softmax)
    if after is None or isinstance(after, Missed):
        return after
    if isinstance(scores, Missed):
        return scores
    product, safe = after
    if refusal := _misfit(softmax, scores):
        return refusal
    return _joined(scores, product, softmax, safe=safe)


def _joined(scores: _Scores, product: Any, softmax: Any, *, safe: bool) -> Found | Missed:
    rank = _rank(scores.product)
    if rank not in (3, 4):
        return Missed("batch and heads of its scores are not one or two axes", scores.product)
    left, right = scores.product.inputs
    query, key = query_of(left, rank), key_of(right, rank)
    value = value_of(product.inputs[1], rank)
    if key is None:
        return Missed(
            "its key is not transposed, or is scaled by more than a known number", scores.product
        )
    scale = scores.scale * query.factor * key.factor
    if not math.isfinite(scale) or scale == 0:
        return Missed(f"its scores are multiplied by {scale:g}", scores.product)
    if rank == 3 and scores.masks:
        return Missed("its scores have three axes and a mask", softmax)
    found = Found(query, key, value, scale, tuple(scores.masks), safe, product)
    return _apart(found, softmax) or found


def _apart(found: Found, softmax: Any) -> Missed | None:
    """Why the operands do not make one attention."""
    heads = {o.heads for o in (found.query, found.key, found.value)}
    if heads == {None}:
        return Missed("how many heads there are is not known", softmax)
    if None in heads or len(heads) > 1:
        return Missed("query, key and value differ in heads, or may", softmax)
    letters = [("B", "query", found.query, found.key), ("B", "key", found.key, found.value)]
    letters.append(("S", "key", found.key, found.value))
    for letter, name, one, other in letters:
        a, b = (o.size(letter) if letter in o.order else None for o in (one, other))
        if isinstance(a, int) and isinstance(b, int) and a != b:
            what = "batch" if letter == "B" else "tokens"
            return Missed(f"{what} of the {name} are {a}, those of the other {b}", softmax)
        named = isinstance(a, tuple) and isinstance(b, tuple) and not a[0] and not b[0]
        if letter == "B" and a != b and (named or 1 in (a, b)):
            return Missed("query, key and value differ in batch, or may", softmax)
    return None


def _misfit(softmax: Any, scores: _Scores) -> Missed | None:
    import onnx_ir

    if _axis(softmax) not in (-1, (_rank(scores.product) or 0) - 1):
        return Missed("its softmax runs over another axis than the keys", softmax)
    kind = softmax.outputs[0].dtype or softmax.inputs[0].dtype
    if kind != onnx_ir.DataType.FLOAT:
        told = "an unknown type" if kind is None else str(kind).lower()
        return Missed(f"ONNX Runtime has it on CPUs in float32 alone, and this is {told}", softmax)
    return None


def _axis(softmax: Any) -> int:
    """The axis; before operator set 13, softmax runs over all from the second on by default."""
    version = softmax.graph.opset_imports.get("", 1) if softmax.graph is not None else 1
    return int(softmax.attributes.get_int("axis", -1 if version >= 13 else 1))


def _rank(product: Any) -> int | None:
    """Axes of the scores, by their shape or by what they are made of."""
    for value in (product.outputs[0], *product.inputs):
        if value.shape is not None:
            return len(value.shape)
        if (perm := perm_of(value)) is not None:
            return len(perm)
        node = value.producer()
        if is_standard(node, "Mul", "Div"):
            for given in node.inputs:
                if (perm := perm_of(given)) is not None:
                    return len(perm)
    return None


def _weighing(softmax: Any) -> tuple[Any, bool] | Missed | None:
    """The product with the value behind a softmax, and whether NaN becomes zero before it."""
    value, safe = softmax.outputs[0], False
    for _ in range(_FARTHEST):
        readers = list(dict.fromkeys(use.node for use in value.uses()))
        if not safe and (chosen := _without_nan(value, readers)) is not None:
            value, safe = chosen.outputs[0], True
            continue
        products = [n for n in readers if is_standard(n, "MatMul") and n.inputs[0] is value]
        if value.is_graph_output() or len(readers) != 1:
            return Missed("its weights are read elsewhere too", softmax) if products else None
        (reader,) = readers
        if products:
            return None if reader.inputs[1] is value else (reader, safe)
        if not _is_copy(reader):
            return None
        value = reader.outputs[0]
    return None


def _is_copy(node: Any) -> bool:
    """An identity, a cast to the type that it has, or a dropout that drops nothing."""
    if is_standard(node, "Cast"):
        return node.attributes.get_int("to", -1) == node.inputs[0].dtype
    if is_standard(node, "Dropout"):
        return not is_random(node) and not any(v.uses() for v in node.outputs[1:])
    return is_standard(node, "Identity")


def _without_nan(value: Any, readers: list[Any]) -> Any | None:
    """The node that puts zero in the place of NaN in a value that nothing else reads."""
    tests = [n for n in readers if is_standard(n, "IsNaN")]
    choices = [n for n in readers if is_standard(n, "Where")]
    if len(readers) != 2 or len(tests) != 1 or len(choices) != 1 or value.is_graph_output():
        return None
    (test,), (choice,) = tests, choices
    condition = test.outputs[0]
    only = len(condition.uses()) == 1 and not condition.is_graph_output()
    fits = choice.inputs[0] is condition and choice.inputs[2] is value
    return choice if only and fits and number(choice.inputs[1]) == 0 else None


def _scores(softmax: Any) -> _Scores | Missed | None:
    """What stands between a product and its softmax; None where there is no product."""
    value, found = softmax.inputs[0], _Scores()
    for _ in range(_FARTHEST):
        node = value.producer()
        if not _leads(value):
            return None
        if len(value.uses()) > 1 or value.is_graph_output():
            return Missed("its scores are read elsewhere too", softmax)
        if is_standard(node, "MatMul"):
            found.product = node
            kept = [m for m in reversed(found.masks) if not _is_nothing(m)]
            found.masks = kept
            return found
        if _is_copy(node):
            value = node.inputs[0]
            continue
        step = _step(node, found)
        if isinstance(step, Missed):
            return step
        value = step
    return None


def _is_nothing(mask: Mask) -> bool:
    """Whether it adds zero everywhere, or hides nothing."""
    found = uniform(mask.value)
    if mask.fill is None:
        return found == 0
    return found is not None and bool(found) is not mask.when


def _leads(value: Any, left: int = _FARTHEST) -> bool:
    """Whether a value is scores: a product, scaled and masked or not."""
    node = value.producer()
    if left == 0 or not is_standard(node, "MatMul", "Mul", "Div", "Add", "Where", *_PASSED):
        return False
    return node.op_type == "MatMul" or any(
        _leads(v, left - 1) for v in node.inputs if v is not None
    )


def _step(node: Any, found: _Scores) -> Any:
    """One step from the softmax towards the product: the value behind it, or what is wrong."""
    ways = [i for i, v in enumerate(node.inputs) if _leads(v)]
    if node.op_type in ("Mul", "Div"):
        other = node.inputs[1 - ways[0]]
        factor = number(other)
        if factor is None or (node.op_type == "Div" and ways[0] == 1):
            return Missed("its scores are multiplied by more than one number", node)
        found.scale = times(found.scale, factor, node.op_type)
        return node.inputs[ways[0]]
    if found.scale != 1:
        return Missed("what is added to its scores is scaled with them", node)
    if node.op_type == "Add":
        found.masks.append(Mask(node.inputs[1 - ways[0]]))
        return node.inputs[ways[0]]
    return _chosen(node, ways, found)


def _chosen(node: Any, ways: list[int], found: _Scores) -> Any:
    if ways[0] == 0:
        return Missed("its scores decide what is masked", node)
    fill = number(node.inputs[3 - ways[0]])
    if fill is None or not fill <= ABSORBING:
        return Missed("hidden scores are not put far below the others", node)
    found.masks.append(Mask(node.inputs[0], fill, when=ways[0] == 2))
    return node.inputs[ways[0]]
