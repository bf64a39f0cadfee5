"""Replaying a pass on real values: each rewrite is measured where it happened.

The program as it was before the pass runs once per set of inputs. As soon as the boundary values of
a rewrite exist, both versions of the piece run on them (and a float64 version of the original),
outputs and vector-Jacobian products are compared, and the values of new nodes join the environment,
because a later rewrite of the same pass may start from them. Values are freed after their last use,
so memory stays near that of one forward pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.analysis.flow import ancestors
from graphopt.kernels.filtering import kept
from graphopt.program import Program, is_random, val
from graphopt.rewrite.driver import Log, Rewrite
from graphopt.rewrite.rule import Numeric, Rule
from graphopt.rewrite.subgraph import DROPOUT_P, Subgraph, float64_by_default
from graphopt.verify.fidelity import Energy, energy
from graphopt.verify.filtered import full_piece
from graphopt.verify.inputs import is_empty
from graphopt.verify.measure import ABOVE, Measure, compare, worst
from graphopt.verify.timing import Pace

SEED = 20240


@dataclass
class Verdict:
    """What replaying showed for one rewrite: errors of outputs and of gradients, and its speed.

    ``pace`` holds the times of the original and the new piece, where they were measured;
    ``energies`` of a lossy rewrite are those of its floating outputs; ``share`` is how much of the
    gradient products a filter kept, on the first inputs.
    """

    rewrite: Rewrite
    outputs: Measure
    gradients: Measure | None = None
    runs: int = 0
    pace: Pace | None = None
    notes: list[str] = field(default_factory=list)
    energies: tuple[Energy, ...] = ()
    share: float | None = None

    @property
    def ok(self) -> bool:
        return self.outputs.ok and (self.gradients is None or self.gradients.ok)

    def merge(self, other: Verdict) -> Verdict:
        """Both verdicts as one: the worse errors, all runs."""
        found = [g for g in (self.gradients, other.gradients) if g is not None]
        return Verdict(
            self.rewrite,
            worst([self.outputs, other.outputs]),
            worst(found) if found else None,
            self.runs + other.runs,
            self.pace or other.pace,
            list(dict.fromkeys(self.notes + other.notes)),
            self._joined(other),
            other.share if self.share is None else self.share,
        )

    def _joined(self, other: Verdict) -> tuple[Energy, ...]:
        if not self.energies or not other.energies:
            return self.energies or other.energies
        return tuple(a + b for a, b in zip(self.energies, other.energies, strict=True))


def excuse_cancelled(verdicts: Sequence[Verdict]) -> None:
    """Pass sets of inputs on which the values of a lossy rewrite cancel, where noise is small.

    A few rows may come to nearly nothing (what attention reads of a token that is alone), and any
    rounding is large beside that. So where a set is above the bound, its noise is held against the
    RMS of the values over all sets, if that is larger. What computes something else for few rows is
    still off by as much as its values.

    Args:
        verdicts: of one rewrite, one for each set; they are changed.
    """
    if not all(v.energies for v in verdicts):
        return
    whole = [sum(sets[1:], sets[0]) for sets in zip(*(v.energies for v in verdicts), strict=True)]
    for verdict in verdicts:
        found = verdict.outputs
        if found.ok or found.note != ABOVE:
            continue
        errors = [each.beside(all_) for each, all_ in zip(verdict.energies, whole, strict=True)]
        if max(errors) <= found.bound:
            verdict.outputs = replace(found, rms=max(errors), ok=True, note="")


class Replay(fx.Interpreter):
    """Runs ``before`` on user inputs and judges every rewrite of ``log`` on the way."""

    def __init__(self, before: Program, log: Log, stopwatch: Any = None) -> None:
        graph = without_dropout(before.graph)
        super().__init__(fx.GraphModule(before.graph_module, graph), garbage_collect_values=False)
        self.program, self.stopwatch = before, stopwatch
        self.values: dict[str, Any] = {}
        self.verdicts: list[Verdict] = []
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self.rewrites = log.rewrites
        self.missing = [0] * len(self.rewrites)
        self.uses: Counter[str] = Counter()
        self.differentiable = before.differentiable()
        self.fixed = _fixed(before, self.differentiable)
        self._plan(graph)
        self.needed = ancestors(n for n in graph.nodes if n.name in self.waiting)

    def _plan(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            self.uses.update(a.name for a in node.all_input_nodes)
        for index, rewrite in enumerate(self.rewrites):
            names = set(rewrite.before.activations) | set(rewrite.after.activations)
            self.missing[index] = len(names)
            self.uses.update(names)
            for name in names:
                self.waiting[name].append(index)

    def judge(self, user_inputs: Sequence[Any]) -> list[Verdict]:
        """Run once; one verdict per rewrite, in the order in which their inputs became known."""
        ready = [index for index, count in enumerate(self.missing) if count == 0]
        for index in ready:
            self._process(index)
        given = iter(user_inputs)
        targets = [self.program.inputs[n.name].target for n in self.program.placeholders()]
        flat = [next(given) if t is None else self.program.state[t] for t in targets]
        with torch.no_grad():
            self.run(*flat, enable_io_processing=False)
        return self.verdicts

    def run_node(self, n: fx.Node) -> Any:
        """Run what a rewrite reads, or depends on; nothing behind the last of them."""
        ends = n.op in ("placeholder", "output")
        value = super().run_node(n) if ends or n in self.needed else None
        if n.op != "output":
            self._know(n.name, value)
        for used in n.all_input_nodes:
            self._release(used.name, used)
        return value

    def _know(self, name: str, value: Any) -> None:
        self.values[name] = value
        for index in self.waiting.pop(name, ()):
            self.missing[index] -= 1
            if self.missing[index] == 0:
                self._process(index)

    def _release(self, name: str, node: fx.Node | None = None) -> None:
        self.uses[name] -= 1
        if self.uses[name] <= 0:
            self.values.pop(name, None)
            if node is not None:
                self.env.pop(node, None)

    def _process(self, index: int) -> None:
        rewrite = self.rewrites[index]
        before = [self._value(rewrite.before, n) for n in rewrite.before.inputs]
        after = [self._value(rewrite.after, n) for n in rewrite.after.inputs]
        verdict, made = judge(rewrite, before, after, self._asked(rewrite.before))
        if self.stopwatch is not None and verdict.ok:
            verdict.pace = self.stopwatch(rewrite, before, after)
        self.verdicts.append(verdict)
        for name, value in made.items():
            if self.uses[name] > 0:
                self._know(name, value)
        for name in set(rewrite.before.activations) | set(rewrite.after.activations):
            self._release(name)

    def _asked(self, piece: Subgraph) -> list[str]:
        """Boundary inputs that gradients are compared for: whatever depends on one asked for."""
        pairs = zip(piece.inputs, piece.sources, strict=True)
        return [
            name
            for name, node in pairs
            if name not in self.fixed and (node.op != "placeholder" or name in self.differentiable)
        ]

    def _value(self, piece: Subgraph, name: str) -> Any:
        return piece.state[name] if name in piece.state else self.values[name]


def _fixed(program: Program, differentiable: Collection[str]) -> frozenset[str]:
    """Nodes that no gradient reaches: computed from constants, sizes and integers alone."""
    state = {n.name for n in program.state_nodes()} if program.frozen else set()
    reached = set(differentiable) - state
    for node in program.graph.nodes:
        if any(a.name in reached for a in node.all_input_nodes) and _may_carry(val(node)):
            reached.add(node.name)
    return frozenset(n.name for n in program.graph.nodes if n.name not in reached)


def _may_carry(value: Any) -> bool:
    """Whether a value can pass a gradient on: floating, or several values of which one may be."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, list | tuple)


