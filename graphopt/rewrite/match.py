"""Matching patterns against a program, and remembering the near misses.

The matcher is a generator of bindings: each alternative, commuted operand or candidate second
output is one more binding to try, so a match is found whenever one exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.program import Program, operator_name, val
from graphopt.rewrite.pattern import COMMUTATIVE, Either, Num, Op, Var, anchors, pattern_depth


@dataclass(frozen=True)
class Refusal:
    """Why a candidate stays: a sentence, the culprit node, the option that would allow it."""

    reason: str
    node: fx.Node | None = None
    option: str | None = None


@dataclass(frozen=True)
class Match:
    """Where a rule applies.

    Attributes:
        roots: nodes whose values the rewrite replaces, in the order of the rule's patterns.
        nodes: all operator nodes of the match, in match order (roots included).
        bindings: pattern variables.
    """

    program: Program
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    bindings: dict[str, Any] = field(default_factory=dict)
    escapes: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def __contains__(self, name: str) -> bool:
        return name in self.bindings

    def get(self, name: str, default: Any = None) -> Any:
        return self.bindings.get(name, default)

    @property
    def root(self) -> fx.Node:
        return self.roots[0]

    @property
    def key(self) -> tuple[str, ...]:
        """Stable across copies of the same program."""
        return tuple(n.name for n in self.roots)

    def val(self, name: str) -> Any:
        """Fake value (shape, dtype, strides) of a bound node."""
        bound = self.bindings[name]
        return bound.meta["val"] if isinstance(bound, fx.Node) else bound


@dataclass
class MatchTrace:
    """The furthest partial match of one pattern at one root, kept for `explain`."""

    matched: int = 0
    culprit: fx.Node | None = None
    reason: str = ""

    def note(self, matched: int, culprit: Any, reason: str) -> None:
        if matched > self.matched or not self.reason:
            node = culprit if isinstance(culprit, fx.Node) else self.culprit
            self.matched, self.culprit, self.reason = matched, node, reason


@dataclass(frozen=True)
class _Env:
    values: dict[str, Any]
    nodes: tuple[fx.Node, ...]
    escapes: frozenset[fx.Node]
    parent: fx.Node | None = None

    def bind(self, name: str | None, value: Any) -> _Env:
        if name is None:
            return self
        return _Env({**self.values, name: value}, self.nodes, self.escapes, self.parent)

    def enter(self, node: fx.Node, escapes: bool) -> _Env:
        nodes = self.nodes if node in self.nodes else (*self.nodes, node)
        free = self.escapes | {node} if escapes else self.escapes
        return _Env(self.values, nodes, free, node)


class Matcher:
    """Matches patterns at nodes of one program; ``trace`` keeps the best partial match."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.trace = MatchTrace()

    def at(self, patterns: tuple[Any, ...], node: fx.Node) -> Iterator[Match]:
        """All matches whose first pattern is rooted at ``node``."""
        self.trace = MatchTrace()
        start = _Env({}, (), frozenset())
        for env in self._match(patterns[0], node, start):
            for roots, full in self._others(patterns[1:], (node,), env):
                yield Match(self.program, roots, full.nodes, full.values, full.escapes)

    def _others(
        self, patterns: tuple[Any, ...], roots: tuple[fx.Node, ...], env: _Env
    ) -> Iterator[tuple[tuple[fx.Node, ...], _Env]]:
        if not patterns:
            yield roots, env
            return
        for candidate in self._candidates(patterns[0], roots, env):
            for found in self._match(patterns[0], candidate, env):
                yield from self._others(patterns[1:], (*roots, candidate), found)

    def _candidates(self, pattern: Any, roots: tuple[fx.Node, ...], env: _Env) -> Iterator[fx.Node]:
        """Nodes that could root ``pattern``: near users of whatever is bound already."""
        bound = [v for v in env.values.values() if isinstance(v, fx.Node)]
        level, seen = dict.fromkeys((*bound, *env.nodes)), set(roots)
        for _ in range(pattern_depth(pattern)):
            level = dict.fromkeys(user for node in level for user in node.users)
            for node in level:
                if node.target in anchors(pattern) and node not in seen:
                    seen.add(node)
                    yield node

    def _match(self, pattern: Any, value: Any, env: _Env) -> Iterator[_Env]:
        if isinstance(pattern, Var):
            yield from self._match_var(pattern, value, env)
        elif isinstance(pattern, Num):
            yield from self._match_num(pattern, value, env)
        elif isinstance(pattern, Either):
            for option in pattern.options:
                yield from self._match(option, value, env)
        elif isinstance(pattern, Op):
            yield from self._match_op(pattern, value, env)
        elif isinstance(pattern, list | tuple):
            yield from self._match_sequence(pattern, value, env)
        elif same_literal(pattern, value):
            yield env
        else:
            self._miss(env, value, f"expected {pattern!r}, found {_show(value)}")

    def _match_var(self, pattern: Var, value: Any, env: _Env) -> Iterator[_Env]:
        if pattern.name in env.values and not same_literal(env.values[pattern.name], value):
            bound = _show(env.values[pattern.name])
            self._miss(env, value, f"`{pattern.name}` is {bound} here and {_show(value)} there")
        elif pattern.where is not None and not pattern.where(value):
            self._miss(env, value, f"{_show(value)} does not fit `{pattern.name}`")
        else:
            yield env.bind(pattern.name, value)

    def _match_num(self, pattern: Num, value: Any, env: _Env) -> Iterator[_Env]:
        number = self.number(value)
        if number is None:
            self._miss(env, value, f"expected a constant number, found {_show(value)}")
        elif not pattern.accepts(number):
            self._miss(env, value, f"expected {pattern.value}, found {number}")
        elif pattern.name in env.values and env.values[pattern.name] != number:
            self._miss(env, value, f"`{pattern.name}` is {env.values[pattern.name]} and {number}")
        else:
            yield env.bind(pattern.name, number)

    def _match_op(self, pattern: Op, value: Any, env: _Env) -> Iterator[_Env]:
        if not isinstance(value, fx.Node) or value.target not in pattern.targets:
            wanted = " or ".join(operator_name(t) for t in pattern.targets)
            self._miss(env, value, f"expected {wanted}, found {_show(value)}")
            return
        inside = env.enter(value, pattern.escapes)
        for given in _orders(value, arguments(value)):
            for found in self._match_arguments(pattern, given, inside):
                yield found.bind(pattern.name, value)

    def _match_arguments(self, pattern: Op, given: dict[str, Any], env: _Env) -> Iterator[_Env]:
        names = list(given)
        if len(pattern.args) > len(names):
            return
        wanted = {**dict(zip(names, pattern.args, strict=False)), **pattern.kwargs}
        if not pattern.rest:
            defaults = default_arguments(env.parent.target) if env.parent is not None else {}
            wanted = {**{n: defaults.get(n) for n in names}, **wanted}
        yield from self._match_pairs([(p, given.get(n)) for n, p in wanted.items()], env)

    def _match_sequence(self, pattern: Any, value: Any, env: _Env) -> Iterator[_Env]:
        if not isinstance(value, list | tuple) or len(value) != len(pattern):
            self._miss(env, value, f"expected {len(pattern)} values, found {_show(value)}")
            return
        yield from self._match_pairs(list(zip(pattern, value, strict=True)), env)

    def _match_pairs(self, pairs: list[tuple[Any, Any]], env: _Env) -> Iterator[_Env]:
        if not pairs:
            yield env
            return
        (pattern, value), rest = pairs[0], pairs[1:]
        for found in self._match(pattern, value, env):
            back = _Env(found.values, found.nodes, found.escapes, env.parent)
            yield from self._match_pairs(rest, back)

    def _miss(self, env: _Env, value: Any, reason: str) -> None:
        culprit = value if isinstance(value, fx.Node) else env.parent
        self.trace.note(len(env.nodes), culprit, reason)

    def number(self, value: Any) -> float | None:
        """The number a literal or a constant tensor without axes stands for, else ``None``.

        A tensor of one element that has axes is no number: it lends them to what it meets.
        """
        if isinstance(value, bool):
            return None
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if value.target in _FILLED:
            return self._filled(value)
        return _item(self.program.tensor(value)) if self.program.is_constant(value) else None

    def _filled(self, node: fx.Node) -> float | None:
        """The number that ``full`` or ``scalar_tensor`` holds, in its own dtype."""
        fill, fake = arguments(node)[_FILLED[node.target]], val(node)
        if self.number(fill) is None or fake.dim():
            return None
        return _item(torch.tensor(fill, dtype=fake.dtype))


_FILLED: dict[Any, str] = {
    torch.ops.aten.full.default: "fill_value",
    torch.ops.aten.scalar_tensor.default: "s",
}


def _item(tensor: torch.Tensor) -> float | None:
    return None if tensor.dim() or tensor.is_complex() else float(tensor)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a call by schema name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    names = [a.name for a in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {**dict.fromkeys(names), **default_arguments(node.target), **given}


def default_arguments(target: Any) -> dict[str, Any]:
    """Default values of an operator's schema arguments."""
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}


def same_literal(a: Any, b: Any) -> bool:
    """Equality of literals that tells ``True`` from ``1`` and compares nodes by identity."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_literal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _orders(node: fx.Node, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield given
    if node.target in COMMUTATIVE and given.get("alpha", 1) == 1:
        first, second = list(given)[:2]
        yield {**given, first: given[second], second: given[first]}


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return operator_name(value.target) if value.op == "call_function" else f"`{value.name}`"
    return repr(value)
