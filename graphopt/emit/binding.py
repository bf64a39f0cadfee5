"""From ``f(*args, **kwargs)`` to the flat inputs of a program, however the arguments are passed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.program import Program, val

_MISSING = object()


class CallBinder:
    """Binds a call to the captured arguments and flattens it.

    An argument may be passed by position or by keyword, whichever the capture used. What the
    capture saw as a constant, flags among them, may be left out where ``forward`` has that constant
    as its default, and what the capture left out may be passed where it is that default.

    Raises (when called):
        GraphoptError: an unknown, missing or repeated argument, or one whose structure differs.
    """

    def __init__(self, program: Program) -> None:
        call = program.call
        if call is None:
            raise GraphoptError(f"{program.name} has no call signature: pass its flat inputs")
        self.name = program.name
        args, kwargs = call.in_spec.children()
        self.positional = args.num_children
        self.keywords = tuple(kwargs.context)
        specs = (*args.children(), *kwargs.children())
        self.parameters = (*_positional_names(call.parameter_names, args), *self.keywords)
        self.specs = dict(zip(self.parameters, specs, strict=True))
        self.by_position = call.positional or self.parameters[: self.positional]
        self.fixed = {**call.defaults, **call.fixed}
        self.defaults = dict(call.defaults)
        self.chosen = {k: v for k, v in call.fixed.items() if not _same(call.defaults.get(k), v)}
        self.constants = dict(self._captured_constants(program))
        self.flat = all(spec.is_leaf() for spec in specs)

    def __deepcopy__(self, _memo: dict[int, Any]) -> CallBinder:
        """Itself: it never changes, and torch warns of copies of its tree leaves."""
        return self

    def _captured_constants(self, program: Program) -> Iterator[tuple[str, Any]]:
        values = iter([val(node) for node in program.user_inputs()])
        for name, spec in self.specs.items():
            leaves = [next(values) for _ in range(spec.num_leaves)]
            if spec.is_leaf() and not isinstance(leaves[0], Tensor):
                yield name, leaves[0]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        as_captured = (
            not self.chosen and len(args) == self.positional and tuple(kwargs) == self.keywords
        )
        values = [*args, *kwargs.values()] if as_captured else self._bound(args, kwargs)
        if self.flat:
            return values
        flat: list[Any] = []
        for (name, spec), value in zip(self.specs.items(), values, strict=True):
            flat += [value] if spec.is_leaf() else self._flattened(name, spec, value)
        return flat

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        names = self.by_position
        if len(args) > len(names):
            what = f"takes {len(names)} positional arguments, but {len(args)} were given"
            raise self._error(what, f"pass by keyword: {', '.join(self.parameters)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise self._error(f"got {name} by position and by keyword", "pass it once")
            given[name] = value
        for name, value in given.items():
            if name not in self.specs:
                self._check_extra(name, value)
        for name, value in self.chosen.items():
            if name not in given:
                needed = f"{name}={_shown(value)}"
                what = f"needs {needed}: it was captured so, and the model's own default differs"
                raise self._error(what, f"pass {needed}, or capture without it")
        return [self._take(name, given.get(name, _MISSING)) for name in self.parameters]

    def _take(self, name: str, value: Any) -> Any:
        if value is not _MISSING:
            return value
        constant = self.constants.get(name, _MISSING)
        if constant is not _MISSING and _same(self.defaults.get(name, _MISSING), constant):
            return constant
        raise self._error(f"needs {name}", f"pass {', '.join(self.parameters)}")

    def _check_extra(self, name: str, value: Any) -> None:
        if name not in self.fixed:
            known = ", ".join(self.parameters)
            raise self._error(f"was captured without an argument {name!r}", f"it takes {known}")
        if not _same(self.fixed[name], value):
            raise self._error(
                f"was captured with {name}={_shown(self.fixed[name])}, not {_shown(value)}",
                f"capture again with {name} in the example inputs",
            )

    def _flattened(self, name: str, spec: pytree.TreeSpec, value: Any) -> list[Any]:
        leaves, found = pytree.tree_flatten(value)
        if found != spec:
            raise self._error(
                f"got {name} with another structure than at capture",
                f"captured: {spec}; given: {found}",
            )
        return leaves

    def _error(self, what: str, fix: str) -> GraphoptError:
        return GraphoptError(f"{self.name} {what}", where=f"call of {self.name}", fix=fix)


def _positional_names(names: tuple[str, ...], args: pytree.TreeSpec) -> Iterator[str]:
    for index in range(args.num_children):
        yield names[index] if index < len(names) else f"argument {index}"


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)
