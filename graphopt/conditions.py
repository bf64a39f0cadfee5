"""Conditions on sizes as text: arithmetic and comparisons, compiled once, nothing else."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sympy
from torch.utils._sympy.functions import Mod, PythonMod
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from graphopt.errors import GraphoptError

_TORCH = SimpleNamespace(sym_float=float, sym_int=int)
_FUNCTIONS = {"max": max, "min": min, "abs": abs, "round": round, "math": math, "torch": _TORCH}
_ALLOWED = (
    ast.Expression,
    ast.Compare,
    ast.cmpop,
    ast.BoolOp,
    ast.boolop,
    ast.BinOp,
    ast.operator,
    ast.UnaryOp,
    ast.unaryop,
    ast.Call,
    ast.Name,
    ast.Attribute,
    ast.expr_context,
    ast.Constant,
)
_KNOWN = {f"math.{name}" for name in ("floor", "ceil", "inf", "sqrt", "trunc")}
_KNOWN |= {f"torch.{name}" for name in vars(_TORCH)}


def compiled(text: str, names: Sequence[str]) -> Callable[..., Any]:
    """``lambda *, names: text`` for arithmetic and comparisons over ``names`` only.

    Raises:
        GraphoptError: the text holds anything else; conditions may come from a file.
    """
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (
            isinstance(node, ast.Name) and node.id not in (*names, *_FUNCTIONS)
        ):
            raise _refusal(text, type(node).__name__)
        if isinstance(node, ast.Attribute) and ast.unparse(node) not in _KNOWN:
            raise _refusal(text, node.attr)
    parameters = f"*, {', '.join(names)}" if names else ""
    code = compile(f"lambda {parameters}: {ast.unparse(tree)}", "<condition>", "eval")
    return eval(code, {"__builtins__": {}, **_FUNCTIONS})  # type: ignore[no-any-return]


def _refusal(text: str, where: str) -> GraphoptError:
    return GraphoptError(
        f"not a condition on sizes: {text}",
        where=where,
        fix="compute sizes with + - * / // % **, round, min, max, math.floor, math.ceil or "
        "math.sqrt, or leave the axis out of dynamic_shapes",
    )


def condition(text: str, names: Sequence[str]) -> Callable[..., bool]:
    """The same as a truth value; where it cannot be computed (``n % 0``), it does not hold.

    Raises:
        GraphoptError: as `compiled`.
    """
    evaluate = compiled(text, names)

    def holds(**sizes: int) -> bool:
        try:
            return bool(evaluate(**sizes))
        except ArithmeticError:
            return False

    return holds


def implied(demand: Any, ranges: Mapping[sympy.Symbol, Any], conditions: Sequence[str]) -> bool:
    """Whether a demand on sizes holds wherever sizes lie in their ranges and meet conditions.

    Conditions only count where they exclude the smallest sizes of a range (``s0 >= 3`` and
    ``s0 != 3`` imply ``s0 > 3``).
    """
    allowed = {symbol: ValueRanges(r.lower, r.upper) for symbol, r in ranges.items()}
    for symbol in demand.free_symbols & allowed.keys():
        known = [c for c in conditions if _symbols(c) == {str(symbol)}]
        holds = [condition(c, [str(symbol)]) for c in known]
        for _ in range(_RAISED):
            lower = allowed[symbol].lower
            if not lower.is_Integer or all(h(**{str(symbol): int(lower)}) for h in holds):
                break
            allowed[symbol] = ValueRanges(lower + 1, allowed[symbol].upper)
    if not demand.free_symbols <= allowed.keys():
        return False
    found = bound_sympy(_divided(demand, allowed), allowed)
    return bool(found.is_singleton() and found.lower == sympy.true)


def _divided(demand: Any, ranges: Mapping[sympy.Symbol, ValueRanges[Any]]) -> Any:
    """``a b != a c`` as ``b != c`` where ``a`` is positive, and other relations alike."""

    def shared(one: Any, other: Any) -> Any:
        found = sympy.gcd(one, other)
        return found if bound_sympy(found, ranges).lower > 0 else sympy.S.One

    def remainder(mod: Any) -> Any:
        """``a b % (a c) = a (b % c)``, which is ``a b`` where ``b`` is below ``c``."""
        factor = shared(*mod.args)
        value, divisor = (sympy.cancel(arg / factor) for arg in mod.args)
        most, least = bound_sympy(value, ranges), bound_sympy(divisor, ranges)
        is_less = most.lower >= 0 and most.upper < least.lower
        return factor * (value if is_less else mod.func(value, divisor))

    demand = demand.replace(lambda part: isinstance(part, Mod | PythonMod), remainder)
    if not isinstance(demand, sympy.core.relational.Relational):
        return demand
    factor = shared(demand.lhs, demand.rhs)
    return demand.func(*(sympy.cancel(side / factor) for side in demand.args))


_RAISED = 8
"""Sizes at the lower end of a range that conditions may exclude."""


def _symbols(text: str) -> set[str]:
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    return names - _FUNCTIONS.keys()