def judge(
    rewrite: Rewrite, before: Sequence[Any], after: Sequence[Any], asked: Sequence[str]
) -> tuple[Verdict, dict[str, Any]]:
    """Measure one rewrite on boundary values; also returns the values of its new nodes.

    Args:
        asked: boundary inputs that gradients are compared for.
    """
    numeric, tolerance = rewrite.rule.numeric, rewrite.rule.tolerance
    old, _ = _evaluate(rewrite.before, before)
    try:
        new, made = _evaluate(rewrite.after, after)
    except Exception as error:  # compilers of kernels have kinds of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        note = f"the new piece fails: {first}"
        return Verdict(rewrite, Measure(1.0, 1.0, 0.0, 0.0, False, note), runs=1), {}
    exact = old
    if numeric is not Numeric.BITWISE:
        with float64_by_default():
            exact, _ = _evaluate(rewrite.before.wide, [_double(v) for v in before])
    rows = [compare(o, n, e, numeric, tolerance) for o, n, e in zip(old, new, exact, strict=True)]
    verdict = Verdict(rewrite, worst(rows), runs=1)
    if numeric is Numeric.LOSSY and (verdict.outputs.ok or verdict.outputs.note == ABOVE):
        found = map(energy, new, exact)
        verdict.energies = tuple(each for each in found if each is not None)
    if any(isinstance(o, Tensor) and o.is_floating_point() and bool(o.isnan().any()) for o in old):
        verdict.notes.append("the original gives NaN here: gradients are not compared")
    elif not is_empty(before):  # some kernels divide by the number of elements, and crash
        _judge_gradients(verdict, before, after, asked)
    return verdict, made


