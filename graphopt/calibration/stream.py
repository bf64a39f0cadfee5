"""All samples through a program together, a few nodes at a time.

What holds the memory of calibration down is to run every sample up to a node, look at what all of
them give there, change the program's weights, and go on from there: between two stops only the
values that later nodes read are kept (for a transformer the residual stream and one more tensor).
Going on from stop to stop runs no node twice; only what lies behind a mark that a stream is rewound
to runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.analysis.flow import ancestors
from graphopt.errors import GraphoptError
from graphopt.program import Program

Stand = Callable[..., Any]
"""Computes what a node gives from its arguments."""


class Mark(NamedTuple):
    """Where a stream is: see `Stream`."""

    position: int
    values: list[dict[fx.Node, Any]]
    state: dict[fx.Node, Tensor]
    stands: dict[fx.Node, Stand]


class Stream:
    """Runs samples through a program in graph order, up to one node after the other.

    Args:
        program: it is not changed.
        samples: flat user inputs, one sequence per sample.
        until: nodes that are looked at; nothing behind the last of them is computed.
        kept: those of them whose values are held until `forget`.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        until: Sequence[fx.Node],
        kept: Iterable[fx.Node] = (),
    ) -> None:
        self.program = program
        self.nodes = _needed(program.graph, until)
        self.last, self.kept = _last_uses(self.nodes, until), set(kept)
        self.state: dict[fx.Node, Tensor] = {
            node: program.state[name] for node, name in program.state_nodes().items()
        }
        self.stands: dict[fx.Node, Stand] = {}
        self.position = 0
        users = program.user_inputs()
        self.values: list[dict[fx.Node, Any]] = [
            dict(zip(users, sample, strict=True)) for sample in samples
        ]

    def advance(self, node: fx.Node) -> None:
        """Run every sample up to ``node``, which is next."""
        self.advance_to(self.nodes.index(node) if node in self.nodes else len(self.nodes))

    def advance_to(self, end: int) -> None:
        """Run every sample through the first ``end`` nodes."""
        part, self.position = self.nodes[self.position : end], max(end, self.position)
        with torch.no_grad():
            for index, values in enumerate(self.values):
                with self._blaming(index):
                    self._run(part, values)
        for done in part:
            self._forget_state(done)

    def mark(self) -> Mark:
        """Where the samples are, to come back to; values are not copied."""
        values = [dict(each) for each in self.values]
        return Mark(self.position, values, dict(self.state), dict(self.stands))

    def rewind(self, mark: Mark) -> None:
        """Back to a mark, once: weights and stands too are what they were."""
        self.position, self.values, self.state, self.stands = mark

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Let go of values that were kept."""
        self.kept.difference_update(nodes)
        ahead = set(self.nodes[self.position :])
        for node in nodes:
            if self.last.get(node) not in ahead:
                for values in self.values:
                    values.pop(node, None)

    def given(self, node: fx.Node) -> Iterator[Any]:
        """What ``node`` gave, sample by sample; it must have run, and be read by what is next."""
        return (self._value(node, values) for values in self.values)

    def is_computed(self, node: fx.Node) -> bool:
        """Whether a node differs between samples: others are held by the program."""
        return node.op != "get_attr" and node not in self.state

    def weight(self, node: fx.Node, value: Tensor) -> None:
        """From here on the state behind ``node`` is ``value``."""
        self.state[node] = value

    def replace(self, node: fx.Node, stand: Stand) -> None:
        """When ``node`` runs, it gives ``stand(*args, **kwargs)``."""
        self.stands[node] = stand

    @contextmanager
    def _blaming(self, index: int) -> Iterator[None]:
        """Operators say what they refuse, but not of which sample."""
        try:
            yield
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise GraphoptError(
                f"{self.program.name} fails on these inputs: {type(error).__name__}: "
                f"{error!s:.200}",
                where=f"calibration[{index}]",
                fix="leave them out, or correct their values",
            ) from error

    def _run(self, part: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        for node in part:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: self._value(n, values)
            )
            function: Any = self.stands.get(node, node.target)
            values[node] = function(*args, **kwargs)
            for read in (*node.all_input_nodes, node):
                if self.last.get(read) is node and read not in self.kept:
                    values.pop(read, None)

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.program.graph_module)
        return self.state[node]

    def _forget_state(self, node: fx.Node) -> None:
        """Weights that were put in the place of others are not needed behind their last reader."""
        self.stands.pop(node, None)
        for read in node.all_input_nodes:
            if self.last.get(read) is node:
                self.state.pop(read, None)


def _needed(graph: fx.Graph, until: Sequence[fx.Node]) -> list[fx.Node]:
    """Calls that a node of ``until`` depends on, and these, in graph order."""
    wanted = ancestors(until)
    return [n for n in graph.nodes if n in wanted and n.op not in ("placeholder", "get_attr")]


def _last_uses(nodes: Sequence[fx.Node], until: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each value the node behind which nothing reads it; what nobody reads goes at once."""
    last = {node: node for node in nodes if node not in until}
    for node in nodes:
        last.update(dict.fromkeys(node.all_input_nodes, node))
    return last
