"""How near the outputs of a quantized model are to the original's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.program import Program, val
from graphopt.report.quantized import OutputFidelity
from graphopt.signature import OutputKind
from graphopt.verify.fidelity import Divergence, Energy, divergence, energy
from graphopt.verify.whole import Outcome

_PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "log_softmax", "_log_softmax"}
)
_PLAIN = frozenset(
    {"_to_copy", "clone", "reshape", "view", "slice", "select", "alias", "unsqueeze", "squeeze"}
)
"""Operators that show numbers without computing others."""


@dataclass(frozen=True)
class Output:
    """A floating output: its name, its shape on the first inputs, and sums over all inputs."""

    name: str
    shape: tuple[int, ...]
    energy: Energy
    divergence: Divergence

    @property
    def row(self) -> OutputFidelity:
        found = self.energy
        return OutputFidelity(
            self.name, self.shape, found.error, found.sqnr, found.cosine, self.divergence.mean
        )


class Outputs:
    """Gathers, over the runs of a program and of its original, how near outputs are."""

    def __init__(self, original: Program) -> None:
        self.original = original
        self.found: dict[int, Output] = {}

    def __call__(self, new: Outcome, exact: Outcome) -> None:
        """Add one run."""
        pairs = zip(new.outputs, exact.outputs, self.original.outputs, strict=True)
        shown = [(v, r) for v, r, spec in pairs if spec.kind is OutputKind.USER]
        names = output_names(self.original)
        for place, (value, reference) in enumerate(shown):
            measured = energy(value, reference)
            if measured is None or not measured.count:
                continue
            rows = Divergence()
            if is_logits(self.original.user_outputs()[place], names[place]):
                rows = divergence(value, reference)
            self._add(place, Output(_called(names, place), tuple(value.shape), measured, rows))

    def _add(self, place: int, output: Output) -> None:
        known = self.found.get(place)
        self.found[place] = (
            output
            if known is None
            else replace(
                known,
                energy=known.energy + output.energy,
                divergence=known.divergence + output.divergence,
            )
        )

    @property
    def rows(self) -> tuple[OutputFidelity, ...]:
        return tuple(output.row for _, output in sorted(self.found.items()))


def _called(names: Sequence[str], place: int) -> str:
    if names[place]:
        return names[place]
    return "output" if len(names) == 1 else f"output {place}"


def output_names(program: Program) -> list[str]:
    """What each user output is called in what the model returns; empty where it is a position."""
    count = len(program.user_outputs())
    found = list(_paths(program.call.out_spec, "")) if program.call is not None else []
    return found if len(found) == count else [""] * count


def _paths(spec: pytree.TreeSpec, path: str) -> Iterator[str]:
    if spec.is_leaf():
        yield path
        return
    children = spec.children()
    names = getattr(spec.context, "_fields", spec.context)
    named = isinstance(names, list | tuple) and len(names) == len(children)
    for place, child in enumerate(children):
        own = str(names[place]) if named else ""
        step = own or (str(place) if path else "")
        yield from _paths(child, f"{path}.{step}" if path else step)


def is_logits(node: Any, name: str) -> bool:
    """By the rule of `OutputFidelity.divergence`."""
    value = val(node)
    if not isinstance(node, fx.Node) or not isinstance(value, Tensor) or value.dim() == 0:
        return False
    if not isinstance(value.shape[-1], int) or value.shape[-1] < 2:
        return False
    if name:
        last = name.rpartition(".")[2]
        return last == "logits" or last.endswith("_logits")
    return _made_by(node) in _PRODUCTS


def _made_by(node: fx.Node) -> str:
    """The operator whose numbers are shown."""
    while (kind := getattr(node.target, "_opname", "")) in _PLAIN and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return kind
