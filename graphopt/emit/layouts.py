"""Memory layouts: operators that read memory as it lies are right for the captured layout only.

`contiguous()` leaves no node where the example was contiguous already, and ``as_strided`` then
reads the memory of whatever a later call passes. Values do not depend on strides anywhere else, so
graphs without such operators are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.analysis.flow import ancestors
from graphopt.errors import GraphoptError
from graphopt.program import Program, val
from graphopt.source import source_line

aten = torch.ops.aten
BOUND = frozenset(
    (
        aten.as_strided.default,
        aten.as_strided_copy.default,
        aten.as_strided_scatter.default,
        aten.view_as_complex.default,
        aten.view.dtype,
    )
)
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
Strides = tuple[tuple[int, ...], ...]


class LayoutGuard:
    """Refuses calls in which an operator of `BOUND` would meet another layout than as captured.

    A call whose inputs lie as the captured ones is let through at once. For any other, the graph is
    run on fake tensors with the strides of the call and with those of the capture; it is refused
    where the operators' operands differ. What is dropped at capture changes nothing else: from
    operands of equal strides on, the graph and the model compute the same.
    """

    def __init__(self, program: Program, labels: Sequence[str]) -> None:
        self.program = program
        self.bound = [n for n in program.graph.nodes if _is_bound(n)]
        reached = ancestors(self.bound)
        self.captured = [
            (i, label, _format(val(node)), _strides(val(node)))
            for i, (node, label) in enumerate(zip(program.user_inputs(), labels, strict=True))
            if node in reached and isinstance(val(node), Tensor)
        ]
        self.known: set[tuple[Any, ...]] = set()

    def __call__(self, flat: Sequence[Any]) -> None:
        """Look at the flat user inputs of a call, already checked for shape and dtype.

        Raises:
            GraphoptError: names the input that lies differently, and the operator's line.
        """
        odd = [entry for entry in self.captured if not _lies(flat[entry[0]], *entry[2:])]
        if not odd:
            return
        key = tuple((flat[i].shape, flat[i].stride()) for i, *_ in self.captured)
        if key in self.known:
            return
        if (node := self._differing(flat)) is not None:
            self._refuse(odd[0], flat, node)
        self.known.add(key)

    def _differing(self, flat: Sequence[Any]) -> fx.Node | None:
        """The first operator whose operands lie differently than in a call laid out as captured."""
        mode = FakeTensorMode()
        given = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in flat]
        usual = list(given)
        with mode, torch.no_grad():
            for i, _, layout, strides in self.captured:
                usual[i] = _laid_out(given[i], layout, strides)
            if None in [usual[i] for i, *_ in self.captured]:
                return self.bound[0]
            wanted = _operands(self.program, usual, mode, {})
            met = _operands(self.program, given, mode, wanted)
        return next((n for n in self.bound if n not in met or met[n] != wanted.get(n)), None)

    def _refuse(self, entry: tuple[Any, ...], flat: Sequence[Any], node: fx.Node) -> None:
        position, label, layout, strides = entry
        wanted = str(layout).removeprefix("torch.") if layout else f"strides {strides}"
        name = str(node.target).split(".")[1]
        line = source_line(node)
        raise GraphoptError(
            f"{label} has strides {flat[position].stride()}, but the program was captured with "
            f"{wanted.replace('_', ' ')}, and {name}{f' at {line}' if line else ''} reads memory "
            "as it lies",
            where=f"call of {self.program.name}",
            fix=_fix(label, layout),
        )


def _fix(label: str, layout: torch.memory_format | None) -> str:
    if layout is None:
        return "pass it laid out as captured, or capture with an example laid out like this"
    asked = "" if layout is torch.contiguous_format else f"memory_format={layout}"
    return f"pass {label}.contiguous({asked}), or capture with an example laid out like this"


def _format(fake: Any) -> torch.memory_format | None:
    if not isinstance(fake, Tensor):
        return None
    formats = (f for f in _FORMATS if _has_format(fake, f))
    return next(formats, None)


def _has_format(value: Tensor, layout: torch.memory_format) -> bool:
    rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout, value.dim())
    return value.dim() == rank and value.is_contiguous(memory_format=layout)


def _strides(fake: Any) -> tuple[int, ...] | None:
    """Strides of a captured input; ``None`` where they depend on sizes."""
    strides = fake.stride() if isinstance(fake, Tensor) else ()
    return tuple(strides) if all(isinstance(s, int) for s in strides) else None


def _lies(
    value: Tensor, layout: torch.memory_format | None, strides: tuple[int, ...] | None
) -> bool:
    if layout is not None:
        return value.is_contiguous(memory_format=layout)
    return value.stride() == strides


def _laid_out(
    value: Tensor, layout: torch.memory_format | None, strides: tuple[int, ...] | None
) -> Tensor | None:
    """A fake tensor like ``value`` that lies as captured; ``None`` where that is not known."""
    if layout is not None:
        return value.contiguous(memory_format=layout)
    return None if strides is None else value.new_empty_strided(value.shape, strides)


def _operands(
    program: Program, inputs: Sequence[Any], mode: Any, wanted: Mapping[fx.Node, Strides]
) -> dict[fx.Node, Strides]:
    """Strides of the operands of every operator of `BOUND`, up to the first that is not wanted."""
    given = iter(inputs)
    targets = [program.inputs[n.name].target for n in program.placeholders()]
    values = [next(given) if t is None else mode.from_tensor(program.state[t]) for t in targets]
    run = _Run(program.graph_module, program.graph, wanted)
    with suppress(RuntimeError):  # what comes after is not found
        run.run(*values)
    return run.found


class _Run(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, graph: fx.Graph, wanted: Mapping[fx.Node, Strides]
    ) -> None:
        super().__init__(module, graph=graph)
        self.wanted = wanted
        self.found: dict[fx.Node, Strides] = {}

    def run_node(self, n: fx.Node) -> Any:
        if _is_bound(n):
            operands = [self.env[a] for a in n.all_input_nodes]
            self.found[n] = tuple(tuple(t.stride()) for t in operands if isinstance(t, Tensor))
            if self.wanted.get(n, self.found[n]) != self.found[n]:
                raise RuntimeError("another layout")
        return super().run_node(n)


def _is_bound(node: fx.Node) -> bool:
    """Whether the operator reads memory as it lies; a dtype of equal width leaves it alone."""
    if node.target is not aten.view.dtype:
        return node.target in BOUND
    return bool(val(node).element_size() != val(node.args[0]).element_size())
