"""The program inside a ``.pt2`` file (``models/NAME.json``), checked before torch builds it.

torch trusts this file: it evaluates shape expressions and guards, looks operators up by dotted
path, imports modules named in argument structures, and pastes names into generated Python. Every
such place is held here to the little that a program needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from graphopt.loading.expressions import SYMBOL, guard_reason, symbolic_reason, text_is_tame
from graphopt.loading.findings import Finding
from graphopt.loading.operators import operator_reason
from graphopt.loading.pt2_classes import part_reason

_FACTORIES = {
    *(("builtins", name) for name in ("dict", "list", "set", "tuple", "int", "float", "str")),
    *(("collections", name) for name in ("OrderedDict", "deque")),
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("as_int", "as_scalar_type", "as_memory_format", "as_layout"), int),
    **dict.fromkeys(("as_string", "as_name", "as_operator", "expr_str", "target"), str),
    **dict.fromkeys(("in_spec", "out_spec", "fqn"), str),
    **dict.fromkeys(("as_ints", "as_floats", "as_bools", "as_strings", "guards_code"), list),
    **dict.fromkeys(("forward_arg_names", "nodes", "inputs"), (list, type(None))),
    "as_bool": bool,
    "as_float": (float, int, str),
    "metadata": dict,
    "range_constraints": dict,
}
_NAME_KEYS = {"name", "as_name", "user_input_name"}
_PATH_KEYS = {"parameter_name", "buffer_name", "tensor_constant_name", "fqn"}
_NAMED_VALUES = {"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"}
_OBJECT_KEYS = {"as_custom_obj", "custom_obj", "custom_obj_values"}


def program_findings(program: Any, where: str) -> Iterator[Finding]:
    """Everything in a parsed program that torch must not be given."""
    stack: list[tuple[str, Any]] = [("", program)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, list):
            stack.extend((f"{path}[{i}]", child) for i, child in enumerate(item))
        elif isinstance(item, dict):
            for key, value in item.items():
                reasons = list(_reasons(key, value))
                yield from (
                    Finding(r, f"{where}, {path}.{key}".replace(" .", " ")) for r in reasons
                )
                stack.append((f"{path}.{key}".lstrip("."), value))


def _reasons(key: str, value: Any) -> Iterator[str]:
    """What is wrong with one entry of the program, judged by its key."""
    expected = _TYPES.get(key)
    if expected and (
        not isinstance(value, expected) or (expected is int and isinstance(value, bool))
    ):
        yield f"{key} is a {type(value).__name__}"
    elif key in _NAME_KEYS:
        yield from _name_reasons(value)
    elif key in _OBJECT_KEYS and value:
        yield "the program holds a native object, which only its own pickle restores"
    elif key in _NAMED_VALUES:
        yield from (r for name in value for r in _name_reasons(name))
    elif key in _PATH_KEYS and not text_is_tame(value):
        yield f"{value!r:.80} is not a parameter's name"
    elif rule := _RULES.get(key):
        yield from rule(value)


def _name_reasons(name: Any) -> Iterator[str]:
    if name not in (None, "") and not (isinstance(name, str) and name.isidentifier()):
        yield f"the name {name!r:.80} would become code"


def _targets(value: Any) -> Iterator[str]:
    if reason := operator_reason(value):
        yield reason


def _expression(value: Any) -> Iterator[str]:
    if reason := symbolic_reason(value):
        yield f"the size {value!r:.80} is more than arithmetic: {reason}"


def _guards(value: list[Any]) -> Iterator[str]:
    for code in value:
        if reason := guard_reason(code):
            yield f"the guard {code!r:.80} is more than a condition on sizes: {reason}"


def _ranges(value: dict[str, Any]) -> Iterator[str]:
    for symbol in value:
        if not SYMBOL.fullmatch(symbol) or len(symbol) > 10:
            yield f"the symbol {symbol!r:.80} is none that torch makes"


def _argument_names(value: list[Any] | None) -> Iterator[str]:
    for name in value or ():
        yield from _name_reasons(name)


def _constant(value: Any) -> Iterator[str]:
    """A constant input; torch quotes a text into a guard without escaping it."""
    text = value.get("value", {}).get("as_string") if isinstance(value, dict) else None
    if text is not None and not text_is_tame(text):
        yield f"the constant input {text!r:.80} holds quotes or control characters"


def _graph(value: Any) -> Iterator[str]:
    for argument in value.get("inputs") or () if isinstance(value, dict) else ():
        yield from _constant({"value": argument})


def _structure(text: str) -> Iterator[str]:
    """A pytree structure; its types are looked up among those registered in this process."""
    _, spec = json.loads(text)
    yield from _structure_reasons(spec)


def _input_structure(text: str) -> Iterator[str]:
    """The structure of (args, kwargs), whose keywords become names of parameters."""
    yield from _structure(text)
    match json.loads(text)[1]:
        case {"children_spec": [_, {"type": "builtins.dict", "context": keywords}]}:
            yield from _argument_names(json.loads(keywords))


def _structure_reasons(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _dict_reasons(value)
        for key, child in value.items():
            yield from _structure_reasons(_parsed(child) if key == "context" else child)
    elif isinstance(value, list):
        for child in value:
            yield from _structure_reasons(child)
    elif isinstance(value, str) and not text_is_tame(value):
        yield f"the key {value!r:.80} in an argument structure holds quotes or control characters"


def _dict_reasons(value: dict[str, Any]) -> Iterator[str]:
    factory = value.get("default_factory_module"), value.get("default_factory_name")
    if factory != (None, None) and factory not in _FACTORIES:
        yield f"an argument structure imports {factory[0]} and calls its {factory[1]}"
    if "_t" in value and (reason := part_reason(value)):
        yield reason
    if "__enum__" in value and not _is_imported_enum(str(value.get("fqn"))):
        yield f"an argument structure imports {value.get('fqn')}"


def _parsed(context: Any) -> Any:
    try:
        return json.loads(context) if isinstance(context, str) else context
    except ValueError:
        return context


def _is_imported_enum(path: str) -> bool:
    """Whether ``module:Class`` names an enumeration, found without importing anything."""
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if found is not None else None
    return isinstance(found, type) and issubclass(found, Enum)


_RULES: dict[str, Callable[[Any], Iterator[str]]] = {
    "target": _targets,
    "as_operator": _targets,
    "expr_str": _expression,
    "guards_code": _guards,
    "range_constraints": _ranges,
    "forward_arg_names": _argument_names,
    "in_spec": _input_structure,
    "out_spec": _structure,
    "constant_input": _constant,
    "graph": _graph,
}
