"""Operands in the four axes that fused attention kernels take, and the result as it was."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.errors import IllegalRewriteError
from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites.products import Operand, Product
from graphopt.program import val
from graphopt.rewrite import Builder
from graphopt.rewrite.stride import restride, same_layout

aten = torch.ops.aten


class Layout:
    """Batch axes of one attention: those of the query, or of ``view`` where masks saw another view.

    One batch axis, ``(N, rows, features)``, becomes two, ``(N, 1, rows, features)``: kernels take
    four axes, and keep that of the heads inside the rows in memory. More than two are flattened.
    """

    def __init__(self, query: Operand, view: list[Any] | None, build: Builder) -> None:
        self.build = build
        self.outer = [build.size(query.node, d) for d in query.leading]
        self.lead = self.outer if view is None else list(view[:-2])
        self.regrouped = view is not None

    def enter(self, operand: Operand) -> fx.Node:
        """The operand with the common batch axes in four axes, its last axis dense."""
        build, node = self.build, operand.build(self.build)
        if (
            not self._fits(node)
            and len(operand.shape) <= len(self.outer) + 2
            and self._spreads(node)
        ):
            node = build(aten.expand.default, node, [*self.outer, *self._matrix(node)])
        if not self._fits(node):
            node = build(aten.reshape.default, node, [*self.lead, *self._matrix(node)])
        if not statically_known_true(val(node).stride()[-1] == 1):
            node = build(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self._four_axes(node)

    def enter_mask(self, mask: fx.Node) -> fx.Node:
        """The mask in axes that broadcast with those of the operands."""
        if len(self.lead) > 2 and val(mask).dim() > 2:
            sizes = [*self.lead, *self._matrix(mask)]
            return self._four_axes(self.build(aten.expand.default, mask, sizes))
        if val(mask).dim() < 2:
            mask = self.build(aten.unsqueeze.default, mask, 0)
        if val(mask).dim() == len(self.lead) + 2 == 3:
            return self.build(aten.unsqueeze.default, mask, 1)
        return mask

    def leave(self, out: fx.Node, product: Product, value: Operand) -> fx.Node:
        """The result with the axes of the original product, fit for everything downstream.

        A fused kernel leaves ``(batch, rows, heads, features)`` in memory, the plain one is
        contiguous as the original was; which of them runs is known only on real tensors. Where the
        fake one is contiguous, the real one is made so at no cost; otherwise views downstream must
        bear both.
        """
        if len(self.lead) > 2:
            out = self.build(aten.reshape.default, out, [*self.lead, *self._matrix(out)])
        if len(self.lead) < 2:
            out = self.build(aten.squeeze.dim, out, 1)
        if not self.lead:
            out = self.build(aten.squeeze.dim, out, 0)
        made = self._original_axes(out, product, value)
        if not same_layout(val(product.node), val(made)):
            with suppress(IllegalRewriteError):
                restride({product.node: made}, self.build)
                return made
        return self._original_axes(self.build(aten.contiguous.default, out), product, value)

    def _original_axes(self, out: fx.Node, product: Product, value: Operand) -> fx.Node:
        if product.out != tuple(range(len(product.out))):
            out = self.build(aten.permute.default, out, list(product.out))
        if not same_sizes(val(out).shape, val(product.node).shape):
            sizes = [self.build.size(value.node, d) for d in value.leading]
            out = self.build(aten.reshape.default, out, [*sizes, *self._matrix(out)])
        return out

    def _fits(self, node: fx.Node) -> bool:
        return same_sizes(val(node).shape[:-2], [val(s) for s in self.lead])

    def _spreads(self, node: fx.Node) -> bool:
        """Whether the batch axes differ from the query's by broadcasting only."""
        shape = val(node).shape[:-2]
        tail = [val(s) for s in self.outer][len(self.outer) - len(shape) :]
        same = [statically_known_true(a == b) for a, b in zip(shape, tail, strict=True)]
        ones = [statically_known_true(a == 1) for a in shape]
        return all(s or o for s, o in zip(same, ones, strict=True))

    def _matrix(self, node: fx.Node) -> list[Any]:
        return [self.build.size(node, -2), self.build.size(node, -1)]

    def _four_axes(self, node: fx.Node) -> fx.Node:
        if len(self.lead) > 2:
            sizes = [-1, self.lead[-1], *self._matrix(node)]
            return self.build(aten.reshape.default, node, sizes)
        if not self.lead:
            node = self.build(aten.unsqueeze.default, node, 0)
        return self.build(aten.unsqueeze.default, node, 1) if len(self.lead) < 2 else node
