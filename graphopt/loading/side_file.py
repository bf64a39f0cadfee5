"""``graphopt.json``, the text beside an exported program: what torch's own format does not keep.

Everything in it is plain JSON. It may come from anywhere, so every field is checked here, and
whatever a program would go wrong by is held against the program before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, NoReturn

import sympy
import torch
from torch.utils._sympy.value_ranges import ValueRanges

from graphopt.conditions import compiled
from graphopt.errors import GraphoptError, LoadError
from graphopt.loading.expressions import MAX_LENGTH, power_reason
from graphopt.loading.named_returns import with_names
from graphopt.loading.plain_values import decoded, encoded
from graphopt.program import Program, val
from graphopt.report.serial import build
from graphopt.signature import Assumption, CallSpec

SIDE_FILE = "graphopt.json"
FORMAT = 2
"""Format 1 has neither ``call`` nor ``axes``, ``assumptions`` and ``notes``."""


@dataclass(frozen=True)
class CallFacts:
    """What `CallSpec` knows of ``forward``; values as `encoded` writes them."""

    positional: tuple[str, ...]
    defaults: dict[str, Any]
    fixed: dict[str, Any]


@dataclass(frozen=True)
class AxisFacts:
    """Allowed sizes of one symbol (no end where it is null), and its name."""

    symbol: str
    low: int | None
    high: int | None
    name: str | None


@dataclass(frozen=True)
class SideFile:
    """The whole file; ``report`` is read by the report's own reader.

    ``returns`` and ``versions`` (of what wrote the file) may be missing.
    """

    format: int = FORMAT
    name: str | None = None
    training: bool = False
    frozen: bool = True
    report: Any = None
    call: CallFacts | None = None
    axes: tuple[AxisFacts, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    notes: list[str] = field(default_factory=list)
    returns: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def written(program: Program, report: Mapping[str, Any], returns: Mapping[str, str]) -> str:
    """The text for a program, its report, and the names that `without_names` found."""
    call = program.call
    facts = SideFile(
        name=program.name,
        training=program.training,
        frozen=program.frozen,
        report=dict(report),
        call=None if call is None else _call_facts(call),
        axes=tuple(_axis_facts(program, s) for s in sorted(_symbols(program).values(), key=str)),
        assumptions=program.assumptions,
        notes=program.notes,
        returns=dict(returns),
        versions={"graphopt": version("graphopt"), "torch": str(torch.__version__)},
    )
    return json.dumps(asdict(facts), allow_nan=False)


def _call_facts(call: CallSpec) -> CallFacts:
    values = ({k: encoded(v) for k, v in given.items()} for given in (call.defaults, call.fixed))
    return CallFacts(call.positional, *values)


def _axis_facts(program: Program, symbol: sympy.Symbol) -> AxisFacts:
    allowed = program.range_constraints.get(symbol, ValueRanges(1, sympy.oo))
    name = program.axis_names.get(symbol)
    return AxisFacts(str(symbol), _end(allowed.lower), _end(allowed.upper), name)


def _end(bound: Any) -> int | None:
    return int(bound) if isinstance(bound, sympy.Integer) else None


def _symbols(program: Program) -> dict[str, sympy.Symbol]:
    """The symbols in the shapes of the user inputs, by name."""
    sizes = (s for node in program.user_inputs() for s in _sizes(val(node)))
    found = (s.node.expr for s in sizes if isinstance(s, torch.SymInt))
    return {str(s): s for expression in found for s in expression.free_symbols}


def _sizes(fake: Any) -> Iterable[Any]:
    return getattr(fake, "shape", (fake,))


def parsed(text: str | None, where: str) -> SideFile:
    """The checked file; an empty one of format 1 where there is none.

    Raises:
        LoadError: it is not JSON, a field is missing, of a wrong type or not as `written` writes
            it, or a newer graphopt wrote it.
    """
    where = f"{where}, {SIDE_FILE}"
    try:
        data = {"format": 1} if text is None else json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"not JSON: {error!s:.200}", where=where, fix=_FIX) from error
    facts = build(SideFile, data, where)
    newest = range(1, FORMAT + 1)
    if "format" not in data or facts.format not in newest:
        what = f"format {data.get('format')!r}, this graphopt reads 1 to {FORMAT}"
        raise LoadError(what, where=where, fix="load it with the graphopt that wrote it")
    if facts.format > 1 and (missing := sorted(_SECTIONS - data.keys())):
        raise _malformed(f"the field {missing[0]!r} is missing", where)
    return facts


_SECTIONS = {"name", "training", "frozen", "report", "call", "axes", "assumptions", "notes"}
_FIX = "save the module again; the file was changed or damaged after it was written"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")


def _malformed(what: str, where: str) -> LoadError:
    return LoadError(what, where=where, fix=_FIX)


def applied(facts: SideFile, program: Program, where: str) -> None:
    """Give the program what the file says of its call, its axes and its conditions.

    Raises:
        LoadError: the file does not fit the program; nothing is given then.
    """
    where = f"{where}, {SIDE_FILE}"
    if facts.format == 1 or program.call is None:
        return
    call = _call(facts.call, program.call, where)
    call = replace(call, out_spec=with_names(call.out_spec, facts.returns, f"{where}, returns"))
    symbols = _symbols(program)
    ranges = _ranges(facts.axes, symbols, program, where)
    for index, assumption in enumerate(facts.assumptions):
        _check_condition(assumption.text, symbols, f"{where}, assumptions[{index}]")
    program.call = call
    program.range_constraints = {**program.range_constraints, **ranges}
    program.axis_names = {symbols[a.symbol]: a.name for a in facts.axes if a.name is not None}
    program.assumptions = facts.assumptions
    program.notes = list(facts.notes)


def _call(facts: CallFacts | None, call: CallSpec, where: str) -> CallSpec:
    where = f"{where}, call"
    if facts is None:
        raise _malformed("the call is missing", where)
    names = [*facts.positional, *facts.defaults, *facts.fixed]
    if odd := [n for n in names if not n.isidentifier()]:
        raise _malformed(f"{odd[0]!r} is no argument's name", where)
    if len(set(facts.positional)) != len(facts.positional):
        raise _malformed("an argument is positional twice", where)
    args, kwargs = call.in_spec.children()
    captured = call.parameter_names[: args.num_children]
    if any(a != b for a, b in zip(facts.positional, captured, strict=False)):
        what = f"arguments by position are {facts.positional}, but the program's {captured}"
        raise _malformed(what, where)
    if both := facts.fixed.keys() & {*captured, *kwargs.context}:
        raise _malformed(f"{sorted(both)[0]} is fixed and an input of the program", where)
    defaults, fixed = (
        {k: decoded(v, f"{where}.{kind}.{k}") for k, v in given.items()}
        for kind, given in (("defaults", facts.defaults), ("fixed", facts.fixed))
    )
    return replace(call, positional=facts.positional, defaults=defaults, fixed=fixed)


def _ranges(
    axes: Iterable[AxisFacts], symbols: Mapping[str, sympy.Symbol], program: Program, where: str
) -> dict[sympy.Symbol, Any]:
    where = f"{where}, axes"
    named = {axis.symbol: axis for axis in axes}
    if named.keys() != symbols.keys():
        what = f"the axes are of {sorted(named)}, but the program's sizes of {sorted(symbols)}"
        raise _malformed(what, where)
    ranges = {}
    for text, axis in named.items():
        symbol = symbols[text]
        own = program.range_constraints.get(symbol, ValueRanges(0, sympy.oo))
        low = own.lower if axis.low is None else sympy.Integer(axis.low)
        high = own.upper if axis.high is None else sympy.Integer(axis.high)
        if not own.lower <= low <= high <= own.upper:
            what = f"{text} is between {axis.low} and {axis.high}, but in the program {own}"
            raise _malformed(what, where)
        if axis.name is not None and not axis.name.isidentifier():
            raise _malformed(f"{axis.name!r} is no name of an axis", where)
        ranges[symbol] = ValueRanges(low, high)
    return ranges


def _check_condition(text: str, symbols: Mapping[str, sympy.Symbol], where: str) -> None:
    if len(text) > MAX_LENGTH:
        raise _malformed("the condition is far too long", where)
    try:
        compiled(text, sorted(symbols))
    except (GraphoptError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _malformed(f"not a condition on sizes: {text:.200}", where) from error
    if reason := power_reason(text):
        raise _malformed(f"the condition {text:.200} has {reason}", where)
