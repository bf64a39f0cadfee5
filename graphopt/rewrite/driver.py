"""Applying rules to a program until nothing changes, with every step recorded.

Each round collects all candidates on the current graph, orders them by declared benefit and then by
graph order, and applies those that do not overlap. Rounds repeat to a fixpoint; a bound on the
number of rewrites turns a pair of rules that undo each other into an error that names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from graphopt.errors import IllegalRewriteError
from graphopt.program import Program, operator_name, val
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Refusal
from graphopt.rewrite.rule import Candidate, Missed, Numeric, Rule
from graphopt.rewrite.stride import restride
from graphopt.rewrite.subgraph import Subgraph, extract
from graphopt.source import source_line

REWRITES_PER_NODE = 8

Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Rewrite:
    """One applied rewrite: what was there, what stands there now.

    Attributes:
        key: rule name and root names; the same in every copy of the program.
        before, after: the two subgraphs over the same boundary, for verification and timing.
        remark: what the rule says it gained.
        weights: of a lossy rule, names of the weights that it takes (bound as ``"weight"``).
    """

    rule: Rule
    key: Key
    before: Subgraph
    after: Subgraph
    removed: tuple[str, ...]
    added: tuple[str, ...]
    source: str | None
    remark: str = ""
    weights: tuple[str, ...] = ()


@dataclass
class Log:
    """What one run of the driver did."""

    rewrites: list[Rewrite] = field(default_factory=list)
    missed: dict[tuple[str, str], Missed] = field(default_factory=dict)

    def miss(self, rule: Rule, refusal: Refusal, match: Match | None, stage: str = "check") -> None:
        node = refusal.node or (match.root if match else None)
        place = (rule.name, match.root.name if match else node.name if node else "")
        found = Missed(
            rule.name,
            refusal.reason,
            node.name if node else None,
            (source_line(node) if node else None) or (source_line(match.root) if match else None),
            refusal.option,
            stage,
            weights=_weights(rule, match),
        )
        self.missed.setdefault(place, found)


def apply_rules(program: Program, rules: Sequence[Rule], banned: Collection[Key] = ()) -> Log:
    """Rewrite ``program`` in place to a fixpoint; candidates whose key is banned are skipped."""
    log = Log()
    limit = REWRITES_PER_NODE * len(program.graph.nodes) + 64
    while True:
        applied = _round(program, rules, banned, log)
        program.graph.eliminate_dead_code(is_impure_node=_is_impure)
        if not applied:
            break
        if len(log.rewrites) > limit:
            busiest = Counter(r.rule.name for r in log.rewrites).most_common(2)
            names = " and ".join(name for name, _ in busiest)
            raise IllegalRewriteError(f"no fixpoint after {limit} rewrites: {names} keep firing")
    _forget_rewritten(log)
    program.drop_unused_state()
    program.lint()
    program.recompile()
    return log


def _round(program: Program, rules: Sequence[Rule], banned: Collection[Key], log: Log) -> int:
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    candidates = [found for rule in rules for found in _find(rule, program)]
    for rule, candidate, _ in candidates:
        if candidate.trace is not None:
            log.miss(rule, Refusal(candidate.trace.reason, candidate.trace.culprit), None, "match")
    matches = [(rule, c.match, read) for rule, c, read in candidates if c.match is not None]
    matches.sort(key=lambda pair: (-pair[0].benefit, order[pair[1].root]))
    touched: set[fx.Node] = set()
    applied = 0
    for rule, match, read in matches:
        program.read = set(read)
        if (rule.name, match.key) in banned or not touched.isdisjoint(match.nodes):
            continue
        if not touched.isdisjoint(_bound_nodes(match)):
            continue
        refusal = (
            legality(match, order, rule.apart)
            or rule.check(match)
            or _apply(program, rule, match, log)
        )
        if refusal is not None:
            log.miss(rule, refusal, match)
            continue
        touched.update(n for n in match.nodes if n not in match.escapes)
        _erase_dead(match, order)
        program.relied |= program.read
        applied += 1
    if applied:
        _sort(program.graph)
    return applied


def _find(rule: Rule, program: Program) -> Iterator[tuple[Rule, Candidate, frozenset[str]]]:
    """Candidates, each with the names of state that were looked at to find it."""
    program.read.clear()
    for candidate in rule.find(program):
        yield rule, candidate, frozenset(program.read)
        program.read.clear()


def legality(match: Match, order: Mapping[fx.Node, int], apart: bool = False) -> Refusal | None:
    """Values the rewrite would remove must not be needed elsewhere, and no cycle may arise."""
    inside = set(match.nodes)
    for node in match.nodes:
        if node in match.roots or node in match.escapes:
            continue
        outside = next((user for user in node.users if user not in inside), None)
        if outside is not None:
            return Refusal(_escape_reason(match.program, node, outside), node)
    return _cycle(match, order) if len(match.roots) > 1 and not apart else None


def _escape_reason(program: Program, node: fx.Node, user: fx.Node) -> str:
    name = f"`{node.name}` ({operator_name(node.target)})"
    if user.op != "output":
        return f"the intermediate {name} is also used by `{user.name}`"
    position = program.results().index(node)
    kind = program.outputs[position].kind.value.replace("_", " ")
    return f"the intermediate {name} is also an output of the model ({kind})"


def _cycle(match: Match, order: Mapping[fx.Node, int]) -> Refusal | None:
    """For several roots: an input of the match must not depend on one of the values replaced.

    ``order`` is the graph order at the start of the round; nothing after the last input matters.
    """
    inside = set(match.nodes)
    boundary = {a for n in match.nodes for a in n.all_input_nodes if a not in inside}
    last = max((order.get(n, len(order)) for n in boundary), default=-1)
    queue = [u for root in match.roots for u in root.users if u not in inside]
    seen = set(queue)
    while queue:
        node = queue.pop()
        if node in boundary:
            return Refusal(f"input `{node.name}` depends on a value that would be replaced", node)
        users = (u for u in node.users if order.get(u, 0) <= last)
        fresh = [u for u in users if u not in seen and u not in inside]
        seen.update(fresh)
        queue.extend(fresh)
    return None


def _apply(program: Program, rule: Rule, match: Match, log: Log) -> Refusal | None:
    build = Builder(program, match.root, rule.name, folds=rule.folds)
    remark, weights = rule.remark(match), _weights(rule, match)
    before = extract(program, list(match.roots), set(match.nodes))
    try:
        made = rule.rewrite(match, build)
        values = made if isinstance(made, tuple) else (made,)
        _check_replacement(match, values)
        updates = restride(dict(zip(match.roots, values, strict=True)), build)
    except IllegalRewriteError as error:
        build.discard()
        return Refusal(f"cannot be built legally: {error.what}")
    inside = set(match.nodes) | set(build.new_nodes)
    after = extract(program, list(values), inside, like=before)
    for root, value in zip(match.roots, values, strict=True):
        root.replace_all_uses_with(value, propagate_meta=False)
    for node, fake in updates.items():
        node.meta["val"] = fake
    log.rewrites.append(
        Rewrite(
            rule,
            (rule.name, match.key),
            before,
            after,
            tuple(n.name for n in match.nodes),
            tuple(n.name for n in build.new_nodes),
            source_line(match.root),
            remark,
            weights,
        )
    )
    return None


def _weights(rule: Rule, match: Match | None) -> tuple[str, ...]:
    bound = match.get("weight") if match is not None and rule.numeric is Numeric.LOSSY else None
    if match is None or not isinstance(bound, fx.Node) or match.program.target_of(bound) is None:
        return ()
    return tuple(match.program.weight_names(bound))


def _erase_dead(match: Match, order: Mapping[fx.Node, int]) -> None:
    """Erase what the rewrite left without users; dead-code elimination would keep asserts and
    random draws, which stand in the match because the rule accounts for them."""
    graph = match.program.graph
    for node in sorted(match.nodes, key=order.__getitem__, reverse=True):
        if not node.users and node not in match.escapes:
            graph.erase_node(node)


def _check_replacement(match: Match, values: tuple[Any, ...]) -> None:
    if len(values) != len(match.roots):
        raise IllegalRewriteError(f"{len(values)} values for {len(match.roots)} outputs")
    for root, value in zip(match.roots, values, strict=True):
        if found := _difference(val(root), val(value)):
            raise IllegalRewriteError(f"`{root.name}` would change: {found}", where=root.name)


def _difference(old: Any, new: Any) -> str | None:
    if isinstance(old, list | tuple):
        if not isinstance(new, list | tuple) or len(new) != len(old):
            return f"{len(old)} values became {new!r}"
        found = (_difference(a, b) for a, b in zip(old, new, strict=True))
        return next(filter(None, found), None)
    if not isinstance(old, Tensor):
        return None
    if not isinstance(new, Tensor):
        return f"a tensor became {type(new).__name__}"
    if old.dtype != new.dtype:
        return f"dtype {old.dtype} became {new.dtype}"
    if old.device != new.device:
        return f"device {old.device} became {new.device}"
    same = len(old.shape) == len(new.shape) and all(
        _same_extent(a, b) for a, b in zip(old.shape, new.shape, strict=True)
    )
    return None if same else f"shape {tuple(old.shape)} became {tuple(new.shape)}"


def _same_extent(a: Any, b: Any) -> bool:
    """Whether two extents are equal for every input, decided without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(a == b))


