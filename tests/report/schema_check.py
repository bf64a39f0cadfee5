"""The part of JSON Schema that the report's schema uses, as a checker for tests."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
KNOWN = {
    "$ref", "$defs", "$schema", "additionalProperties", "const", "description", "enum", "items",
    "minimum", "properties", "required", "title", "type",
}  # fmt: skip


def problems(data: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """Where ``data`` does not fit ``schema``; raises on a keyword it does not know."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return problems(data, root["$defs"][schema["$ref"].rpartition("/")[2]], root, at)
    found = [f"{at}: {data!r} is not {schema['const']!r}"] if _differs(data, schema) else []
    if "enum" in schema and data not in schema["enum"]:
        found.append(f"{at}: {data!r} is not one of {schema['enum']}")
    if "type" in schema and not _is(data, schema["type"]):
        return [*found, f"{at}: {type(data).__name__} is not {schema['type']}"]
    if isinstance(data, int | float) and data < schema.get("minimum", data):
        found.append(f"{at}: {data} is too small")
    if isinstance(data, list) and "items" in schema:
        rows = (problems(x, schema["items"], root, f"{at}[{i}]") for i, x in enumerate(data))
        found += [p for row in rows for p in row]
    return found + _object_problems(data, schema, root, at)


def _object_problems(data: Any, schema: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    if not isinstance(data, dict):
        return []
    found = [f"{at}.{key} is missing" for key in schema.get("required", ()) if key not in data]
    for key, value in data.items():
        inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
        if inner is not None:
            found += problems(value, inner, root, f"{at}.{key}")
    return found


def _differs(data: Any, schema: dict[str, Any]) -> bool:
    return "const" in schema and data != schema["const"]


def _is(data: Any, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(data, bool):
        return "boolean" in names
    return any(isinstance(data, _TYPES[name]) for name in names)
