"""A graph run as eager mode runs it, with an eye on writes in place that autograd does not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.memory import storage
from graphopt.program import is_mutating


class EagerRun(fx.Interpreter):
    """Runs a graph in eager semantics; ``unsaid`` holds the nodes that write unseen."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any], mode: Any) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.mode = mode
        self.sharing: dict[int, list[Tensor]] = {}
        self.unsaid: list[fx.Node] = []
        self.current: fx.Node | None = None
        self.watch = _Writes(self)
        self._note(list(inputs))

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        result = super().run_node(n)
        if n.op != "placeholder":
            self._note(result)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Constants of the graph are real tensors."""
        held = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(held) if isinstance(held, Tensor) else held

    def _note(self, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor):
                self.sharing.setdefault(storage(value), []).append(value)

    def write(self, written: Tensor) -> None:
        """A write is seen if gradients are on and the written tensor has a history of its own."""
        if torch.is_grad_enabled() and written.requires_grad:
            return
        if any(t.requires_grad for t in self.sharing.get(storage(written), ())):
            assert self.current is not None
            self.unsaid.append(self.current)


class _Writes(TorchDispatchMode):
    def __init__(self, run: EagerRun) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_mutating(func):
            for argument, value in _arguments(func, args, kwargs):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in pytree.tree_leaves(value):
                        if isinstance(tensor, Tensor):
                            self.run.write(tensor)
        return func(*args, **kwargs)


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    schema = func._schema.arguments
    yield from zip(schema, args, strict=False)
    yield from ((a, kwargs[a.name]) for a in schema if a.name in kwargs)
