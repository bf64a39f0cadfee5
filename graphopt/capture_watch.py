"""Tracing leaves the model and the random state as they were, and sees side effects."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture_modes import GRADIENTS
from graphopt.huggingface import EXACT_FUNCTIONS
from graphopt.source import calling_line, is_user_file
from graphopt.verify.measure import equal_bits

_SENTINEL = 0x6A09E667
_CONTAINERS = (list, dict, set)
# Attributes that a trace itself replaces (recurrent layers keep their weights twice), or that only
# say that transformers has set up its hooks.
_TABLES = frozenset(vars(nn.Module())) - {"training"}
_TABLES |= {"forward", "_flat_weights", "_flat_weight_refs", "_output_capturing_hooks_installed"}


@dataclass
class Watch:
    """What happened during a trace that the graph does not show.

    Attributes:
        before: the model's attributes before the trace.
        changed: attributes that forward wrote, ``submodule path.attribute``.
        lost_gradients: things that change gradients and leave no trace, with the user's line.
        notes: sentences about what was changed to make the trace possible.
        reseeded: forward set the seed of torch's generator.
        drew: a library other than torch whose random numbers forward drew.
    """

    before: Attributes
    changed: list[str] = field(default_factory=list)
    lost_gradients: list[tuple[str, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reseeded: bool = False
    drew: str | None = None

    def look(self) -> None:
        """Remember which attributes differ from what they were before the trace."""
        self.changed = list(dict.fromkeys((*self.changed, *self.before.changed())))

    def lose(self, what: str) -> None:
        entry = (what, calling_line())
        if entry not in self.lost_gradients:
            self.lost_gradients.append(entry)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Trace inside: side effects are recorded, and everything they changed is put back."""
    before = Attributes.of(model)
    watch = Watch(before)
    drawn = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), ExitStack() as stack:
        torch.manual_seed(_SENTINEL)
        for patch in _patches(watch):
            stack.enter_context(patch)
        try:
            yield watch
        finally:
            watch.reseeded = torch.initial_seed() != _SENTINEL
            watch.drew = _drew(drawn)
            watch.look()
            before.restore()
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])


def _drew(before: tuple[Any, Any]) -> str | None:
    if random.getstate() != before[0]:
        return "Python's random"
    now = np.random.get_state()
    same = all(np.array_equal(a, b) for a, b in zip(now, before[1], strict=True))  # type: ignore[arg-type]
    return None if same else "NumPy's random"


