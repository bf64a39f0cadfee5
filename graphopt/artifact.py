"""Saving an optimized module as ``.pt2`` with its proof inside, and loading it back safely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from graphopt.emit.exported import to_exported
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, LoadError
from graphopt.files import atomic_path
from graphopt.loading.side_file import SIDE_FILE, SideFile, applied, parsed, written
from graphopt.program import Program
from graphopt.report.model import Report

if TYPE_CHECKING:
    from graphopt.loading import LoadedModel


def save(module: OptimizedModule, path: str | Path) -> Path:
    """Write ``module`` as an `ExportedProgram` archive with ``graphopt.json`` inside.

    The values written are those the module holds now, also after training or ``load_state_dict``.

    Raises:
        GraphoptError: ``module`` is not an ahead-of-time result of `graphopt.compile`, or the path
            does not end in ``.pt2``.
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
    exported = to_exported(module.current_program())
    text = written(module.program, module.report.to_dict())
    with atomic_path(target) as temporary:
        torch.export.save(exported, temporary, extra_files={SIDE_FILE: text})
    return target


def load(path: str | Path) -> OptimizedModule:
    """Load what `save` wrote (or any plain ``.pt2``), after the archive was scanned.

    The module is called like the one that was saved, and refuses what that one refused.

    Raises:
        LoadError: the file is unsafe, damaged, or not an exported program.
    """
    from graphopt.loading import load_model

    loaded = load_model(path)
    program = program_of(loaded)
    report = _facts(loaded).report
    report = Report(program.name) if report is None else Report.from_dict(report)
    return OptimizedModule(program, report)


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
