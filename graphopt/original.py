"""Running the module that was captured, once, and leaving everything as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture_errors import first_line
from graphopt.capture_watch import left_as_it_is
from graphopt.errors import CaptureError
from graphopt.memory import has_storage, storage
from graphopt.program import Program
from graphopt.signature import OutputKind, ProgramOutput
from graphopt.source import frames_of_traceback, innermost
from graphopt.verify.replay import SEED


def run_original(
    program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Values of the program's outputs as the module itself makes them.

    What it writes into inputs and buffers comes first, as in the program; that part is missing
    where the program's inputs are not the caller's own tensors. Results that show the memory of an
    updated buffer are noted in the program's outputs: a functional graph does not tell.

    Raises:
        CaptureError: the module fails on these inputs; says with what, and at which of its lines.
    """
    call: Any = (args, kwargs)
    copies: dict[int, Tensor] = {}
    if any(o.kind is OutputKind.INPUT_MUTATION for o in program.outputs):
        call, copies = _copied(call)
    with left_as_it_is(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        outputs = pytree.tree_leaves(_called(model, *call))
        _note_shown(program, model, outputs)
        values = [*_written(program, model, copies), *outputs]
        return [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def _note_shown(program: Program, model: nn.Module, outputs: Sequence[Any]) -> None:
    """Name, for each user output that lies in a buffer the program updates, that buffer."""
    updated = {o.target for o in program.outputs if o.kind is OutputKind.BUFFER_MUTATION}
    owners = {
        storage(buffer): name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in updated
    }
    user = [i for i, o in enumerate(program.outputs) if o.kind is OutputKind.USER]
    for index, value in zip(user, outputs, strict=False):
        if has_storage(value):
            program.outputs[index] = ProgramOutput(OutputKind.USER, owners.get(storage(value)))


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        frame = innermost(frames_of_traceback(error.__traceback__))
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs: {first_line(error)}",
            where=str(frame) if frame else None,
            fix="call the model with them in eager mode, and correct their dtypes, sizes or values",
        ) from error


def _copied(call: Any) -> tuple[Any, dict[int, Tensor]]:
    """Arguments for a model that writes into them, and the copies by the originals' ids.

    Tensors that shared memory still do.
    """
    memo: dict[int, Any] = {}
    copies = {id(t): t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)}
    copies = {key: deepcopy(t.detach(), memo) for key, t in copies.items()}
    return pytree.tree_map_only(Tensor, lambda t: copies[id(t)], call), copies


def _written(program: Program, model: nn.Module, copies: Mapping[int, Tensor]) -> list[Tensor]:
    """What a run left in buffers and inputs, in the order of the program's outputs.

    Empty where the program's inputs are not the caller's own tensors.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    given = {n.name: v for n, v in zip(program.user_inputs(), program.example_inputs, strict=True)}
    found = []
    for output in program.outputs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            found.append(buffers.get(output.target or ""))
        elif output.kind is OutputKind.INPUT_MUTATION:
            found.append(copies.get(id(given.get(output.target or ""))))
    known = [v for v in found if v is not None]
    return known if len(known) == len(found) else []
