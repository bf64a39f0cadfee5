"""Saving an optimized module as ``.pt2`` with its proof inside, and loading it back safely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.emit.exported import to_exported
from graphopt.emit.module import OptimizedModule
from graphopt.errors import ExportError, GraphoptError, LoadError
from graphopt.files import atomic_path
from graphopt.loading.named_returns import without_names
from graphopt.loading.side_file import SIDE_FILE, SideFile, applied, parsed, written
from graphopt.program import Program
from graphopt.report.model import Report
from graphopt.signature import is_cache

if TYPE_CHECKING:
    from graphopt.loading import LoadedModel


def save(module: OptimizedModule, path: str | Path) -> Path:
    """Write ``module`` as an `ExportedProgram` archive with ``graphopt.json`` inside.

    The values written are those the module holds now, also after training or ``load_state_dict``.

    Raises:
        GraphoptError: ``module`` is not an ahead-of-time result of `graphopt.compile`, the path
            does not end in ``.pt2``, or the program is one that torch's format has no words for.
    """
    target = Path(path)
    if not isinstance(module, OptimizedModule):
        raise GraphoptError(
            f"cannot save a {type(module).__name__}",
            fix="save what graphopt.compile(model, example_inputs=...) returned",
        )
    if target.suffix != ".pt2":
        raise GraphoptError(
            "an optimized module is saved as .pt2", where=str(target), fix=f"{target.stem}.pt2"
        )
    program = module.current_program()
    if not program.outputs:
        raise ExportError(f"{program.name} returns nothing: there is nothing to save")
    exported, returns = _exported(program)
    text = written(module.program, module.report.to_dict(), returns)
    with atomic_path(target) as temporary:
        _write(exported, temporary, text, str(target))
    return target


def _exported(program: Program) -> tuple[ExportedProgram, dict[str, str]]:
    """The exported program, and the named tuples that it spells as plain ones."""
    returns: dict[str, str] = {}
    if program.call is not None:
        plain, returns = without_names(program.call.out_spec)
        program.call = replace(program.call, out_spec=plain)
    exported = to_exported(program)
    given = pytree.tree_map(_flat_cache, exported.example_inputs, is_leaf=_holds_cache)
    exported._example_inputs = given
    return exported, returns


def _holds_cache(value: Any) -> bool:
    return is_cache(type(value))


def _flat_cache(value: Any) -> Any:
    """The tensors of a cache: examples are tensors in a file, which builds no other objects."""
    return pytree.tree_leaves(value) if _holds_cache(value) else value


def _write(exported: ExportedProgram, path: Path, text: str, where: str) -> None:
    try:
        torch.export.save(exported, path, extra_files={SIDE_FILE: text})
    except Exception as error:
        raise ExportError(
            f"torch cannot write this program: {type(error).__name__}: {error!s:.300}",
            where=where,
            fix="let the model take and return tensors in tuples, lists and dicts",
        ) from error


def load(
    path: str | Path,
    *,
    target: str = "torch",
    providers: Sequence[str] | None = None,
    measure: bool = True,
) -> OptimizedModule:
    """Load what `save` wrote (or any plain ``.pt2``), after the archive was scanned.

    The module is called like the one that was saved, and refuses what that one refused.

    Args:
        target: ``"torch"``, ``"inductor"`` or ``"onnxruntime"``, as `graphopt.compile` has them.
        providers: execution providers of ONNX Runtime, for that target.
        measure: keep regions in ONNX Runtime only where they are faster here.

    Raises:
        LoadError: the file is unsafe, damaged, or not an exported program.
        RecipeError: there is no such target or provider.
        GraphoptError: the target takes no model in training mode.
    """
    from graphopt.emit.laid_out import lay_out
    from graphopt.loading import load_model
    from graphopt.recipe import Options

    options = Options(target=target, providers=providers, measure=measure)
    loaded = load_model(path)
    program = program_of(loaded)
    report = _facts(loaded).report
    report = Report(program.name) if report is None else Report.from_dict(report)
    report.partition = None  # of the process that wrote the file
    module = OptimizedModule(program, report)
    if options.target == "onnxruntime":
        from graphopt.emit.ort.lowering import to_onnxruntime

        if to_onnxruntime(module, program, options):
            return module
    executed = lay_out(module)
    if options.target == "inductor":
        from graphopt.emit.inductor import to_inductor

        to_inductor(module, program, options, executed)
    return module


def program_of(loaded: LoadedModel) -> Program:
    """The program of a loaded ``.pt2``; its example inputs are those it was exported with.

    Raises:
        LoadError: the file is of another kind, or ``graphopt.json`` does not fit its program.
    """
    from graphopt.capture import from_exported
    from graphopt.capture_ones import settle_ones

    if loaded.exported is None:
        raise LoadError(
            f"{loaded.source.name} is a {loaded.kind}, not an exported program",
            where=str(loaded.source),
            fix="load a file that graphopt.save or torch.export.save wrote",
        )
    facts = _facts(loaded)
    program = from_exported(loaded.exported, training=facts.training, frozen=facts.frozen)
    program.name = facts.name or loaded.source.stem
    program.example_inputs = tuple(pytree.tree_leaves(loaded.exported.example_inputs or ((), {})))
    applied(facts, program, str(loaded.source))
    if facts.format == 1 and program.example_inputs:
        settle_ones(program, None)
    return program


def _facts(loaded: LoadedModel) -> SideFile:
    return parsed(loaded.extra_files.get(SIDE_FILE), str(loaded.source))
