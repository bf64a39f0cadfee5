"""The example call: in the form in which it is traced, and in the form in which users repeat it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import huggingface
from graphopt.capture_checks import checked_call
from graphopt.capture_specs import Call
from graphopt.capture_watch import left_as_it_is, same_answers
from graphopt.program import Program
from graphopt.signature import CallSpec

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Example:
    """A model and the call of it that is traced.

    Attributes:
        call: ``(args, kwargs)`` of the trace.
        flags: keyword arguments that become part of the program.
        hugging_face: the ``PreTrainedModel`` instances in the model, the outermost first.
        notes: sentences for the user about the form of the call.
    """

    model: nn.Module
    call: Call
    flags: dict[str, Any] = field(default_factory=dict)
    hugging_face: list[nn.Module] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Any:
        """The model's own answer on a copy of the example."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, self.call)
        return self.model(*args, **kwargs, **self.flags)

    def needs(self, flag: str) -> bool:
        """Whether the model answers otherwise where a flag is left out."""
        others = {k: v for k, v in self.flags.items() if k != flag}
        with torch.no_grad(), suppress(Exception):  # what fails without the flag needs it
            first, second = (_answer(e) for e in (self, replace(self, flags=others)))
            return not same_answers(first, second)
        return True


def _answer(example: Example) -> Any:
    with left_as_it_is(example.model), torch.random.fork_rng():
        torch.manual_seed(0)
        return pytree.tree_map_only(Tensor, torch.clone, example.run())


def example_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Check the call; a Hugging Face model gets its arguments by name and its flags apart.

    Raises:
        CaptureError: the call does not fit ``forward``, or a graph cannot take an argument.
    """
    found = huggingface.pretrained_models(model)
    huggingface.register_caches(found)
    checked_call(model, args, kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, _usable, (args, kwargs))
    if not found or found[0] is not model:
        return Example(model, (args, kwargs), hugging_face=found)
    values, flags = huggingface.by_keyword(model, args, kwargs)
    with torch.no_grad():
        added = huggingface.precomputed(model, values)
    notes = [f"{name} is computed from the other inputs before the call: pass it" for name in added]
    return Example(model, ((), values), flags, found, notes)


def _usable(value: Tensor) -> Tensor:
    """Inference tensors cannot take part in a trace with gradients; their copies can."""
    return value.clone() if value.is_inference() else value


@contextmanager
def flat_forward(example: Example) -> Iterator[None]:
    """For the trace, a ``forward`` with exactly the parameters of the call, and the flags fixed.

    torch cannot match dynamic axes to arguments that arrive through ``**kwargs``.
    """
    model, original = example.model, example.model.forward
    parameters = inspect.signature(original).parameters.values()
    if not example.flags and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs, **example.flags)

    args, kwargs = example.call
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [*_positional_names(original, len(args)), *kwargs]
    shown = [inspect.Parameter(name, kind, default=None) for name in names]
    forward.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        vars(model).update({} if own is None else {"forward": own})


def _positional_names(forward: Any, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments; ``rest_0``, ``rest_1`` for ``*rest``."""
    parameters = list(inspect.signature(forward).parameters.values())
    names = [p.name for p in parameters if p.kind in _BY_POSITION][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "argument")
    return names + [f"{rest}_{i}" for i in range(count - len(names))]


def call_spec(example: Example, program: Program) -> CallSpec:
    """The program's call, with what ``forward`` says about arguments that a later call may pass."""
    assert program.call is not None
    parameters = inspect.signature(example.model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    config = getattr(example.model, "config", None)
    meant = {name: _meant(config, name, defaults.get(name)) for name in example.flags}
    meant |= {k: v for k, v in example.flags.items() if meant[k] != v and not example.needs(k)}
    return replace(
        program.call,
        positional=tuple(p.name for p in parameters if p.kind in _BY_POSITION),
        defaults=defaults | meant,
        fixed=dict(example.flags),
    )


def _meant(config: Any, name: str, default: Any) -> Any:
    """What a Hugging Face model takes for a flag left out: for ``None``, what its config says."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    said = (getattr(source, name, None) for source in (config, text))
    return next((value for value in (default, *said) if value is not None), False)
