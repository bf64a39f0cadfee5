"""The body of a fused region while it is written: a graph on a few sample rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.program import Program, val
from graphopt.rewrite.builder import infer, program_fake_mode

aten = torch.ops.aten
SAMPLE = 3
"""Rows of the fake values in a body; any number would do."""


class BodyGraph:
    """Nodes of a body, each with a fake value.

    Attributes:
        smooth: nodes through which gradients of the products flow.
    """

    def __init__(self, program: Program) -> None:
        self.graph = fx.Graph()
        self.mode = program_fake_mode(program)
        self.smooth: set[fx.Node] = set()

    def input(self, name: str, like: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """A parameter of the body, of the dtype and device of ``like``."""
        made = self.graph.placeholder(name)
        with self.mode:
            made.meta["val"] = val(like).new_empty(sizes)
        return made

    def product(self, name: str, like: fx.Node, classes: Any) -> fx.Node:
        made = self.input(name, like, [SAMPLE, classes])
        self.smooth.add(made)
        return made

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit ``target(*args, **kwargs)``."""
        made = self.graph.call_function(target, args, kwargs)
        fakes = fx.node.map_arg((args, kwargs), val)
        made.meta["val"] = infer(self.mode, target, *fakes)
        stops = target is aten.detach.default or not _is_floating(val(made))
        if not stops and any(a in self.smooth for a in made.all_input_nodes):
            self.smooth.add(made)
        return made

    def wide(self, node: fx.Node) -> fx.Node:
        """In float32 at least."""
        if val(node).dtype in (torch.float16, torch.bfloat16):
            return self(aten._to_copy.default, node, dtype=torch.float32)
        return node


def _is_floating(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)
