"""Passes: named, configured groups of rules. Their fields are Python arguments, CLI options and
recipe keys at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import yaml
from torch import fx

from graphopt.errors import RecipeError
from graphopt.program import Program
from graphopt.rewrite.rule import Rule

ENTRY_POINT_GROUP = "graphopt.passes"


@dataclass(frozen=True)
class Cut:
    """The axis ``dim`` of what ``node`` computes: it comes from ``operand_dim`` of an operand.

    Attributes:
        operand: its position among ``node.all_input_nodes``.
    """

    node: fx.Node
    dim: int
    operand: int
    operand_dim: int


Axis = tuple[Cut, ...]
"""One axis of one large value, or of several that are computed on together."""


class Attempt(Protocol):
    """A program with a pass tried on it.

    Attributes:
        program: with the pass, as far as it verified.
        bytes: of all it stores.
        quality: by the user's measure, with the passes behind this one; ``None`` where there is
            none, or it was not asked.
    """

    @property
    def program(self) -> Program: ...
    @property
    def bytes(self) -> int: ...
    @property
    def quality(self) -> float | None: ...


class Trials(Protocol):
    """What a pass may ask for that chooses among its own options.

    Attributes:
        program: as the pass finds it.
        samples: calibration inputs, flat.
    """

    program: Program
    samples: Sequence[Sequence[Any]]

    @property
    def least(self) -> float | None:
        """The quality that the user asks for; ``None`` where there is no measure of it."""
        ...

    def progress(self, text: str, /) -> None: ...

    def attempt(self, step: Pass, *, judged: bool = False) -> Attempt:
        """Run a pass of which nothing is left to be chosen."""
        ...

    def record(self, size: int, loss: float, quality: float | None, *, chosen: bool) -> None:
        """Something that was looked at, for the report."""
        ...


@dataclass(frozen=True)
class Settled:
    """What a pass chose: itself with nothing left to choose, and the attempt that it made so."""

    step: Pass
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Pass:
    """A step of a recipe. Subclasses are frozen dataclasses that give `rules`."""

    def rules(self) -> Sequence[Rule]:
        """The rules this pass applies together, to a fixpoint."""
        raise NotImplementedError(f"{self.name} defines no rules")

    def concede(self, program: Program) -> None:
        """Take out of a program what the options give up, before anything is rewritten.

        What is left is what every rewrite is held to.
        """

    def axes(self, _program: Program) -> Sequence[Sequence[Axis]]:
        """For each large value that the rules act on, axes whose positions do not meet before they
        are summed up: verification takes fewer of them.
        """
        return ()

    def stages(self) -> Sequence[Pass]:
        """The passes that this one consists of, each applied and verified by itself."""
        return (self,)

    def calibrated(
        self,
        _program: Program,
        _samples: Sequence[Sequence[Any]],
        _progress: Callable[[str], None],
    ) -> Pass:
        """The same pass with what it learns from calibration inputs, flat, of a program.

        Asked for before its rules are applied to that program.
        """
        return self

    def defers(self) -> frozenset[str]:
        """Names of passes that a preset had better apply behind this one."""
        return frozenset()

    @property
    def searches(self) -> bool:
        """Whether options are left to be chosen on a program: see `settled`."""
        return False

    def settled(self, _trials: Trials) -> Settled:
        """The same pass with all options chosen, as a recipe would repeat it.

        Asked for where the pass `searches`, before anything else of it.
        """
        return Settled(self)

    def at_any_size(self) -> Pass:
        """The same pass without limits below which it leaves values alone: for fewer rows."""
        return self

    @property
    def name(self) -> str:
        return type(self).__name__

    def options(self) -> dict[str, Any]:
        """Field values, as a recipe would spell them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        given = ",".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.name}:{given}" if given else self.name


@cache
def registered_passes() -> Mapping[str, type[Pass]]:
    """Every pass by name: those of graphopt and those of installed packages."""
    found: dict[str, type[Pass]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise RecipeError(f"entry point {point.name} is not a Pass", where=point.value)
        found[loaded.__name__] = loaded
    return dict(sorted(found.items()))


def make_pass(name: str, options: Mapping[str, Any] | None = None, where: str = "recipe") -> Pass:
    """Build a pass from its name and options; unknown names and keys are errors.

    Raises:
        RecipeError: names the nearest valid spelling, or the type that was expected.
    """
    known = registered_passes()
    if name not in known:
        raise RecipeError(f"unknown pass {name!r}", where=where, fix=_nearest(name, known))
    if options is not None and not isinstance(options, Mapping):
        raise RecipeError(
            f"{name}: options are a mapping, but {options!r:.80} was given",
            where=where,
            fix=f"write {name}: {{key: value}}",
        )
    kind = known[name]
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in (options or {}).items():
        if key not in fields:
            raise RecipeError(
                f"{name} has no option {key!r}", where=where, fix=_nearest(str(key), fields)
            )
        if not _fits(value, hints[key]):
            raise RecipeError(
                f"{name}: {key}={value!r} should be {_spell(hints[key])}", where=where
            )
    try:
        return kind(**dict(options or {}))
    except ValueError as error:  # options that exclude each other
        raise RecipeError(str(error), where=where) from error


def parse_pass(text: str) -> Pass:
    """``NAME`` or ``NAME:key=value,key=value``; values are YAML on one line.

    Lists are ``[a,b]`` and mappings ``{a: 1, b: {c: 2}}``; commas in brackets or quotes are theirs.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, _items(rest)):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"expected key=value, found {item!r}", where=text)
        if key.strip() in options:
            raise RecipeError(
                f"{key.strip()!r} is given twice", where=text, fix="give each option once"
            )
        options[key.strip()] = _scalar(value, text)
    return make_pass(name.strip(), options, where=text)


_PIECE = re.compile(r"""'[^']*'|"[^"]*"|.""", re.DOTALL)
"""A quoted text, or a character."""


def _items(text: str) -> list[str]:
    """What stands between commas that are in no brackets and in no quotes."""
    items, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += piece
    return items


def _scalar(value: str, where: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"cannot read the value {value!r:.80}", where=where, fix="write a YAML scalar"
        ) from error


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    listed = ", ".join(known) or "none"
    return f"did you mean {close[0]!r}?" if close else f"valid names: {listed}"


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
