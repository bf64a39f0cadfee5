"""The signature of a program: what its inputs and outputs stand for, and when it is the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch.utils import _pytree as pytree


def is_cache(kind: Any) -> bool:
    """Whether a class holds keys and values of positions seen before; all of them are named so."""
    return getattr(kind, "__name__", "").endswith("Cache")


class InputKind(StrEnum):
    """What a placeholder stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    USER = "user"


class OutputKind(StrEnum):
    """Where a value of the output node goes."""

    USER = "user"
    BUFFER_MUTATION = "buffer_mutation"
    INPUT_MUTATION = "input_mutation"


@dataclass(frozen=True)
class ProgramInput:
    """One placeholder: its node name, its kind and, for state, the name the tensor lives at."""

    name: str
    kind: InputKind
    target: str | None = None
    persistent: bool = True


@dataclass(frozen=True)
class ProgramOutput:
    """One position of the output node; ``target`` names the buffer or input it updates.

    For a user output it names the updated buffer whose memory the result shows, if any.
    """

    kind: OutputKind
    target: str | None = None


@dataclass(frozen=True)
class CallSpec:
    """How a call ``f(*args, **kwargs)`` flattens to user inputs, and how outputs are rebuilt.

    Attributes:
        in_spec: pytree of ``(args, kwargs)`` as captured.
        out_spec: pytree of the return value.
        parameter_names: names of the captured arguments, in the order of ``in_spec``.
        positional: every parameter of ``forward`` that may be passed by position, in its order, so
            that a call may pass by position what was captured by keyword.
        defaults: what ``forward`` takes for parameters that a call leaves out.
        fixed: arguments of the captured call that became part of the program (flags such as
            ``use_cache``); a call may repeat them, but not change them.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameter_names: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> CallSpec:
        """Itself: nothing in it is ever written, and torch warns of copies of its tree leaves."""
        return self


@dataclass(frozen=True)
class Assumption:
    """A condition on sizes under which the captured graph is the model, such as ``s0 % 2 == 0``.

    Attributes:
        text: a Python expression over the symbols of the placeholders' shapes.
        where: the user's ``file:line`` that branches on it, where one is known.
        reason: what was seen where it does not hold, as a sentence, where that was tried.
    """

    text: str
    where: str | None = None
    reason: str | None = None
