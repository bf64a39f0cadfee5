"""Expressions that a ``.pt2`` file carries as text and torch evaluates, held to a small grammar.

``torch.export.load`` hands shape expressions to ``sympy.sympify``, which is ``eval``, and guards
to ``exec``. Both are legitimate only as arithmetic over sizes; anything else is refused here,
before torch sees it. Each check returns None, or the reason for the refusal.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

MAX_LENGTH = 20_000
_MAX_EXPONENT = 64
SYMBOL = re.compile(r"[a-z]{1,4}\d{1,9}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")

_NUMERIC_CALLS = {"Integer", "Float", "Rational"}
_CALLS = {
    *("Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "sqrt", "log", "exp"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sign", "Heaviside"),
    *("Equality", "Eq", "Unequality", "Ne", "StrictLessThan", "Lt", "LessThan", "Le"),
    *("StrictGreaterThan", "Gt", "GreaterThan", "Ge", "And", "Or", "Not", "Xor", "ITE"),
    *("Piecewise", "ExprCondPair", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv"),
    *("CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow"),
    *("FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat"),
    *("TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity", "BitwiseFn_bitwise_and"),
    *("BitwiseFn_bitwise_or", "BitwiseFn_bitwise_xor", "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_log"),
    *("OpaqueUnaryFn_log2", "OpaqueUnaryFn_exp", "OpaqueUnaryFn_sin", "OpaqueUnaryFn_cos"),
}
_CONSTANTS = {"oo", "int_oo", "zoo", "nan", "pi", "E", "true", "false", "inf"}
_GUARD_CALLS = {"IsNonOverlappingAndDenseIndicator", "len", "int", "float", "bool", "min", "max"}
_GUARD_METHODS = {"size", "stride", "storage_offset", "numel", "dim", "ndimension"}
_MODULE_CALLS = {
    "math": {"floor", "ceil", "trunc", "sqrt", "log", "log2", "exp", "isnan", "inf", "pow", "nan"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum"},
}
_PLAIN_NODES = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Tuple),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)


def symbolic_reason(text: str) -> str | None:
    """Why ``text`` is not a sympy expression over sizes, or None where it is one."""
    return _reason(text, _symbolic_nodes)


def guard_reason(text: str) -> str | None:
    """Why ``text`` is not a condition on the sizes of inputs, or None where it is one."""
    return _reason(text, _guard_nodes)


def _reason(text: str, visit: object) -> str | None:
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        return "not a text, or far too long"
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return next(iter(visit(tree)), None)  # type: ignore[operator,no-any-return]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"not an expression ({type(error).__name__})"


def _symbolic_nodes(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            if not SYMBOL.fullmatch(name):
                yield f"{name!r} is no symbol's name"
            yield from _assumptions(node)
        case ast.Call(func=ast.Name(id=name), args=args) if name in _NUMERIC_CALLS:
            yield from (r for arg in args for r in _number(arg))
            yield from _assumptions(node)
        case ast.Call(func=ast.Name(id=name), args=args) if name in _CALLS:
            if name in ("Pow", "PowByNatural", "FloatPow", "LShift") and len(args) == 2:
                yield from _exponent(args[1])
            yield from (r for arg in args for r in _symbolic_nodes(arg))
            yield from _assumptions(node)
        case ast.Name(id=name):
            if name not in _CONSTANTS and not SYMBOL.fullmatch(name):
                yield f"the name {name}"
        case ast.Constant(value=bool() | int() | float()):
            pass
        case _:
            yield from _plain(node, _symbolic_nodes)


def _guard_nodes(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _GUARD_CALLS:
            yield from (r for arg in args for r in _guard_nodes(arg))
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args, keywords=[]):
            if isinstance(value, ast.Name):
                if attr not in _MODULE_CALLS.get(value.id, ()):
                    yield f"a call of {value.id}.{attr}"
            elif attr in _GUARD_METHODS:
                yield from _guard_nodes(value)
            else:
                yield f"a call of .{attr}"
            yield from (r for arg in args for r in _guard_nodes(arg))
        case ast.Attribute(value=ast.Name(id="math"), attr=attr) if attr in _MODULE_CALLS["math"]:
            pass
        case ast.Subscript(value=value, slice=ast.Constant(value=index)):
            if isinstance(index, str) and not text_is_tame(index):
                yield f"the key {index!r}"
            yield from _guard_nodes(value)
        case ast.Name(id="L"):
            pass
        case ast.Constant(value=bool() | int() | float()):
            pass
        case _:
            yield from _plain(node, _guard_nodes)


def _plain(node: ast.AST, visit: object) -> Iterator[str]:
    """Operators pass and their operands are visited; every other construct is refused by name."""
    if not isinstance(node, _PLAIN_NODES):
        yield f"a {type(node).__name__.lower()}"
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        yield from _exponent(node.right)
    for child in ast.iter_child_nodes(node):
        yield from visit(child)  # type: ignore[operator]


def _exponent(node: ast.AST) -> Iterator[str]:
    """A constant exponent must be small: sympy would work the power out."""
    for part in ast.walk(node):
        value = part.value if isinstance(part, ast.Constant) else 0
        if isinstance(value, int | float) and abs(value) > _MAX_EXPONENT:
            yield f"the exponent {value}"


def power_reason(text: str) -> str | None:
    """Why working out the powers and shifts in ``text`` may never end, or None where it is quick.

    Raises:
        SyntaxError: ``text`` is no expression.
    """
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            if not isinstance(node.right, ast.Constant):
                return "an exponent that is no number"
            if reason := next(_exponent(node.right), None):
                return reason
    return None


def _number(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    is_text = isinstance(value, str) and _NUMBER.fullmatch(value)
    if not (is_text or isinstance(value, int | float)):
        yield "a number that is not one"


def _assumptions(call: ast.Call) -> Iterator[str]:
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg is None or not isinstance(value, ast.Constant):
            yield f"the argument {keyword.arg}"
        elif not isinstance(value.value, bool | int | None):
            yield f"the argument {keyword.arg}={value.value!r}"


def text_is_tame(text: object) -> bool:
    """Whether a string can be pasted between quotes into code, as torch does, and stay a string."""
    return isinstance(text, str) and text.isprintable() and not set(text) & set("'\"\\")
