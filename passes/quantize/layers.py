"""Formats of weights that differ from those of the rest, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from torch import fx

from graphopt.kernels.quantized.scheme import Scheme
from graphopt.passes.quantize.names import check_patterns, paths, weight_names
from graphopt.program import Program
from graphopt.rewrite import Refusal

OPTION = "QuantizeMatmul:layers"
FIELDS: Mapping[str, tuple[type, ...]] = {
    "bits": (int,),
    "dtype": (str,),
    "group_size": (int, type(None)),
    "symmetric": (bool,),
    "activations": (str, type(None)),
}
"""What may differ between weights, and the types of it."""

Fields = Mapping[str, Any] | None
"""What differs for some weights; ``None`` leaves them as they are."""


class Kind(NamedTuple):
    """The format of a weight, and of the activations that it meets."""

    scheme: Scheme
    activations: str


def checked(given: Any) -> dict[str, Fields]:
    """Patterns and fields, ``"float"`` as ``None``.

    Raises:
        ValueError: there is something else; the message names the pattern.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"layers is a mapping of patterns to fields, not {given!r:.80}")
    return {_name(pattern): _fields(pattern, fields) for pattern, fields in given.items()}


def _name(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"layers: a pattern is the name of weights, not {pattern!r:.80}")
    return pattern


def _fields(pattern: str, given: Any) -> Fields:
    if given is None or given == "float":
        return None
    where = f"layers: {pattern!r}"
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"{where} is given {given!r:.80}: fields such as {{'bits': 8}}, or 'float', which "
            "leaves a weight as it is"
        )
    for name, value in given.items():
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, n=1, cutoff=0.4)
            help_ = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(FIELDS)}"
            raise ValueError(f"{where} has no field {name!r}: {help_}")
        if name == "activations" and value not in ("dynamic", "static", None):
            raise ValueError(
                f"{where}: activations={value!r:.80} should be 'dynamic', 'static' or None"
            )
        is_number = int in FIELDS[name] and isinstance(value, bool)
        if is_number or not isinstance(value, FIELDS[name]):
            kinds = " or ".join("None" if k is type(None) else k.__name__ for k in FIELDS[name])
            raise ValueError(f"{where}: {name}={value!r:.80} should be {kinds}")
    return dict(given)


@dataclass(frozen=True)
class Layers:
    """Which format each weight has: the first pattern decides that matches one of its names.

    Attributes:
        usual: of weights that no pattern matches.
        patterns: as `fnmatch` reads them, of weights or of their modules; ``None`` keeps these.
    """

    usual: Kind
    patterns: Mapping[str, Kind | None]

    @classmethod
    def of(
        cls, usual: Kind, given: Mapping[str, Fields], made: Callable[[Mapping[str, Any]], Kind]
    ) -> Layers:
        """From fields, which ``made`` completes with those of all weights.

        Raises:
            ValueError: they do not go together; the message names the pattern.
        """
        known: dict[tuple[Any, ...], Kind] = {}
        found: dict[str, Kind | None] = {}
        for pattern, fields in given.items():
            if fields is None:
                found[pattern] = None
                continue
            key = tuple(sorted(fields.items()))
            try:
                found[pattern] = known[key] if key in known else known.setdefault(key, made(fields))
            except ValueError as error:
                raise ValueError(f"layers: {pattern!r}: {error}") from error
        return cls(usual, found)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All formats that there are."""
        return tuple(dict.fromkeys((self.usual, *filter(None, self.patterns.values()))))

    def check(self, program: Program) -> None:
        """Whether each pattern means something in a model.

        Raises:
            RecipeError: one matches no name; the nearest are told.
        """
        check_patterns("layers", self.patterns, program)

    def kind(self, program: Program, weight: fx.Node) -> Kind:
        """The format of a weight; the usual one too where it is left alone."""
        found = {self.patterns[p] for p in self.matched(program, weight).values()}
        only = found.pop() if len(found) == 1 else None
        return only or self.usual

    def refusal(self, program: Program, weight: fx.Node) -> Refusal | None:
        """Why a weight is left alone, if it is: it is asked for, or its names disagree."""
        found = self.matched(program, weight)
        (name, pattern), *others = [*found.items()] or [("", "")]
        if not name:
            return None
        for other, second in others:
            if self.patterns[second] != self.patterns[pattern]:
                reason = (
                    f"`{name}` and `{other}` are one tensor here, and {pattern!r} and {second!r} "
                    "ask for formats that differ"
                )
                return Refusal(reason, weight, OPTION)
        if self.patterns[pattern] is None:
            return Refusal(f"`{name}` is kept in float by {pattern!r}", weight, OPTION)
        return None

    def matched(self, program: Program, weight: fx.Node) -> dict[str, str]:
        """The pattern that decides for each name of a weight that has one."""
        if not self.patterns:
            return {}
        found = ((name, self.first(name)) for name in weight_names(program, weight))
        return {name: pattern for name, pattern in found if pattern is not None}

    def first(self, name: str) -> str | None:
        """The pattern that decides for a name, if there is one.

        Names without wildcards are looked up: there may be one for each weight of a model."""
        own = list(paths([name]))
        places = [self._plain[path] for path in own if path in self._plain]
        end = min(places, default=len(self.patterns))
        for place, pattern in self._wild:
            if place < end and any(fnmatchcase(path, pattern) for path in own):
                end = place
        return self._order[end] if end < len(self._order) else None

    @cached_property
    def _order(self) -> list[str]:
        return list(self.patterns)

    @cached_property
    def _plain(self) -> dict[str, int]:
        return {p: i for i, p in enumerate(self._order) if not _is_wild(p)}

    @cached_property
    def _wild(self) -> list[tuple[int, str]]:
        return [(i, p) for i, p in enumerate(self._order) if _is_wild(p)]


def _is_wild(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")
