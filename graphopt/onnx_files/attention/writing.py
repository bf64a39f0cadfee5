"""Attention as one operator in the place of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.emit.onnx_quantized.emitter import MICROSOFT, Emitter
from graphopt.emit.onnx_tensors import tensors_equal
from graphopt.onnx_files.attention.heads import HEADS, SWAPPED, TOKENS, Operand, perm_of
from graphopt.onnx_files.attention.reading import Found, Mask
from graphopt.onnx_files.numbers import constant, is_standard, number, size

STANDARD_FROM = 23
"""The operator set from which on ONNX has ``Attention``, which ONNX Runtime runs faster."""


class Writer:
    """Puts attention into a graph; what several share, such as a mask, is made once.

    ``MultiHeadAttention`` of ONNX Runtime gives what ``Softmax`` gives for rows that a mask hides
    entirely, NaN for ``-inf`` and the mean for finite numbers. ``Attention`` of ONNX gives zeros
    for both there, and takes its place only where there is no mask.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.standard = model.opset_imports.get("", 1) >= STANDARD_FROM
        self.made: dict[Any, Any] = {}
        self.emit = Emitter()

    def write(self, found: Found) -> list[Any]:
        """Replace the last product; the nodes that were made."""
        self.emit.nodes = []
        out, turned = self._attention(found)
        if found.safe and found.masks and (hidden := self._hidden(found, turned=turned)):
            zero = self.emit.number("zero", 0.0)
            out = self.emit("Where", hidden, zero, out)
        return self._put(found.product, out, turned=turned)

    def regrouped(self, node: Any, operands: Sequence[Operand]) -> list[Any]:
        """ONNX's ``Attention`` on four axes, as the same on three; the nodes that were made."""
        self.emit.nodes = []
        joined = [self._joined(o) for o in operands]
        made = self._standard(joined, node.inputs[3:], operands[0].heads, operands[1].heads)
        self.emit.nodes[-1].attributes.update(node.attributes)
        return self._put(node, self._apart(made, operands[0], operands[2]), turned=True)

    def _attention(self, found: Found) -> tuple[Any, bool]:
        """What attention gives, and whether it has tokens before heads."""
        query, key, value = found.query, found.key, found.value
        if self.standard and not found.masks and found.query.order != "NSD":
            if all(o.order == TOKENS for o in (query, key, value)):
                given = [self._joined(o) for o in (query, key, value)]
                made = self._standard(given, (), query.heads, query.heads)
                self.emit.nodes[-1].attributes.update(_scale(found.scale))
                return self._apart(made, query, value), True
            given = [self._with_heads_first(o) for o in (query, key, value)]
            return self.emit("Attention", *given, scale=found.scale), False
        self.model.opset_imports[MICROSOFT] = 1
        options = {"num_heads": query.heads, "scale": found.scale}
        if query.order == "NSD":
            given = [query.value, key.value, value.value]
            return self.emit.own("MultiHeadAttention", *given, **options), False
        joined = key.order == value.order == TOKENS or key.size("D") != value.size("D")
        pair = [self._joined(o) if joined else self._with_heads_first(o) for o in (key, value)]
        bias = (None, None, self._bias(found)) if found.masks else ()
        made = self.emit.own("MultiHeadAttention", self._joined(query), *pair, *bias, **options)
        return self._apart(made, query, value), True

    def _standard(self, given: Any, mask: Any, heads: Any, groups: Any) -> Any:
        """ONNX's attention on three axes."""
        return self.emit("Attention", *given, *mask, q_num_heads=heads, kv_num_heads=groups)

    def _apart(self, made: Any, query: Operand, value: Operand) -> Any:
        """``(B, S, H * D)`` as ``(B, S, H, D)``."""
        width = value.size("D")
        last = width if isinstance(width, int) else -1
        return self.emit("Reshape", made, self.emit.numbers(0, 0, query.heads or 0, last))

    def _joined(self, operand: Operand) -> Any:
        """``(B, S, H * D)``."""
        width, heads = operand.size("D"), operand.heads or 0
        last = heads * width if isinstance(width, int) else -1
        return self.emit("Reshape", self._with_tokens_first(operand), self.emit.numbers(0, 0, last))

    def _with_tokens_first(self, operand: Operand) -> Any:
        if operand.picked is not None:
            index = self.emit.constant(
                f"graphopt.index_{operand.picked}", torch.tensor(operand.picked)
            )
            return self.emit("Gather", operand.value, index, axis=2)
        if operand.order == TOKENS:
            return operand.value
        return self.emit("Transpose", operand.value, perm=SWAPPED)

    def _with_heads_first(self, operand: Operand) -> Any:
        if operand.order == HEADS:
            return operand.value
        return self.emit("Transpose", self._with_tokens_first(operand), perm=SWAPPED)

    def _total(self, masks: Sequence[Mask]) -> Any:
        """All masks as one that is added to the scores."""
        key = ("total", *((id(m.value), m.fill, m.when) for m in masks))
        if key not in self.made:
            total = None
            for mask in masks:
                total = self._with(total, mask)
            self.made[key] = total
        return self.made[key]

    def _with(self, total: Any, mask: Mask) -> Any:
        if mask.fill is None:
            return mask.value if total is None else self.emit("Add", total, mask.value)
        fill = self.emit.number(f"fill_{mask.fill:g}", mask.fill)
        rest = self.emit.number("zero", 0.0) if total is None else total
        chosen = (fill, rest) if mask.when else (rest, fill)
        return self.emit("Where", mask.value, *chosen)

    def _bias(self, found: Found) -> Any:
        """The masks as ``(1 or B, 1 or H, S, T)``: the last two axes are not broadcast."""
        total = self._total(found.masks)
        rows, columns = found.query.size("S"), found.key.size("S")
        ranked = total.shape is not None and len(total.shape) == 4
        if ranked and (size(total, 2), size(total, 3)) == (rows, columns):
            return total
        key = ("bias", id(total), rows, columns)
        if key not in self.made:
            one = self.emit.numbers(1)
            lengths = [self._length(o) for o in (found.query, found.key)]
            shape = self.emit("Concat", one, one, *lengths, axis=0)
            self.made[key] = self.emit("Expand", total, shape)
        return self.made[key]

    def _length(self, operand: Operand) -> Any:
        """How many tokens an operand has, as a vector of one."""
        known = operand.size("S")
        if isinstance(known, int):
            return self.emit.numbers(known)
        axis = 2 if operand.order == HEADS else 1
        index = self.emit.numbers(axis)
        return self.emit("Gather", self.emit("Shape", operand.value), index, axis=0)

    def _hidden(self, found: Found, *, turned: bool) -> Any:
        """Where a row of scores is ``-inf`` throughout; None where no row can be."""
        total = self._total(found.masks)
        if all(_is_finite(mask) for mask in found.masks):
            return None
        key = ("hidden", id(total), turned)
        if key not in self.made:
            ranked = total.shape is not None and len(total.shape) == 4
            four = total if ranked else self.emit("Expand", total, self.emit.numbers(1, 1, 1, 1))
            low = self.emit.number("lowest", -torch.inf)
            hidden = self.emit("Equal", self._greatest(four), low)
            self.made[key] = self.emit("Transpose", hidden, perm=SWAPPED) if turned else hidden
        return self.made[key]

    def _greatest(self, value: Any) -> Any:
        """The largest number of each row, as ``(..., S, 1)``."""
        if self.model.opset_imports.get("", 1) >= 18:
            return self.emit("ReduceMax", value, self.emit.numbers(-1), keepdims=1)
        return self.emit("ReduceMax", value, axes=[-1], keepdims=1)

    def _put(self, product: Any, out: Any, *, turned: bool) -> list[Any]:
        """The new nodes before the old one, read by all that read it; nodes that were made."""
        old = product.outputs[0]
        out.type = old.type
        for reader in [use.node for use in old.uses()] if turned else []:
            swapped = reader.outputs[0]
            if perm_of(swapped) == SWAPPED and not swapped.is_graph_output():
                out.shape = out.shape or swapped.shape
                swapped.replace_all_uses_with(out)
        if any(u.node.outputs[0].uses() for u in old.uses()) or old.is_graph_output():
            self._replace(old, self.emit("Transpose", out, perm=SWAPPED) if turned else out)
        nodes = self.emit.nodes
        self._register()
        product.graph.insert_before(product, nodes)
        return nodes

    def _replace(self, old: Any, new: Any) -> None:
        """The new value for the old one; under its name, where that is an output."""
        import onnx_ir

        new.type, new.shape = old.type, old.shape
        named = old.is_graph_output()
        onnx_ir.convenience.replace_all_uses_with([old], [new], replace_graph_outputs=True)
        if named:
            new.name, old.name = old.name, f"{old.name}.spelled"

    def _register(self) -> None:
        """Constants as initializers, under other names where theirs are taken."""
        for key, value in list(self.emit.constants.items()):
            held = self.graph.initializers.get(value.name)
            if held is value:
                continue
            if held is not None and not held.is_graph_input() and _equal(held, value):
                value.replace_all_uses_with(held)
                self.emit.constants[key] = held
                continue
            while value.name in self.graph.initializers:
                value.name = f"{value.name}.own"
            self.graph.register_initializer(value)


def _scale(scale: float) -> dict[str, Any]:
    import onnx_ir

    return {"scale": onnx_ir.AttrFloat32("scale", scale)}


def _equal(held: Any, value: Any) -> bool:
    return tensors_equal(held.const_value, value.const_value)


def _is_finite(mask: Mask) -> bool:
    """Whether what is added is provably no infinity."""
    if mask.fill is not None:
        return mask.fill > -torch.inf
    held = constant(mask.value)
    if held is not None:
        return bool(abs(held).max() < float("inf"))
    node = mask.value.producer()
    if is_standard(node, "Where"):
        chosen = [number(v) for v in node.inputs[1:]]
        return all(n is not None and abs(n) < float("inf") for n in chosen)
    return False
