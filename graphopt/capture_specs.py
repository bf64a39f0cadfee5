"""Reading ``dynamic_shapes``: all that `torch.export.export` takes, and names as plain strings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.export.dynamic_shapes import _DerivedDim, _DimHint, _DimHintType
from torch.utils import _pytree as pytree

from graphopt.capture_axes import Axes, Axis, Path
from graphopt.errors import CaptureError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def declared_axes(model: nn.Module, call: Call, dynamic_shapes: Any) -> Axes:
    """The axes that ``dynamic_shapes`` declares for the example call ``(args, kwargs)``.

    ``{"input_ids": {0: "batch", 1: "seq"}}`` is enough: inputs and axes left out are static.

    Raises:
        CaptureError: a name, an axis or a size that the example call does not have.
    """
    if not dynamic_shapes:
        return Axes()
    if hasattr(dynamic_shapes, "dynamic_shapes"):
        dynamic_shapes = dynamic_shapes.dynamic_shapes(model, *call)
    arguments = _arguments(model, call)
    specs = _by_argument(model, arguments, dynamic_shapes)
    axes = [
        axis
        for name, spec in specs.items()
        for path, value, label, inner in _values(model, name, arguments[name], spec)
        for axis in _walk(value, inner, path, label)
    ]
    made = Axes(axes)
    made.check(call)
    return made


def _arguments(model: nn.Module, call: Call) -> dict[str, list[tuple[Path, Any]]]:
    """Argument name -> its values with their paths in ``(args, kwargs)``; several for ``*args``."""
    args, kwargs = call
    parameters = list(inspect.signature(model.forward).parameters.values())
    found: dict[str, list[tuple[Path, Any]]] = {}
    for index, value in enumerate(args):
        rest = next((p for p in parameters[: index + 1] if p.kind is p.VAR_POSITIONAL), None)
        parameter = rest or parameters[index]
        path: Path = (pytree.SequenceKey(0), pytree.SequenceKey(index))
        found.setdefault(parameter.name, []).append((path, value))
    for name, value in kwargs.items():
        found[name] = [((pytree.SequenceKey(1), pytree.MappingKey(name)), value)]
    return found


def _values(
    model: nn.Module, name: str, values: list[tuple[Path, Any]], spec: Any
) -> Iterator[tuple[Path, Any, str, Any]]:
    """The values behind one name, each with its own specification: ``*args`` takes a sequence."""
    parameter = inspect.signature(model.forward).parameters.get(name)
    if parameter is None or parameter.kind is not parameter.VAR_POSITIONAL or spec is None:
        yield (*values[0], name, spec)
        return
    each = "a sequence with one entry each, such as ({0: 'batch'}, None)"
    inner = dict(enumerate(_entries(name, spec, each))) if not isinstance(spec, Mapping) else spec
    if wrong := [v for v in inner.values() if _names_axis(v)]:
        what = f"has {len(values)} values, dynamic_shapes gives {wrong[0]!r} for one"
        raise _misfit(name, what, f"give {each}")
    if unknown := [i for i in inner if i not in range(len(values))]:
        raise _misfit(name, f"has {len(values)} values, no value {unknown[0]!r}", "give one each")
    for index, (path, value) in enumerate(values):
        yield path, value, f"{name}[{index}]", inner.get(index)


def _by_argument(
    model: nn.Module, arguments: Mapping[str, list[tuple[Path, Any]]], given: Any
) -> dict[str, Any]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(arguments):
            raise _wrong(f"has {len(given)} entries for {len(arguments)} arguments", arguments)
        return dict(zip(arguments, given, strict=True))
    if not isinstance(given, Mapping):
        raise _wrong(f"is a {type(given).__name__}", arguments)
    extra = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind is p.VAR_KEYWORD and isinstance(given.get(p.name), Mapping)
    ]
    flat = {k: v for k, v in given.items() if k not in extra}
    for name in extra:
        flat.update(given[name])
    if unknown := [k for k in flat if k not in arguments]:
        raise _wrong(f"names {unknown[0]!r}, which is not an input of the call", arguments)
    return flat


def _wrong(what: str, arguments: Mapping[str, list[Any]]) -> CaptureError:
    name, values = next(iter(arguments.items()), ("x", [None]))
    axes = ", ".join(['{0: "batch"}'] * len(values))
    axes = axes if len(values) == 1 else f"({axes})"
    return CaptureError(
        f"dynamic_shapes {what}",
        where="dynamic_shapes",
        fix=f"use the names of the inputs: {', '.join(arguments)}; for example "
        f'{{"{name}": {axes}}}',
    )


def _walk(value: Any, spec: Any, path: Path, label: str) -> Iterator[Axis]:
    if spec is None:
        return
    if isinstance(value, Tensor):
        yield from _tensor_axes(value, spec, path, label)
    elif isinstance(value, int) and not isinstance(value, bool):
        if (axis := _axis(label, path, None, spec)) is not None:
            yield axis
    else:
        children = pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)[0]
        if len(children) == 1 and not children[0][0]:
            raise _misfit(label, f"is a {type(value).__name__} and has no axes", "use None for it")
        for key, child, inner in _pair(children, spec, label):
            yield from _walk(child, inner, (*path, key), label + pytree.keystr((key,)))


def _pair(
    children: list[tuple[Path, Any]], spec: Any, label: str
) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(spec, Mapping):
        known = {_key(path[0]): (path[0], child) for path, child in children}
        for name, inner in spec.items():
            if name not in known:
                raise _misfit(label, f"has no entry {name!r}", f"it has {list(known)}")
            yield (*known[name], inner)
    else:
        inners = _entries(label, spec, "a dict or a sequence")
        if len(inners) != len(children):
            what = f"has {len(children)} entries, dynamic_shapes gives {len(inners)}"
            raise _misfit(label, what, "give one entry each, None where static")
        for (path, child), inner in zip(children, inners, strict=True):
            yield path[0], child, inner


def _entries(label: str, spec: Any, wanted: str) -> tuple[Any, ...]:
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        raise _misfit(label, f"is declared as {spec!r}", f"give {wanted}")
    return tuple(spec)


def _names_axis(spec: Any) -> bool:
    return isinstance(spec, str | Dim | _DimHint)


def _key(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _tensor_axes(value: Tensor, spec: Any, path: Path, label: str) -> Iterator[Axis]:
    if not isinstance(spec, Mapping):
        entries = _entries(label, spec, "a dict {axis: name}")
        if len(entries) != value.dim():
            what = f"has {value.dim()} axes, dynamic_shapes gives {spec!r}"
            raise _misfit(label, what, "give a dict {axis: name}")
        spec = dict(enumerate(entries))
    for index, given in spec.items():
        if not isinstance(index, int) or not -value.dim() <= index < value.dim():
            what = f"has {value.dim()} axes, but dynamic_shapes names axis {index!r}"
            raise _misfit(label, what, f"axes of {label} are 0 to {value.dim() - 1}")
        if (axis := _axis(label, path, index % value.dim(), given)) is not None:
            yield axis


def _axis(label: str, path: Path, dim: int | None, given: Any) -> Axis | None:
    if given is None or isinstance(given, int):
        return None
    if isinstance(given, str) and given.isidentifier():
        return Axis(label, path, dim, given)
    if isinstance(given, _DimHint):
        if given.type is _DimHintType.STATIC:
            return None
        low, high = given.min or 1, given.max
        return Axis(label, path, dim, None, low, high, optional=given.type is _DimHintType.AUTO)
    if isinstance(given, _DerivedDim):
        root = str(given.root.__name__)
        return Axis(label, path, dim, str(given.__name__), root=root, fn=given.fn)
    if isinstance(given, Dim):
        high = int(given.max) if isinstance(given.max, int) else None
        return Axis(label, path, dim, str(given.__name__), max(1, int(given.min)), high)
    raise _misfit(label, f"axis {dim} is declared as {given!r}", "use a name or a torch.export.Dim")


def _misfit(label: str, what: str, fix: str) -> CaptureError:
    return CaptureError(f"{label} {what}", where=f"dynamic_shapes, {label}", fix=fix)
