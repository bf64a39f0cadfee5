"""What a Dynamo graph does to memory: shared storage, and writes that autograd does not see.

A functional graph says neither. The graph is run once as eager mode runs it, on fake tensors: which
results show the memory of an input or of each other is read off, and every write in place is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._sympy.printers import PythonPrinter

from graphopt.capture_writes import EagerRun
from graphopt.conditions import compiled
from graphopt.errors import CaptureError
from graphopt.memory import has_storage, share_memory, start, storage
from graphopt.source import source_line

Size = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class View:
    """A result that shows the memory of an input: which one, and which part of it.

    Sizes, strides and the distance of the first element are functions of the graph's inputs.
    """

    position: int
    whole: bool
    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    distance: Size

    def of(self, inputs: Sequence[Any], *, gradients: bool) -> Tensor:
        """The view itself, with the input's history where ``gradients`` is set."""
        given: Tensor = inputs[self.position]
        if self.whole:
            return given
        if given.requires_grad and not gradients:
            given = given.detach()
        size, stride = ([n(inputs) for n in many] for many in (self.size, self.stride))
        return given.as_strided(size, stride, given.storage_offset() + self.distance(inputs))


@dataclass(frozen=True)
class Memory:
    """Where the results of a graph live.

    Attributes:
        views: for each result, the input whose memory it shows, else ``None``.
        groups: for each result, a number that is equal exactly where results share memory;
            ``None`` where it shares an input's, or is no tensor.
    """

    views: tuple[View | None, ...]
    groups: tuple[int | None, ...]

    def shared(self) -> bool:
        """Whether results share memory that is no input's."""
        known = [g for g in self.groups if g is not None]
        return len(known) != len(set(known))

    def restore(
        self, results: Sequence[Any], inputs: Sequence[Any], written: frozenset[int]
    ) -> Iterator[Any]:
        """The results as eager mode gives them, from those of a functional graph.

        Args:
            written: positions of inputs that the graph writes, and that hold their new values.
        """
        owners: dict[int, int] = {}
        for result, view, group in zip(results, self.views, self.groups, strict=True):
            if result is None:  # given up by an option of a pass
                yield result
            elif view is not None:
                stale = view.position in written or not share_memory(result, inputs[view.position])
                yield view.of(inputs, gradients=result.requires_grad) if stale else result
            elif group is None or not (place := start(result)):  # deferred ones lie nowhere yet
                yield result
            elif owners.setdefault(place, group) != group:
                yield result.clone()
            else:
                yield result


def memory_of(graph_module: fx.GraphModule, fakes: Sequence[Any]) -> Memory:
    """Run a Dynamo graph on its fake inputs, and look.

    Raises:
        CaptureError: a value with a gradient history is written where autograd does not see it.
    """
    gradients, mode = torch.is_grad_enabled(), mode_of(fakes)
    with (
        enable_python_dispatcher(),
        mode,
        _unbacked_symbols_ignored(mode),
        torch.set_grad_enabled(gradients),
    ):
        inputs = [_own(f) for f in fakes]
        run = EagerRun(graph_module, inputs if gradients else (), mode)
        with run.watch:
            results: Any = run.run(*inputs)
    if run.unsaid:
        raise CaptureError(
            "a value with a gradient is written in place where autograd does not see it (under "
            "torch.no_grad(), or through .detach() or .data)",
            where=source_line(run.unsaid[0]),
            fix="write into a copy made with .detach().clone(), or let autograd see the write",
        )
    return _described(list(results), inputs)


def mode_of(fakes: Sequence[Any]) -> Any:
    """The mode in which Dynamo made its values; while a graph is compiled, another is active."""
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    return FakeTensorMode() if mode is None else mode


def results_memory(program_module: fx.GraphModule, fakes: Sequence[Any]) -> list[Any]:
    """Storage of each result of a functional graph on fake inputs; ``None`` for other values."""
    with mode_of(fakes), torch.no_grad():
        results = program_module(*fakes)
    return [storage(r) if isinstance(r, Tensor) else None for r in results]


def _own(fake: Any) -> Any:
    """The same memory with a gradient history that may be changed; non-leaves get their own."""
    if not isinstance(fake, Tensor):
        return fake
    leaf = fake.detach().requires_grad_(fake.requires_grad)
    return leaf if fake.is_leaf else leaf.clone()


def _unbacked_symbols_ignored(mode: Any) -> Any:
    shapes = mode.shape_env
    return nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()


def _described(results: list[Any], inputs: Sequence[Any]) -> Memory:
    owners = {storage(t): i for i, t in reversed(list(enumerate(inputs))) if has_storage(t)}
    sizes = dict(_symbols(inputs))
    numbers: dict[int, int] = {}
    views: list[View | None] = []
    groups: list[int | None] = []
    for result in results:
        key = storage(result) if has_storage(result) else None
        position = owners.get(key) if key is not None else None
        shown = position is not None
        views.append(_view(result, position, inputs, sizes) if position is not None else None)
        groups.append(numbers.setdefault(key, len(numbers)) if key and not shown else None)
    return Memory(tuple(views), tuple(groups))


def _view(result: Tensor, position: int, inputs: Sequence[Any], sizes: dict[str, Size]) -> View:
    given = inputs[position]
    kinds = [(t.dtype, t.is_conj(), t.is_neg()) for t in (result, given)]
    if kinds[0] != kinds[1]:
        raise CaptureError("a result shows the memory of an input in another dtype")
    return View(
        position,
        next((i for i, t in enumerate(inputs) if t is result), None) == position,
        tuple(_evaluator(n, sizes) for n in result.shape),
        tuple(_evaluator(n, sizes) for n in result.stride()),
        _evaluator(result.storage_offset() - given.storage_offset(), sizes),
    )


def _evaluator(number: Any, sizes: dict[str, Size]) -> Size:
    """A size as a function of the graph's inputs, symbols being inputs of their own."""
    expression = number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)
    names = sorted(map(str, expression.free_symbols))
    if missing := [n for n in names if n not in sizes]:
        raise CaptureError(f"a view of an input has a size that no input gives ({missing[0]})")
    if not names:
        constant = int(expression)
        return lambda _inputs: constant
    evaluate = compiled(PythonPrinter().doprint(expression), names)
    return lambda inputs: int(evaluate(**{n: sizes[n](inputs) for n in names}))


def _symbols(inputs: Sequence[Any]) -> Iterator[tuple[str, Size]]:
    """Where a call finds the value of each symbol: as an axis, or as an input of its own."""
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    yield str(size.node.expr), _axis(i, axis)
    for i, value in enumerate(inputs):
        if isinstance(value, torch.SymInt):
            yield str(value.node.expr), _number(i)


def _axis(position: int, axis: int) -> Size:
    return lambda inputs: int(inputs[position].shape[axis])


def _number(position: int) -> Size:
    return lambda inputs: int(inputs[position])