def _bound_nodes(match: Match) -> list[fx.Node]:
    """Nodes bound to variables; one that was rewritten this round is stale."""
    return [v for v in match.bindings.values() if isinstance(v, fx.Node) and v not in match.nodes]


def _forget_rewritten(log: Log) -> None:
    """A place that was refused in one round and rewritten in a later one was not missed."""
    done = {name for r in log.rewrites for name in r.removed}
    log.missed = {k: m for k, m in log.missed.items() if k[1] not in done}


def _is_impure(node: fx.Node) -> bool:
    """Nodes that dead-code elimination keeps: signature, and operators with effects."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and node.is_impure()


def _sort(graph: fx.Graph) -> None:
    """Restore topological order after values were replaced by later ones, moving as little."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    if all(index[a] < i for node, i in index.items() for a in node.all_input_nodes):
        return
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_nodes_from(index)
    flow.add_edges_from((a, node) for node in index for a in node.all_input_nodes)
    _keep_effects_in_order(flow, [n for n in index if n.op == "call_function" and n.is_impure()])
    last = next(iter(graph.nodes))
    for node in nx.lexicographical_topological_sort(flow, key=index.__getitem__):
        if node is not last:
            last.append(node)
            last = node


def _keep_effects_in_order(flow: nx.DiGraph[fx.Node], effects: Iterable[fx.Node]) -> None:
    ordered = list(effects)
    flow.add_edges_from(pairwise(ordered))
