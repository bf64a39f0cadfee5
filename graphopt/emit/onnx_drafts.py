"""A program as ONNX models that ONNX Runtime may prefer to each other, and the fastest of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphopt.emit.onnx_axes import name_axes
from graphopt.emit.onnx_quantized import Lowering, Rounds, always, lower, lower_merged
from graphopt.emit.onnx_runtime import feed_of, open_session
from graphopt.emit.onnx_sums import FUSIONS, sums_apart
from graphopt.emit.onnx_tied import (
    ONE_COPY,
    merge_equal,
    tied_products,
    tied_weights,
    unpacked,
)
from graphopt.emit.onnx_translate import fuse_for_runtime, translate
from graphopt.emit.onnx_variants import separate_projections
from graphopt.program import Program
from graphopt.verify.timing import Pace, interleaved

EXTERNAL_ABOVE = 1_800_000_000
"""Bytes of weights above which they go to a file beside the model (protobuf ends at 2 GB)."""
SLOWER = 1.1
"""Times as long as with two copies a file may take that holds weights once."""


@dataclass(frozen=True)
class Draft:
    """A model, what it was made of, and what there is to tell of the choice."""

    lowering: Lowering
    model: Any
    fusions: dict[str, int]
    notes: tuple[str, ...] = ()


Names = tuple[tuple[str, ...], tuple[str, ...]]
"""Of the inputs and of the outputs of a file."""


def best_draft(
    program: Program,
    names: Names,
    *,
    fuse: bool,
    opset: int | None = None,
    verify: bool = True,
    measure: bool = True,
    sums: bool = True,
    rounds: Rounds = always,
) -> Draft:
    """The program as a model; with ``measure`` the one that ONNX Runtime runs fastest here.

    Args:
        names: of inputs and of outputs.
        fuse: with ONNX Runtime's own operators; else those of the standard alone.
        verify: try the forms of quantized operators in ONNX Runtime.
        sums: additions before norms may stand by themselves.
        rounds: which quantized products may round activations of themselves.

    Raises:
        ExportError: an operator has no translation.
    """
    options: dict[str, Any] = {
        "opset": opset,
        "standard": not fuse,
        "verify": verify,
        "measure": measure,
        "rounds": rounds,
    }
    draft = make_draft(lower(program, **options), names, fuse=fuse)
    if fuse and measure and find_spec("onnxruntime"):
        draft = _faster(draft, names)
        draft = _merged(draft, lower_merged(program, draft.lowering, **options), names)
        draft = _summed(draft, names) if sums else draft
    return draft


def make_draft(lowering: Lowering, names: Names, *, fuse: bool) -> Draft:
    """The translated model with its fusions, its quantized operators in place, its axes named."""
    model = translate(lowering.program, *names, opset=lowering.opset, standard=not fuse)
    fusions = fuse_for_runtime(model) if fuse else {}
    lowering.place(model.model)
    name_axes(model.model, lowering.program)
    return Draft(lowering, model, fusions)


def _faster(draft: Draft, names: Names) -> Draft:
    """The draft, or one with separate projections if ONNX Runtime runs that faster."""
    apart = separate_projections(draft.lowering.program)
    if apart is None:
        return draft
    other = make_draft(replace(draft.lowering, program=apart), names, fuse=True)
    if other.fusions.get("attention", 0) <= draft.fusions.get("attention", 0):
        return draft
    told = ("query, key and value as separate products", "one merged product", "left merged")
    return _winner(draft, other, names, told)


def _merged(draft: Draft, lowering: Lowering | None, names: Names) -> Draft:
    """The draft, or one with quantized products of one input as one if that is faster."""
    if lowering is None:
        return draft
    other = make_draft(lowering, names, fuse=True)
    told = ("quantized products of one input as one", "products by themselves", "left apart")
    return _winner(draft, other, names, told)


def _summed(draft: Draft, names: Names) -> Draft:
    """The draft, or one in which additions before norms stand by themselves if that is faster."""
    apart = sums_apart(draft.model)
    if apart is None:
        return draft
    fusions = {name: count for name, count in draft.fusions.items() if name not in FUSIONS}
    other = replace(draft, model=apart, fusions=fusions)
    told = ("norms apart from the additions before them", "one operator", "left as one")
    return _winner(draft, other, names, told)


def tied_draft(draft: Draft, names: Names, *, timed: bool, one_copy: bool = False) -> Draft:
    """The draft with equal weights once, and those of embeddings and heads, if that is not slower.

    Args:
        timed: compare both in ONNX Runtime; else the weights are held once.
        one_copy: whatever is faster, as sessions with usual settings hold it once.
    """
    merge_equal(draft.model.model)
    tied = tied_products(draft.model)
    other = draft if tied is None else replace(draft, model=tied)
    weights = " and ".join(f"`{name}`" for name in tied_weights(other.model.model))
    if not weights:
        none = "one_copy: no weight is read as rows and by a product in float"
        return replace(draft, notes=(*draft.notes, none)) if one_copy else draft
    if one_copy:
        return _unpacked(draft, replace(other, model=unpacked(other.model)), names, weights, timed)
    settings = " and ".join(f"{name}={value}" for name, value in ONE_COPY.items())
    note = f"{weights}: memory holds one copy for rows and products if sessions set {settings}"
    if not timed:
        return replace(other, notes=(*draft.notes, note))
    alone = _race(draft, other, names[0], ONE_COPY)
    note += f", which is {alone.old / alone.new:.2f}x the speed of two copies here"
    if other is not draft:
        pace = _race(draft, other, names[0])
        usual = f"{pace.old / pace.new:.2f}x the speed"
        if pace.new > SLOWER * pace.old:
            note = f"{weights}: left in two copies, one as `Gemm` is {usual}"
            return replace(draft, notes=(*draft.notes, note))
        note += f" ({usual} without)"
    return replace(other, notes=(*draft.notes, note))


def _unpacked(draft: Draft, other: Draft, names: Names, weights: str, timed: bool) -> Draft:
    note = f"{weights}: sessions hold one copy for rows and products"
    if timed:
        pace = _race(draft, other, names[0])
        note += f", which is {pace.old / pace.new:.2f}x the speed of two copies here"
    return replace(other, notes=(*draft.notes, note))


def _winner(draft: Draft, other: Draft, names: Names, told: tuple[str, str, str]) -> Draft:
    """The one that ONNX Runtime runs faster, with a note of what was compared with what."""
    pace = _race(draft, other, names[0])
    what, than, left = told
    note = f"{what}: {pace.old / pace.new:.2f}x the speed of {than} in ONNX Runtime"
    if pace.new > pace.old:
        return replace(draft, notes=(*draft.notes, f"{note}; {left}"))
    return replace(other, notes=(*draft.notes, note))


def _race(
    one: Draft, two: Draft, inputs: Sequence[str], settings: Mapping[str, str] | None = None
) -> Pace:
    """Both in turn on the captured inputs, the second with ``settings`` of its session."""
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for index, draft in enumerate((one, two)):
            path, program = Path(folder) / f"{index}.onnx", draft.lowering.program
            save_model(draft.model, path, program)
            session = open_session(path, settings if index else None)
            feed = feed_of(session, program.example_inputs, inputs)
            calls.append(partial(session.run, None, feed))
        return interleaved(calls[0], calls[1], budget=1.0)


def save_model(model: Any, path: Path, program: Program) -> None:
    """Write a `torch.onnx.ONNXProgram` of a program, without paths of this machine."""
    for node in model.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    size = sum(t.numel() * t.element_size() for t in program.state.values())
    model.save(str(path), external_data=size > EXTERNAL_ABOVE)
