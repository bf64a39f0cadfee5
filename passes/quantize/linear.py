"""``linear`` with a weight of the model, the weight quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import examples
from graphopt.passes.quantize.plan import Plan, Settings, rounded
from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten

ROUNDING = 0.0083
"""Relative RMS error of Gaussian weights rounded to 8 bits per output channel, as measured; a bit
less doubles it."""

SPARE = 2.5
"""Times that error is allowed: channels have outliers, and what is summed up cancels."""

ACTIVATIONS = 0.03
"""Allowed besides for activations in 8 bits."""


class QuantizeLinear(Rule):
    """``linear(x, W, b) = quantized_linear(x, Q(W), b)`` but for the rounding of ``Q``.

    ``Q`` is what the plan has for a weight, and else rounds it; with activations in 8 bits each row
    of ``x`` has a scale of its own (Yao et al. 2022, ZeroQuant, section 4.1). Products on one
    weight are rewritten together. One whose error on the inputs at hand is above `tolerance` keeps
    its weight.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.LOSSY
    folds = False

    def __init__(self, settings: Settings, plan: Plan, *, head: bool = False) -> None:
        self.settings, self.plan, self.head = settings, plan, head
        scheme, activations = settings.scheme, settings.activations
        loss = SPARE * ROUNDING * 2 ** (8 - scheme.bits)
        if scheme.dtype != "int" and scheme.bits == 8:
            loss *= 4  # E4M3 has 3 bits behind the point
        self.tolerance = min(0.9, loss + (ACTIVATIONS if activations != "none" else 0.0))

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        weights = program.weights()
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            weight = arguments(node)["weight"]
            if weight in weights:
                groups.setdefault(weight, []).append(node)
        for weight, products in groups.items():
            yield Candidate(Match(program, tuple(products), tuple(products), {"weight": weight}))

    def check(self, match: Match) -> Refusal | None:
        program, weight = match.program, match["weight"]
        if not program.frozen or not program.is_constant(weight):
            return Refusal("the model trains: its weights change", match.root)
        fake = val(weight)
        if fake.dim() != 2 or fake.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Refusal(f"a weight {fake.dtype} {tuple(fake.shape)} is not quantized", weight)
        other = next((u for u in weight.users if u not in match.nodes), None)
        if other is not None:
            reason = f"`{other.name}` reads the weight too: quantized it would be held twice"
            return Refusal(reason, other)
        if not self.head and (shown := _shown(match.nodes)) is not None:
            reason = f"`{shown.name}` is an output of the model: errors of a head are its own"
            return Refusal(reason, shown, "QuantizeMatmul:head=True")
        return self._refusal(program.tensor(weight), weight)

    def _refusal(self, tensor: torch.Tensor, weight: fx.Node) -> Refusal | None:
        try:
            self.settings.scheme.groups(tensor.shape[1])
        except ValueError as error:
            return Refusal(str(error), weight)
        if not tensor.isfinite().all():
            return Refusal("the weight holds NaN or infinity", weight)
        return None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        weight = match["weight"]
        name = match.program.target_of(weight) or weight.name
        tensor, settings = match.program.tensor(weight), self.settings
        stored = self.plan.weights.get(name) or rounded(tensor, settings.scheme, settings.methods)
        held = {k: build.state(f"{name}_{k}", tensor) for k, tensor in stored.tensors.items()}
        return tuple(self._call(node, held, build) for node in match.nodes)

    def _call(self, node: fx.Node, held: dict[str, fx.Node], build: Builder) -> fx.Node:
        given, scheme = arguments(node), self.settings.scheme
        made: fx.Node = build(
            torch.ops.graphopt.quantized_linear.default,
            given["input"],
            *(held.get(k) for k in ("codes", "scales", "zeros", "tensor_scale")),
            given["bias"],
            scheme.bits,
            scheme.dtype,
            scheme.group_size,
            scheme.symmetric,
            self.settings.activations,
        )
        return made

    def remark(self, match: Match) -> str:
        fake = val(match["weight"])
        bits = self.settings.scheme.bits
        told = f"`{match['weight'].name}` {tuple(fake.shape)} is stored in {bits} bits"
        note = self.plan.notes.get(match.program.target_of(match["weight"]) or "")
        return f"{told}; {note}" if note else told

    def examples(self) -> Iterable[Example]:
        return examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return examples.near_misses()


_PLAIN = frozenset(
    {"_to_copy", "clone", "reshape", "view", "slice", "select", "alias", "unsqueeze"}
)
"""Operators that show numbers without computing others."""


def _shown(products: Sequence[fx.Node]) -> fx.Node | None:
    """A product that the caller gets as it is, or as views of it."""
    queue, seen = [*products], set(products)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.op == "output":
                return node
            name = getattr(user.target, "_opname", "")
            if user not in seen and name in _PLAIN:
                seen.add(user)
                queue.append(user)
    return None
