"""ONNX forms of ``graphopt::quantized_linear`` and ``graphopt::quantized_embedding``.

Quantized operators leave the program before it is translated: a slot stands in for each (`calls`,
`slots`), so that torch's exporter and the fusions for ONNX Runtime see float operators and a box.
Then each slot becomes the nodes of a `form`, with initializers made of the stored weight
(`place`). Which form is a matter of measurement in ONNX Runtime on the inputs of that very
operator (`choosing`, `alone`): what holds to the bound, and of that the fastest.

Forms are in `nbits` (blocks of integers), `dynamic` (activations in 8 bits), `qdq` (the standard's
quantize and dequantize) and `decoded` (tables); `forms` lists those of a call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

from graphopt.emit.onnx_quantized.calls import (
    Call,
    calls_of,
    quantized_nodes,
    with_slots,
)
from graphopt.emit.onnx_quantized.choosing import Choice, Rounds, always, choose
from graphopt.emit.onnx_quantized.forms import forms_of
from graphopt.emit.onnx_quantized.merged import merged_siblings
from graphopt.emit.onnx_quantized.place import place
from graphopt.emit.onnx_quantized.slots import translations
from graphopt.program import Program

__all__ = [
    "Call",
    "Lowering",
    "Rounds",
    "always",
    "calls_of",
    "lower",
    "lower_merged",
    "notes_of",
    "quantized_nodes",
    "translations",
]

OPSET = 20
"""What torch's exporter writes when it is not told."""
BLOCKS = 21
"""The first operator set in which ``DequantizeLinear`` has 4 bits, and scales for blocks."""
LOSS = 2.0
"""What outputs may be off by, times what products come to that round activations."""


LEFT = 0.25
"""Of what rounding activations changes, where the products that change most do not round."""


@dataclass(frozen=True)
class Lowering:
    """A program ready to be translated, and what its slots become.

    Attributes:
        program: with slots.
        choices: one for each slot.
        opset: operator set to write, where the forms ask for one.
    """

    program: Program
    choices: Sequence[Choice] = ()
    opset: int | None = None

    def place(self, model: Any) -> None:
        """Replace the slots of the translated model, in place."""
        if self.choices:
            place(model, self.choices)

    @property
    def tolerance(self) -> float:
        """What rounding activations may change of outputs.

        Errors that do not know of each other add up as the root of the sum of their squares.
        """
        rounded = (c.error**2 for c in self.choices if c.form.rounds)
        return LOSS * math.sqrt(sum(rounded))

    def most_rounded(self) -> frozenset[str]:
        """Weights of the products by which rounding activations changes most: without them it
        changes `LEFT` of it."""
        choices = sorted((c for c in self.choices if c.form.rounds), key=lambda c: c.error)
        left = (LEFT * self.tolerance / LOSS) ** 2
        kept = takewhile(lambda total: total <= left, accumulate(c.error**2 for c in choices))
        return frozenset(c.call.name for c in choices[len(list(kept)) :])

    def notes(self) -> list[str]:
        """In which forms the operators are, and what else was tried."""
        return notes_of(self.choices)


def notes_of(choices: Sequence[Choice]) -> list[str]:
    """In which forms operators are, what else was tried, and what the file holds."""
    return [*_chosen(choices), *_stored(choices)]


def lower(
    program: Program,
    *,
    opset: int | None,
    standard: bool,
    verify: bool,
    measure: bool,
    rounds: Rounds = always,
    known: Mapping[str, Choice] | None = None,
) -> Lowering:
    """The program with slots; itself where it has no quantized operator.

    Args:
        opset: operator set that was asked for.
        standard: only operators of the ONNX standard.
        verify: try forms in ONNX Runtime before they are chosen.
        measure: choose the fastest.
        rounds: which products may do that of themselves, of forms that are tried.
        known: choices for nodes of these names, made before.

    Raises:
        ExportError: an operator has no form.
    """
    calls = calls_of(program)
    if not calls:
        return Lowering(program, opset=opset)
    opset = opset or (BLOCKS if standard else OPSET)
    if verify:
        options: dict[str, Any] = {"standard": standard, "opset": opset, "time": measure}
        choices = choose(program, calls, rounds=rounds, known=known, **options)
    else:
        choices = [
            Choice(c, forms_of(c, standard=standard, opset=opset)[0]) for c in calls.values()
        ]
    return Lowering(with_slots(program), choices, opset)


def lower_merged(program: Program, before: Lowering, **options: Any) -> Lowering | None:
    """The same with quantized products of one input as one; None where there are none such.

    Args:
        before: the program as `lower` has it with these options. Other operators keep its choices.
    """
    merged = merged_siblings(program)
    if merged is None:
        return None
    known = zip((node.name for node in quantized_nodes(program)), before.choices, strict=True)
    return lower(merged, known=dict(known), **options)


def _chosen(choices: Sequence[Choice]) -> list[str]:
    notes, seen = [], Counter(_kind(c) for c in choices)
    for choice in choices:
        count = seen.pop(_kind(choice), 0)
        if count:
            others = f" and {count - 1} like it" if count > 1 else ""
            tried = "; ".join(map(str, choice.trials)) or choice.form.name
            shape = "x".join(map(str, choice.call.weight.shape))
            notes.append(f"`{choice.call.name}`{others}, {shape}, {choice.rows} rows: {tried}")
    return notes


def _kind(choice: Choice) -> Any:
    call = choice.call
    return (choice.form.name, call.scheme, call.weight.shape, call.activations, call.embedding)


def _stored(choices: Sequence[Choice]) -> list[str]:
    notes = []
    unpacked = sum(c.form.unpacks for c in choices)
    if unpacked:
        notes.append(
            f"{unpacked} of {len(choices)} quantized weights are small in the file, and float32 in "
            "the memory of ONNX Runtime"
        )
    whole = {(c.call.scheme.bits, c.call.scheme.dtype) for c in choices}
    for bits, held in ((3, 4), (6, 8)):
        if (bits, "int") in whole:
            notes.append(f"codes of {bits} bits take {held} in the file: ONNX packs no others")
    twice = {c.call.name for c in choices if c.call.tied and "DequantizeLinear" in c.form.name}
    notes += [
        f"`{name}` is stored twice, for rows and for products: fuse=True stores it once"
        for name in sorted(twice)
    ]
    return notes
