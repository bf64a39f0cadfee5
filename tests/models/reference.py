"""How far torch and transformers alone can capture an entry of the Hugging Face zoo.

The yardstick for the project's own capture: whatever succeeds here must succeed there.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from models.entry import Entry, Inputs

RANGE = re.compile(r"(\w+) = Dim\('\1'(, (min|max)=\d+)+\)")
RESHAPES = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
# From the ones that keep most to the ones that keep least.
LADDER: dict[str, Any] = {"named": None, "dynamic": Dim.DYNAMIC, "auto": Dim.AUTO, "static": 0}


@dataclass
class Outcome:
    """What happened to one entry: ``dims`` is the rung of the ladder that held, if one did.

    ``cause`` is why the last rung that failed did.
    """

    name: str
    family: str
    mode: str
    dims: str = ""
    nodes: int = 0
    seconds: float = 0.0
    difference: float = float("nan")
    gradient: float = float("nan")
    cause: str = ""
    captured: bool = False


def check(entry: Entry, training: bool = False) -> Outcome:
    """Capture ``entry`` on the highest rung that holds and compare with eager at a second size."""
    outcome = Outcome(entry.name, entry.family, "train" if training else "infer")
    model, started = entry.build(), time.perf_counter()
    inputs = entry.train_inputs() if training else entry.inputs()
    for outcome.dims, dim in LADDER.items():
        second = inputs if dim == 0 else _second_size(entry, training)
        try:
            program = capture(entry, model, inputs, dim)
            outcome.seconds = time.perf_counter() - started
            # Guards on the size seen while tracing fail here, at the second size.
            _compare(outcome, program.module(), entry.build(), second, training)
        except Exception as error:
            outcome.cause = _first_line(error)
            continue
        outcome.nodes, outcome.captured = len(program.graph.nodes), True
        break
    return outcome


def capture(entry: Entry, model: nn.Module, inputs: Inputs, dim: Any) -> ExportedProgram:
    """Export with transformers' patches; ``dim`` as in ``Entry.dynamic_shapes``, 0 for static."""
    from transformers.exporters import exporter_dynamo, utils

    exporter_dynamo.register_cache_pytrees_for_model(model)
    traced = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {key: value for key, value in inputs.items() if key not in traced}
    shapes = None if dim == 0 else entry.dynamic_shapes(traced, dim)
    patches = (utils.apply_patches("dynamo"), exporter_dynamo.reset_model_state(model))
    with _quiet(), _flat(model, traced, constants), patches[0], patches[1]:
        program = _export(model, traced, shapes).run_decompositions({})
    return _settled(program)


def _export(model: nn.Module, traced: Inputs, shapes: Any) -> ExportedProgram:
    """Export; a named dim's range is narrowed as torch suggests, but no dim made a multiple."""
    from torch._dynamo.exc import UserError
    from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes as refine

    for _ in range(3):
        try:
            return torch.export.export(model, (), traced, dynamic_shapes=shapes, strict=False)
        except UserError as error:
            _, found, fixes = str(error).partition("Suggested fixes:")
            fixes = fixes.partition("\n\n")[0]
            if not found or not all(RANGE.fullmatch(fix.strip()) for fix in fixes.split("\n")[1:]):
                raise
            shapes = refine(found + fixes, shapes)
    return torch.export.export(model, (), traced, dynamic_shapes=shapes, strict=False)


def _settled(program: ExportedProgram) -> ExportedProgram:
    """Make the graph hold under other strides than the traced ones, and under autograd.

    ``view`` relies on strides that depend on the attention kernel chosen at run time; ``copy``,
    what a write to a slice becomes, has no derivative.
    """
    for node in program.graph.nodes:
        if node.target in RESHAPES:
            node.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.copy.default:
            target, source = (argument.meta["val"] for argument in node.args[:2])
            if target.shape == source.shape and target.dtype == source.dtype:
                node.replace_all_uses_with(node.args[1])
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _second_size(entry: Entry, training: bool) -> Inputs:
    inputs = entry.unseen()
    return inputs | entry.label(inputs) if training and entry.label else inputs


def _compare(outcome: Outcome, captured: Any, model: Any, inputs: Inputs, training: bool) -> None:
    """Fill in the largest differences; ``model`` shares no parameter with ``captured``.

    The second of two calls counts: a graph that repeats what the model does once is wrong there.
    """
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.set_grad_enabled(training):
        for _ in range(2):
            ours, theirs = captured(**tensors), model(**inputs)
    outcome.difference = difference(ours, theirs)
    if training:
        ours.loss.backward()
        theirs.loss.backward()
        outcome.gradient = difference(_gradients(captured), _gradients(model))


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference of two results' tensors; infinite where shapes differ."""
    left, right = (
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        for tree in (ours, theirs)
    )
    if [leaf.shape for leaf in left] != [leaf.shape for leaf in right]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a.numel()]
    return max(((a.double() - b.double()).abs().max().item() for a, b in pairs), default=0.0)


@contextlib.contextmanager
def _flat(model: nn.Module, traced: Inputs, constants: Inputs) -> Iterator[None]:
    """Give ``forward`` exactly the traced inputs as parameters; the constants are bound."""
    forward = model.forward

    def flat(**kwargs: Any) -> Any:
        return forward(**kwargs, **constants)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    flat.__signature__ = inspect.Signature([inspect.Parameter(key, kind) for key in traced])
    model.forward = flat
    try:
        yield
    finally:
        del model.forward


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch prints partial graphs and tracebacks for each failed attempt."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _first_line(error: Exception) -> str:
    """The first reason of an error: torch lists violated constraints below a general line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    reason = next((line for line in lines if line.startswith("- ")), lines[0])
    return f"{type(error).__name__}: {reason.removeprefix('- ')}"