def _judge_gradients(
    verdict: Verdict, before: Sequence[Any], after: Sequence[Any], asked: Sequence[str]
) -> None:
    """Compare vector-Jacobian products for one random cotangent, in float64 too.

    Where the new piece filters its gradients, they are compared in full first, and then as they are
    with what the rule allows.
    """
    rewrite = verdict.rewrite
    shared = [n for n in asked if n in rewrite.after.inputs]
    try:
        old = _gradients(rewrite.before, before, shared)
    except RuntimeError as error:
        verdict.notes.append(f"no gradient to compare: {str(error).splitlines()[0]}")
        return
    if old is None:
        return
    with float64_by_default():
        wide = _gradients(rewrite.before.wide, [_double(v) for v in before], shared) or old
    full = full_piece(rewrite.after)
    verdict.gradients = _compared(
        rewrite.rule, _gradients_or_none(full, after, shared, old), old, wide
    )
    if full is not rewrite.after and verdict.gradients.ok:
        with kept() as shares:
            new = _gradients_or_none(rewrite.after, after, shared, old)
        verdict.share = sum(map(float, shares)) / len(shares) if shares else None
        tolerance = rewrite.rule.gradient_tolerance
        verdict.gradients = _compared(rewrite.rule, new, old, wide, tolerance)
        verdict.notes.append(rewrite.rule.caveat)


def _compared(
    rule: Rule,
    new: Sequence[Tensor] | None,
    old: Sequence[Tensor],
    wide: Sequence[Tensor],
    filtered: float = 0.0,
) -> Measure:
    """The worst of all gradients.

    Args:
        filtered: the relative RMS error that is allowed where the criterion itself is not met.
    """
    if new is None:
        return Measure(1.0, 1.0, 0.0, 0.0, False, "the new piece has no gradient")
    numeric, rows = rule.numeric, []
    if numeric is Numeric.BITWISE:
        numeric = Numeric.REASSOCIATED  # sums over users of a shared value may be reordered
    for values in zip(old, new, wide, strict=True):
        found = compare(*values, numeric, rule.tolerance)
        if filtered:
            lossy = compare(*values, Numeric.LOSSY, filtered)
            found = replace(found, bound=filtered) if found.ok else lossy
        rows.append(found)
    return worst(rows)


def _gradients_or_none(
    piece: Subgraph, values: Sequence[Any], names: list[str], old: list[Tensor]
) -> list[Tensor] | None:
    """The new gradients; zeros where the new piece reads nothing that the old ones flow to."""
    try:
        found = _gradients(piece, values, names)
    except RuntimeError:
        return None
    if found is None and not any(bool(g.any()) for g in old):
        return old
    return found


def _gradients(piece: Subgraph, values: Sequence[Any], names: list[str]) -> list[Tensor] | None:
    """Gradients of ``sum(output * cotangent)`` with respect to the named floating inputs."""
    with torch.enable_grad():
        leaves = [_leaf(v) if n in names else v for n, v in zip(piece.inputs, values, strict=True)]
        results = [r for r in _evaluate(piece, leaves)[0] if _differentiable(r)]
        chosen = [leaves[piece.inputs.index(n)] for n in names]
        wanted = [t for t in chosen if isinstance(t, Tensor) and t.requires_grad]
        if not results or not wanted:
            return None
        found = torch.autograd.grad(results, wanted, _cotangents(results), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def _cotangents(results: Iterable[Tensor]) -> list[Tensor]:
    """Random ones; those of single numbers are positive, as losses that cancel leave only noise."""
    generator = torch.Generator().manual_seed(SEED)
    made = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    made = [m if m.dim() else m.abs() + 0.5 for m in made]
    return [m.to(r.device, r.dtype) for m, r in zip(made, results, strict=True)]


def _evaluate(piece: Subgraph, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run a piece with dropout off; returns its outputs and every inner value by program name."""
    graph = without_dropout(piece.graph)
    runner = _Recorder(piece.root, graph=graph)
    with _seeded() if any(map(is_random, graph.nodes)) else nullcontext():
        results = runner.run(*values, enable_io_processing=False)
    made = {n: runner.seen.get(inner.name) for n, inner in piece.names.items()}
    return tuple(pytree.tree_leaves(results)), made


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


def without_dropout(graph: fx.Graph) -> fx.Graph:
    """The graph itself, or a copy in which every dropout probability is zero."""
    if not any(n.target in DROPOUT_P for n in graph.nodes):
        return graph
    twin = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = twin.node_copy(node, copies.__getitem__)
        position = DROPOUT_P.get(node.target)
        if position is not None and len(node.args) > position:
            args = list(copies[node].args)
            args[position] = 0.0
            copies[node].args = tuple(args)
    return twin


def _double(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if wide else value


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    plain = value.detach()
    return plain.requires_grad_() if plain.is_floating_point() else plain


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
