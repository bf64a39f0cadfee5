"""From the text of a body to steps. The text may come from a file: nothing in it is trusted.

Python's own parser reads it, nothing runs it. A step calls one operator of the vocabulary; its
arguments are values of the body, numbers, dtypes, a few words, and lists of these.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload, OpOverloadPacket

from graphopt.kernels.chunked_rows.vocabulary import allowed

LONGEST = 2**18
"""Characters of the longest text that is read."""

_DEEPEST = 4
"""Lists in lists: no operator takes more."""

_NUMBERS = {"inf": math.inf, "nan": math.nan}
_WORDS = frozenset({"floor", "none", "tanh", "trunc"})
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


class Name(str):
    """A value of the body, as opposed to a literal word."""

    __slots__ = ()


class Step(NamedTuple):
    """``name = target(*args, **kwargs)``; values in the arguments stand as `Name`."""

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Parsed(NamedTuple):
    """A function's parameters, its steps, and the names of the groups that it returns."""

    parameters: list[str]
    steps: list[Step]
    rows: list[Name]
    sums: list[Name]
    columns: list[Name]

    @property
    def results(self) -> list[Name]:
        return [*self.rows, *self.sums, *self.columns]


def names(step: Step) -> Iterator[Name]:
    """The values that a step reads, in order; twice what it reads twice."""
    return _names((step.args, step.kwargs))


def _names(structure: Any) -> Iterator[Name]:
    if isinstance(structure, Name):
        yield structure
    elif isinstance(structure, Mapping):
        yield from _names(tuple(structure.values()))
    elif isinstance(structure, list | tuple):
        for item in structure:
            yield from _names(item)


def filled(structure: Any, values: Mapping[str, Any]) -> Any:
    """Arguments of a step with values in place of their names."""
    if isinstance(structure, Name):
        return values[structure]
    if isinstance(structure, dict):
        return {k: filled(v, values) for k, v in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)(filled(v, values) for v in structure)
    return structure


def parse(text: str) -> Parsed:
    """What a text spells.

    Raises:
        ValueError: the text is no body; says what is no part of one.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a body has at most {LONGEST} characters, this text has {len(text)}")
    try:
        return _function(ast.parse(text))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a body: {text[:80]!r}") from error


def _function(module: ast.Module) -> Parsed:
    function = module.body[0] if len(module.body) == 1 else module
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or function.returns:
        raise ValueError("a body is one plain function")
    parameters = _parameters(function.args)
    *lines, last = function.body
    known = set(parameters)
    steps = [_step(line, known) for line in lines]
    return Parsed(parameters, steps, *_returned(last, known))


def _parameters(args: ast.arguments) -> list[str]:
    names = [a.arg for a in args.args if a.annotation is None]
    plain = ast.arguments([], args.args, None, [], [], None, [])
    if ast.dump(args) != ast.dump(plain) or len(set(names)) != len(args.args):
        raise _refusal(args)
    return names


def _step(line: ast.stmt, known: set[str]) -> Step:
    if not (isinstance(line, ast.Assign) and isinstance(line.value, ast.Call)):
        raise _refusal(line)
    target, call = line.targets[0], line.value
    if len(line.targets) > 1 or not isinstance(target, ast.Name) or target.id in known:
        raise _refusal(line)
    args = tuple(_value(a, known) for a in call.args)
    kwargs = {k.arg: _value(k.value, known) for k in call.keywords if k.arg is not None}
    if len(kwargs) < len(call.keywords):
        raise _refusal(line)
    known.add(target.id)
    return Step(target.id, _operator(call, args), args, kwargs)


def _operator(call: ast.Call, args: tuple[Any, ...]) -> Callable[..., Any]:
    match call.func:
        case ast.Name("item") if len(args) == 2 and type(args[1]) is int and not call.keywords:
            return operator.getitem
        case ast.Attribute(ast.Attribute(ast.Name("aten"), name), overload):
            packet = None if name.startswith("__") else getattr(torch.ops.aten, name, None)
            known = isinstance(packet, OpOverloadPacket) and overload in packet.overloads()
            found = getattr(packet, overload) if known else None
            if isinstance(found, OpOverload) and allowed(found):
                return found
    raise _refusal(call.func)


def _value(node: ast.expr, known: set[str], depth: int = 0) -> Any:
    match node:
        case ast.Name(name) if name in known:
            return Name(name)
        case ast.List(items) if depth < _DEEPEST:
            return [_value(item, known, depth + 1) for item in items]
        case ast.Attribute(ast.Name("torch"), kind) if f"torch.{kind}" in _DTYPES:
            return _DTYPES[f"torch.{kind}"]
        case ast.Constant(None | bool() as literal):
            return literal
        case ast.Constant(str(word)) if word in _WORDS:
            return word
        case ast.UnaryOp(ast.USub(), operand):
            return -_number(operand)
    return _number(node)


def _number(node: ast.expr) -> int | float:
    match node:
        case ast.Name(name) if name in _NUMBERS:
            return _NUMBERS[name]
        case ast.Constant(float(number)):
            return number
        case ast.Constant(int(number)) if not isinstance(number, bool) and number < 2**63:
            return number
    raise _refusal(node)


def _returned(line: ast.stmt, known: set[str]) -> list[list[Name]]:
    """Rows, sums, and columns, which may be left out."""
    match line:
        case ast.Return(ast.Tuple([ast.List(), ast.List(), *more] as groups)) if len(more) <= 1:
            listed = [group.elts for group in groups if isinstance(group, ast.List)]
            if len(listed) == len(groups):
                return [_results(items, known) for items in (*listed, [])[:3]]
    raise _refusal(line)


def _results(items: list[ast.expr], known: set[str]) -> list[Name]:
    strange = next((i for i in items if not isinstance(i, ast.Name) or i.id not in known), None)
    if strange is not None:
        raise _refusal(strange)
    return [Name(item.id) for item in items if isinstance(item, ast.Name)]


def _refusal(node: ast.AST) -> ValueError:
    try:
        shown = ast.unparse(node)[:120]
    except ValueError:  # Python does not print them.
        shown = "an integer of thousands of digits"
    return ValueError(f"not part of a body: {shown}")
