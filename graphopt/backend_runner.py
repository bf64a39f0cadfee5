"""Calls a rewritten graph as Dynamo calls the one it gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.aliases import is_view, memory_of
from graphopt.capture_memory import Memory
from graphopt.memory import overlapping
from graphopt.program import Program
from graphopt.signature import OutputKind

Compiled = Callable[..., Any]


class Runner:
    """Calls a functional graph as Dynamo expects.

    Inputs that were written are written back, and results that show their memory do so again. The
    original graph runs where another input shows the memory of a written one, which only the values
    of a call say.
    """

    def __init__(self, program: Program, memory: Memory, run: Compiled, original: Compiled) -> None:
        self.memory, self.run, self.original = memory, run, original
        nodes = program.placeholders()
        targets = [program.inputs[n.name].target for n in nodes]
        self.state = [None if t is None else program.state[t] for t in targets]
        given = [n for n, t in zip(nodes, targets, strict=True) if t is None]
        names = [n.name for n in given]
        values = program.results()
        pairs = list(zip(values, program.outputs, strict=True))
        self.updates = [
            (i, names.index(o.target or ""))
            for i, (_, o) in enumerate(pairs)
            if o.kind is OutputKind.INPUT_MUTATION
        ]
        self.written = frozenset(position for _, position in self.updates)
        self.exposed = any(_shows(v, {given[p] for p in self.written}) for v in values)
        self.user = [i for i, (_, o) in enumerate(pairs) if o.kind is OutputKind.USER]

    def __call__(self, *inputs: Any) -> Any:
        if self.written and overlapping(inputs, self.written) is not None:
            return self.original(*inputs)
        results = self.run(*self.bind(self._protected(inputs)))
        for index, position in self.updates:
            _write(inputs[position], results[index])
        returned = [results[i] for i in self.user]
        return tuple(self.memory.restore(returned, inputs, self.written))

    def bind(self, inputs: Sequence[Any]) -> list[Any]:
        """The graph's arguments: constants that rewrites added stand between the inputs."""
        given = iter(inputs)
        return [next(given) if s is None else s for s in self.state]

    def _protected(self, inputs: Sequence[Any]) -> list[Any]:
        """Copies of inputs that will be written, where their old values are needed afterwards.

        Autograd may save them for backward, and results may show them.
        """
        values = list(inputs)
        if torch.is_grad_enabled() or self.exposed:
            for _, position in self.updates:
                if isinstance(values[position], Tensor):
                    values[position] = values[position].clone()
        return values


def _shows(value: Any, written: set[fx.Node]) -> bool:
    """Whether a result may lie in the old memory of an input that is written."""
    root = memory_of(value) if isinstance(value, fx.Node) else None
    return root is not None and (root in written or (bool(written) and is_view(root)))


def _write(given: Tensor, value: Tensor) -> None:
    """What eager mode's write leaves behind, the gradient history of the value included.

    A constant ends the history of what it is written into; writes that autograd did not see are
    not here (`memory_of`).
    """
    seen = torch.is_grad_enabled() and given.requires_grad
    with torch.set_grad_enabled(seen or value.requires_grad):
        given.copy_(value)
