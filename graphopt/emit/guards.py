"""What a call must satisfy so that the captured graph is the model: checked before it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graphopt.conditions import compiled, condition
from graphopt.emit.binding import CallBinder
from graphopt.emit.layouts import LayoutGuard
from graphopt.errors import GraphoptError
from graphopt.program import Program, val

__all__ = ["CallBinder", "InputGuard", "compiled"]
_ELSEWHERE = "capture with an example that has these sizes"
_AT_ONE = f"{_ELSEWHERE}, and leave their axes out of dynamic_shapes"


@dataclass
class _Tensor:
    """Expectations on one tensor: fixed sizes, symbols, and sizes derived from symbols."""

    label: str
    dtype: torch.dtype
    device: torch.device
    rank: int
    fixed: list[tuple[int, int]] = field(default_factory=list)
    symbols: list[tuple[int, str]] = field(default_factory=list)
    derived: list[tuple[int, str, Callable[..., Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Constant:
    label: str
    value: Any


@dataclass(frozen=True)
class _Number:
    """A dynamic Python number."""

    label: str
    symbol: str


class InputGuard:
    """Checks flat user inputs against the shapes, ranges and constants of a program.

    Sizes along axes that the capture left dynamic must be equal wherever one symbol stands, lie in
    its range, and meet the program's assumptions; everything else must be as captured.

    Raises (when called):
        GraphoptError: names the input, the axis, what it is and what it must be; or the operator
            that relies on another memory layout (`LayoutGuard`).
    """

    def __init__(self, program: Program) -> None:
        self.name = program.name
        self.axis_names = {str(s): n for s, n in program.axis_names.items()}
        labels = list(_labels(program))
        self.expected = [
            _expectation(node, label)
            for node, label in zip(program.user_inputs(), labels, strict=True)
        ]
        known = {s for e in self.expected for s in _symbols(e)}
        self.ranges = [
            (str(s), *_bounds(r)) for s, r in program.range_constraints.items() if str(s) in known
        ]
        self.symbols = sorted(known)
        self.assumptions = [(a, condition(a.text, self.symbols)) for a in program.assumptions]
        self.layouts = LayoutGuard(program, labels)
        self._all = condition(
            " and ".join(f"({a.text})" for a, _ in self.assumptions) or "True", self.symbols
        )

    def __call__(self, flat: Sequence[Any]) -> None:
        if len(flat) != len(self.expected):
            raise GraphoptError(
                f"{self.name} takes {len(self.expected)} inputs, but {len(flat)} were given"
            )
        sizes: dict[str, int] = {}
        for value, expected in zip(flat, self.expected, strict=True):
            if type(expected) is _Tensor:
                self._check_tensor(value, expected, sizes)
            else:
                self._check_plain(value, expected, sizes)
        for symbol, low, high in self.ranges:
            if not low <= sizes[symbol] <= high:
                self._out_of_range(flat, symbol, low, high)
        if not self._all(**sizes):
            self._unmet(sizes)
        for value, expected in zip(flat, self.expected, strict=True):
            if type(expected) is _Tensor and expected.derived:
                self._check_derived(value, expected, sizes)
        if self.layouts.captured:
            self.layouts(flat)

    def _check_tensor(self, value: Any, expected: _Tensor, sizes: dict[str, int]) -> None:
        if not isinstance(value, Tensor):
            raise self._error(f"{expected.label} must be a tensor, not {type(value).__name__}")
        if value.dtype is not expected.dtype or value.device != expected.device:
            raise self._error(_kind(value, expected))
        shape = value.shape
        if len(shape) != expected.rank:
            shown = tuple(shape)
            raise self._error(f"{expected.label} has shape {shown}, expected {expected.rank} axes")
        for axis, size in expected.fixed:
            if shape[axis] != size:
                raise self._error(
                    f"{expected.label} has shape {tuple(shape)}: axis {axis} must be {size}",
                    fix=f"capture again with axis {axis} of {expected.label} in dynamic_shapes",
                )
        for axis, symbol in expected.symbols:
            size = shape[axis]
            if sizes.setdefault(symbol, size) != size:
                self._unequal(expected, tuple(shape), axis, symbol, sizes[symbol])

    def _check_plain(self, value: Any, expected: Any, sizes: dict[str, int]) -> None:
        if type(expected) is _Number:
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._error(f"{expected.label} must be an int, not {type(value).__name__}")
            sizes[expected.symbol] = value
            return
        constant = expected.value
        same = value is constant or (type(value) is type(constant) and value == constant)
        if not same and not (value != value and constant != constant):
            raise self._error(
                f"{expected.label} is {value!r}, but the program was captured with {constant!r}",
                fix=f"capture again with {expected.label}={value!r}",
            )

    def _check_derived(self, value: Tensor, expected: _Tensor, sizes: dict[str, int]) -> None:
        for axis, text, evaluate in expected.derived:
            wanted = evaluate(**sizes)
            if value.shape[axis] != wanted:
                shown = self._shown(text)
                raise self._error(
                    f"{expected.label} has shape {tuple(value.shape)}: axis {axis} must be "
                    f"{wanted} ({shown})"
                )

    def _unequal(
        self, expected: _Tensor, shape: tuple[int, ...], axis: int, symbol: str, size: int
    ) -> None:
        other = next(
            e.label
            for e in self.expected
            if type(e) is _Tensor and any(s == symbol for _, s in e.symbols)
        )
        raise self._error(
            f"{expected.label} has shape {shape}: axis {axis}{self._axis(symbol)} must be {size}, "
            f"as in {other}"
        )

    def _out_of_range(self, flat: Sequence[Any], symbol: str, low: int, high: float) -> None:
        allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        for value, expected in zip(flat, self.expected, strict=True):
            if type(expected) is _Number and expected.symbol == symbol:
                raise self._error(f"{expected.label} is {value}, but must be {allowed}")
            for axis, name in expected.symbols if type(expected) is _Tensor else ():
                if name == symbol:
                    raise self._error(
                        f"{expected.label} has shape {tuple(value.shape)}: axis {axis}"
                        f"{self._axis(symbol)} must be {allowed}"
                    )

    def _unmet(self, sizes: dict[str, int]) -> None:
        for assumption, holds in self.assumptions:
            if not holds(**sizes):
                given = ", ".join(f"{self._shown(s)} = {n}" for s, n in sizes.items())
                raise GraphoptError(
                    f"{self.name} was captured for sizes with {self._shown(assumption.text)}, "
                    f"but {given}{f': {assumption.reason}' if assumption.reason else ''}",
                    where=assumption.where,
                    fix=_AT_ONE if assumption.reason else _ELSEWHERE,
                )

    def _axis(self, symbol: str) -> str:
        return f" `{self.axis_names[symbol]}`" if symbol in self.axis_names else ""

    def _shown(self, text: str) -> str:
        for symbol in sorted(self.axis_names, key=len, reverse=True):
            text = text.replace(symbol, self.axis_names[symbol])
        text = re.sub(r"torch\.sym_(?:float|int)\((\w+)\)", r"\1", text)
        return re.sub(r"(\.\d*?[1-9])0+\b", r"\1", text)

    def _error(self, what: str, fix: str | None = None) -> GraphoptError:
        return GraphoptError(what, where=f"call of {self.name}", fix=fix)


def _labels(program: Program) -> Iterator[str]:
    """What a user calls each flat input: ``input_ids`` or ``batch['mask'][0]``."""
    nodes = program.user_inputs()
    call = program.call
    if call is None:
        yield from (n.name for n in nodes)
        return
    leaves = [torch.empty(0)] * call.in_spec.num_leaves  # caches take anything else for their own
    example = pytree.tree_unflatten(leaves, call.in_spec)
    count = len(example[0])
    for path, _ in pytree.tree_flatten_with_path(example)[0]:
        inner: Any = path[1]
        if isinstance(inner, pytree.MappingKey):
            head = str(inner.key)
        elif inner.idx < count and inner.idx < len(call.parameter_names):
            head = call.parameter_names[inner.idx]
        else:
            head = f"argument {inner.idx}"
        yield head + pytree.keystr(path[2:])


def _expectation(node: fx.Node, label: str) -> _Tensor | _Constant | _Number:
    fake = val(node)
    if isinstance(fake, torch.SymInt):
        return _Number(label, str(fake.node.expr))
    if not isinstance(fake, Tensor):
        return _Constant(label, fake)
    made = _Tensor(label, fake.dtype, fake.device, fake.dim())
    for axis, size in enumerate(fake.shape):
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            made.fixed.append((axis, int(size)))
        elif isinstance(size.node.expr, sympy.Symbol):
            made.symbols.append((axis, str(size.node.expr)))
        else:
            names = sorted(map(str, size.node.expr.free_symbols))
            text = PythonPrinter().doprint(size.node.expr)
            made.derived.append((axis, text, _only(compiled(text, names), names)))
    return made


def _only(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    return lambda **sizes: function(**{n: sizes[n] for n in names})


def _symbols(expected: Any) -> Iterator[str]:
    if isinstance(expected, _Tensor):
        yield from (name for _, name in expected.symbols)
    elif isinstance(expected, _Number):
        yield expected.symbol


def _bounds(allowed: Any) -> tuple[int, float]:
    high = int(allowed.upper) if isinstance(allowed.upper, sympy.Integer) else math.inf
    return (int(allowed.lower) if isinstance(allowed.lower, sympy.Integer) else 0), high


def _kind(value: Tensor, expected: _Tensor) -> str:
    return (
        f"{expected.label} is {value.dtype} on {value.device}, "
        f"expected {expected.dtype} on {expected.device}"
    )