@dataclass(frozen=True)
class Attributes:
    """Every attribute of every submodule, containers copied one level deep."""

    saved: dict[str, tuple[nn.Module, dict[str, tuple[Any, Any]]]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        return cls(
            {
                path: (module, {name: (v, _copied(v)) for name, v in vars(module).items()})
                for path, module in model.named_modules()
            }
        )

    def changed(self) -> list[str]:
        """Plain attributes (not parameters or buffers) that hold something else now."""
        return [
            f"{path}.{name}" if path else name
            for path, (module, attributes) in self.saved.items()
            for name in dict.fromkeys((*attributes, *vars(module)))
            if name not in _TABLES and not _same(attributes.get(name), vars(module).get(name))
        ]

    def restore(self) -> None:
        for module, attributes in self.saved.values():
            for name in [n for n in vars(module) if n not in attributes]:
                del vars(module)[name]
            for name, (value, content) in attributes.items():
                vars(module)[name] = value
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict | set):
                    value.clear()
                    value.update(content)


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's attributes and buffers are what they were, by identity and value.

    Compared by their bits: kernels such as batch norm's write without counting a version, and a
    buffer that was not written must not be, as memory may be read-only.
    """
    attributes = Attributes.of(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        attributes.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                if not equal_bits(buffer, value):
                    buffer.copy_(value)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, _CONTAINERS) else None


def _same(saved: tuple[Any, Any] | None, now: Any) -> bool:
    if saved is None:
        return False
    value, content = saved
    if value is now:
        return not isinstance(value, _CONTAINERS) or _equal(content, now)
    return _equal(value, now)


def _equal(a: Any, b: Any) -> bool:
    """Equal plain values; for others, the same object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(torch.allclose(a, b, 0.0, 0.0, equal_nan=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    return isinstance(a, int | float | str | set | torch.Size) and a == b


def same_answers(one: Any, other: Any) -> bool:
    """Whether two outputs have one structure and equal leaves."""
    leaves, specs = zip(*map(pytree.tree_flatten, (one, other)), strict=True)
    return specs[0] == specs[1] and all(map(_equal, *leaves))


def remembers(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether a second call, with the attributes that the first one left behind, answers otherwise.

    Both calls start from the same buffers and the same random state. An attribute that only records
    something (a shape, a list of activations) changes no answer; a counter that is read does, and
    must not become a constant of the graph.
    """
    before = Attributes.of(model)
    tensors = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        first, second = (pytree.tree_leaves(_replayed(run, tensors)) for _ in range(2))
    finally:
        before.restore()
        _put_back(tensors)
    return len(first) != len(second) or not all(map(_equal, first, second))


def _replayed(run: Callable[[], Any], tensors: list[tuple[Tensor, Tensor]]) -> Any:
    _put_back(tensors)
    with torch.random.fork_rng():
        torch.manual_seed(_SENTINEL)
        return pytree.tree_map_only(Tensor, torch.clone, run())


def _put_back(tensors: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in tensors:
            buffer.copy_(value)


_CHECKPOINTED = (
    "activation checkpointing is not part of an exported graph: activations are kept; "
    "compile without example inputs to have them recomputed"
)


def _patches(watch: Watch) -> Iterator[Any]:
    """Replacements of the few entry points of torch whose effect a trace drops silently."""
    yield from _grad_patches(watch)
    tracer = torch.fx.proxy.TracerBase
    yield mock.patch.object(tracer, "create_node", _create_node_with_mode())
    if hasattr(tracer, "_filter_traceback_frames"):
        yield mock.patch.object(tracer, "_filter_traceback_frames", _user_frames)
    apply = torch.autograd.Function.__dict__["apply"].__func__

    def apply_seen(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is torch.utils.checkpoint.CheckpointFunction:
            watch.note(_CHECKPOINTED)
            return args[0](*args[2:])
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in EXACT_FUNCTIONS:
            return cls.forward(mock.Mock(), *args)
        if not name.startswith("torch."):
            watch.lose(f"the backward of {cls.__name__} (a torch.autograd.Function)")
        return apply(cls, *args, **kwargs)

    yield mock.patch.object(torch.autograd.Function, "apply", classmethod(apply_seen))
    regions = torch.utils.checkpoint
    begin = regions._checkpoint_without_reentrant_generator

    def begin_seen(*args: Any, **kwargs: Any) -> Any:
        watch.note(_CHECKPOINTED)
        return begin(*args, **kwargs)

    yield mock.patch.object(regions, "_checkpoint_without_reentrant_generator", begin_seen)


def _create_node_with_mode() -> Callable[..., torch.fx.Node]:
    """Nodes that know whether gradients were on: torch forgets it inside autocast regions."""
    create = torch.fx.proxy.TracerBase.create_node

    def create_node(self: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = create(self, *args, **kwargs)
        if node.op not in ("placeholder", "get_attr", "output"):
            node.meta[GRADIENTS] = torch.is_grad_enabled()
        return node

    return create_node


def _user_frames(_tracer: Any, stack: traceback.StackSummary) -> traceback.StackSummary:
    """The user's frames from the first ``forward`` on, helper functions included."""
    start = next((i for i, f in enumerate(stack) if f.name == "forward"), len(stack))
    return traceback.StackSummary.from_list([f for f in stack[start:] if is_user_file(f.filename)])


def _grad_patches(watch: Watch) -> Iterator[Any]:
    hook, backward = torch.Tensor.register_hook, torch.Tensor.backward

    def register_hook(self: Tensor, function: Any) -> Any:
        watch.lose("a gradient hook (Tensor.register_hook)")
        return hook(self, function)

    def backward_seen(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch.lose("a backward pass inside forward, which writes .grad")
        return backward(self, *args, **kwargs)

    yield mock.patch.object(torch.Tensor, "data", property(_detached, _set_data), create=True)
    yield mock.patch.object(torch.Tensor, "register_hook", register_hook)
    yield mock.patch.object(torch.Tensor, "backward", backward_seen)
    yield mock.patch.object(torch.inference_mode, "__enter__", _enter_inference)
    yield mock.patch.object(torch.inference_mode, "__exit__", _exit_inference)


def _detached(self: Tensor) -> Tensor:
    """``x.data`` leaves a trace; ``x.detach()`` is the same value in it."""
    return self.detach()


def _set_data(self: Tensor, value: Tensor) -> None:
    torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]


def _enter_inference(self: Any) -> None:
    """Inference mode cannot be traced; for what a graph computes, it is gradients being off."""
    self._graphopt_previous = torch.is_grad_enabled()
    torch.set_grad_enabled(not self.mode)


def _exit_inference(self: Any, *_: Any) -> None:
    torch.set_grad_enabled(self._graphopt_previous)
