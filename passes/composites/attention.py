"""Attention written out by hand becomes ``scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites import attention_examples as cases
from graphopt.passes.composites.layout import Layout
from graphopt.passes.composites.masks import Masking, build_mask, read_masks, restore_nan
from graphopt.passes.composites.products import Operand, Product, crossed_axes, peeled
from graphopt.passes.composites.scores import Scores, distance, read_scores
from graphopt.passes.composites.weights import Weighing, read_weighing
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Refusal, Rule, arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """Everything the composite needs; operands are of one dtype, ``scale`` is complete."""

    scores: Scores
    weighing: Weighing
    query: Operand
    key: Operand
    value: Operand
    scale: float
    masking: Masking

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        """Nodes of operands that the composite looks through."""
        return (*self.query.through, *self.key.through, *self.value.through)


class RecognizeAttention(Rule):
    """``softmax(scale q k^T + mask) v = scaled_dot_product_attention(q, k, v, mask, scale=scale)``.

    Vaswani et al. 2017, equation 1. The key is the scores' right factor, transposed here: nothing
    is assumed about how the user came by it.

    Gradients in training mode are those of torch's fused kernels. They have no second derivative,
    and where a finite mask hides a row entirely they are wrong; so such masks are refused there. In
    eval mode, where only inputs have gradients, `OptimizedModule` asks for them unfused: a row that
    ``masked_fill`` hides entirely behind a finite number has those of an added mask.
    """

    benefit = 10

    def __init__(self, assume_visible: bool = False) -> None:
        self.assume_visible = assume_visible

    def find(self, program: Program) -> Iterator[Candidate]:
        for softmax in program.graph.find_nodes(op="call_function", target=aten.softmax.int):
            if distance(softmax.args[0]) is None:
                continue
            weighing = read_weighing(program, softmax)
            if weighing is not None:
                yield Candidate(self._match(program, softmax, weighing))

    def _match(self, program: Program, softmax: fx.Node, weighing: Weighing | Refusal) -> Match:
        found = self._read(program, softmax, weighing)
        if isinstance(found, Refusal):
            return Match(program, (softmax,), (softmax,), {"problem": found})
        product, inner = found.weighing.product.node, found.inner
        nodes = (product, *found.weighing.nodes, softmax, *found.scores.nodes, *inner)
        operands = {"q": found.query.node, "k": found.key.node, "v": found.value.node}
        masks = {f"mask{i}": n for i, n in enumerate(found.masking.nodes)}
        factors = {f"factor{i}": n for i, n in enumerate(found.scores.factors)}
        bound = {"attention": found, **operands, **masks, **factors}
        return Match(program, (product,), tuple(dict.fromkeys(nodes)), bound, frozenset(inner))

    def _read(
        self, program: Program, softmax: fx.Node, weighing: Weighing | Refusal
    ) -> Attention | Refusal:
        if isinstance(weighing, Refusal):
            return weighing
        if (dim := _last_axis(softmax)) is not None:
            return Refusal(f"softmax runs over axis {dim}, not over the keys", softmax)
        scores = read_scores(program, softmax.args[0])
        if isinstance(scores, Refusal):
            return scores
        operands = _operands(program, scores.product, weighing.product)
        if isinstance(operands, Refusal):
            return operands
        query, key, value = operands
        rows, columns = query.shape[-2], key.shape[-2]
        masking = read_masks(
            program, scores.masks, rows, columns, assume_visible=self.assume_visible
        )
        if isinstance(masking, Refusal):
            return masking
        if refusal := _misfit(scores, weighing, query, value, masking):
            return refusal
        scale = scores.scale * query.factor * key.factor
        return Attention(scores, weighing, query, key, value, scale, masking)

    def check(self, match: Match) -> Refusal | None:
        return match.get("problem")

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        found: Attention = match["attention"]
        layout = Layout(found.query, found.scores.view, build)
        q, k, v = (layout.enter(o) for o in (found.query, found.key, found.value))
        for factor in found.scores.factors:
            q = build(aten.mul.Tensor, q, layout.enter_mask(factor))
        mask, masking = None, found.masking
        if not masking.empty and not masking.causal:
            mask = layout.enter_mask(build_mask(masking, val(found.scores.work).dtype, build))
        out = build(
            aten.scaled_dot_product_attention.default,
            *(q, k, v, mask),
            is_causal=masking.causal,
            scale=found.scale,
        )
        if mask is not None:
            out = restore_nan(masking, mask, out, build)
        return layout.leave(out, found.weighing.product, found.value)

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def examples(self) -> Iterable[Example]:
        return cases.examples()

    def near_misses(self) -> Iterable[Example]:
        return cases.near_misses()


def _last_axis(softmax: fx.Node) -> int | None:
    """The softmax's axis where it is not the last."""
    rank, dim = val(softmax).dim(), arguments(softmax)["dim"]
    return None if dim % rank == rank - 1 else dim


def _operands(
    program: Program, product: Product, weighing: Product
) -> tuple[Operand, Operand, Operand] | Refusal:
    value = replace(weighing.right, order=_swap(weighing.right.order))
    dtype = val(value.node).dtype
    query, key = (peeled(program, o, dtype) for o in (product.left, product.right))
    for name, operand in (("key", key), ("value", value)):
        if crossed_axes(query, operand):
            reason = f"the {name}'s heads and tokens are permuted differently from the query's"
            return Refusal(reason, operand.node)
    dtypes = {val(o.node).dtype for o in (query, key, value)}
    if len(dtypes) > 1 or not dtype.is_floating_point:
        return Refusal("query, key and value differ in dtype or are not floating", weighing.node)
    if len(query.shape) < 2:
        return Refusal("the query is a vector", product.node)
    return query, key, value


def _swap(order: tuple[int, ...]) -> tuple[int, ...]:
    return (*order[:-2], order[-1], order[-2])


def _misfit(
    scores: Scores, weighing: Weighing, query: Operand, value: Operand, masking: Masking
) -> Refusal | None:
    """Shapes and dtypes that the composite could not reproduce."""
    product, last = scores.product, weighing.product
    if product.out != tuple(range(len(product.out))):
        return Refusal("the scores are laid out with other axes last", product.node)
    if not same_sizes(query.shape[:-2], val(product.node).shape[:-2]):
        return Refusal("the query is broadcast over batch axes", product.node)
    if scores.view is None and not same_sizes(val(scores.work).shape, val(product.node).shape):
        return Refusal("a mask broadcasts the scores", scores.work)
    if scores.view is not None and scores.factors:
        return Refusal("scores scaled per head are regrouped", scores.factors[0])
    weights = val(last.left.node).shape
    regrouped = not same_sizes(weights, val(scores.work).shape)
    if regrouped and not same_sizes(value.shape[:-2], weights[:-2]):
        return Refusal("the weights are regrouped and the value is broadcast", last.node)
    allowed = (torch.bool, torch.float32, val(query.node).dtype)
    odd = next((n for n in masking.nodes if val(n).dtype not in allowed), None)
    return Refusal(f"the mask is {val(odd).dtype}", odd) if odd is not None else None
