"""What the backend's name stands for, where callers pass on a name and no options."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from graphopt.backend import Backend, registered
from graphopt.backend_options import parsed
from graphopt.report.model import Report

NAME = "graphopt"


def register_backend(**options: Any) -> list[Report]:
    """Let the name ``"graphopt"`` stand for the backend with these options.

    ``torch.compile(model, backend="graphopt")`` takes them where it is given none, for every graph
    that is compiled from now on. accelerate has a closed list of backends: the name is added to it,
    so that ``TrainingArguments(torch_compile_backend="graphopt")`` is understood.

    Args:
        options: fields of `graphopt.recipe.Options` (``passes``, ``target``, ``strict``, ...).

    Returns:
        A list that gets the report of each graph as it is compiled.

    Raises:
        RecipeError: there is no such option, or it has no meaning here.
    """
    backend = Backend(parsed(options))
    registered[:] = [backend]
    _tell_accelerate()
    return backend.reports


def _tell_accelerate() -> None:
    """Add the name to accelerate's enumeration, as Python adds combinations of flags to one."""
    if find_spec("accelerate") is None:
        return
    kind: Any = importlib.import_module("accelerate.utils").DynamoBackend
    name = NAME.upper()
    if name in kind.__members__:
        return
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[name] = member
