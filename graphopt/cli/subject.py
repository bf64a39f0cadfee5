"""From the MODEL argument to something that can be captured: module, example inputs, program."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from graphopt.cli.options import DEFAULT_RECIPE
from graphopt.errors import GraphoptError, LoadError, RecipeError
from graphopt.inputs import Inputs, given_inputs
from graphopt.loading import LoadedModel, load_model
from graphopt.presets import resolve
from graphopt.program import Program, val
from graphopt.recipe import Options


@dataclass(frozen=True)
class Subject:
    """A loaded model with example inputs; ``module`` is ``None`` for a ``.pt2``."""

    loaded: LoadedModel
    module: nn.Module | None
    inputs: Inputs
    notes: tuple[str, ...] = field(default=())
    train: bool = False

    def capture(self) -> tuple[Program, list[Any] | None]:
        """The program, and what the original gives on the example inputs."""
        from graphopt.optimize import capture_model

        if self.module is None:
            return _with_inputs(self._in_mode(_from_pt2(self.loaded)), self.inputs), None
        if isinstance(self.module, ScriptModule):
            program = _from_torchscript(self.loaded, self.module, self.inputs)
            return self._in_mode(program), None
        return capture_model(self.module, (), self.inputs.kwargs, self.inputs.dynamic or None)

    def _in_mode(self, program: Program) -> Program:
        if self.train and not program.training:
            raise GraphoptError(
                f"a {self.loaded.kind} file stays in the eval mode it was captured in",
                where="--train",
                fix="give the model it was made from",
            )
        return program


def load_subject(
    model: str,
    inputs: str | None,
    arch: str | None,
    trust_pickle: bool,
    train: bool = False,
    dequantize: bool = False,
) -> Subject:
    """Load MODEL safely and find example inputs for it.

    Raises:
        LoadError: the file is refused.
        GraphoptError: no example inputs were given and none can be guessed.
    """
    loaded = load_model(model, arch=arch, trust_pickle=trust_pickle, dequantize=dequantize or train)
    if loaded.kind == "onnx":
        raise LoadError(
            "an ONNX file cannot be captured",
            where=model,
            fix="give the PyTorch model it came from; `graphopt optimize` rewrites ONNX files as "
            "they are",
        )
    if loaded.exported is not None:
        given = Inputs({}) if inputs is None else given_inputs(inputs)
        if inputs is not None and not given.kwargs:
            raise GraphoptError("no input is named", where="--inputs", fix="leave the option out")
        return Subject(loaded, None, given, loaded.notes, train)
    module = loaded.module
    if module is None:
        raise LoadError(f"{loaded.kind} holds no module", where=model)
    module.train(train)
    found = _inputs(loaded, module, inputs)
    return Subject(loaded, module, found, loaded.notes + found.notes, train)


def _inputs(loaded: LoadedModel, module: nn.Module, inputs: str | None) -> Inputs:
    if inputs is not None:
        return given_inputs(inputs, module)
    if loaded.kind == "huggingface":
        from graphopt.huggingface_inputs import huggingface_inputs, tokenizer_of

        return huggingface_inputs(module, tokenizer_of(loaded))
    raise GraphoptError(
        "the model needs example inputs",
        where=str(loaded.source),
        fix="--inputs 'NAME:DTYPE[DIM,...]', such as --inputs 'x:float32[batch,3,224,224]'",
    )


def _with_inputs(program: Program, inputs: Inputs) -> Program:
    """The program with other example inputs, if any are given; they must fit its signature."""
    if not inputs.kwargs:
        return program
    from graphopt.emit.guards import CallBinder, InputGuard

    try:
        flat = CallBinder(program)((), inputs.kwargs)
        InputGuard(program)(flat)
    except GraphoptError as error:
        raise GraphoptError(error.what, where="--inputs", fix=error.fix) from error
    _check_axes(program, flat, inputs)
    program.example_inputs = tuple(flat)
    return program


def _check_axes(program: Program, flat: list[Any], inputs: Inputs) -> None:
    """An axis with a name in the specification must be one that the program left dynamic."""
    nodes = {id(value): node for value, node in zip(flat, program.user_inputs(), strict=True)}
    for name, axes in inputs.dynamic.items():
        for axis, label in axes.items():
            size = val(nodes[id(inputs.kwargs[name])]).shape[axis]
            if isinstance(size, int):
                raise GraphoptError(
                    f"axis {axis} of {name} is {size} in the file and cannot become {label!r}",
                    where="--inputs",
                    fix=f"write {size} in its place, or export the model with that axis dynamic",
                )


def _from_pt2(loaded: LoadedModel) -> Program:
    from graphopt.artifact import program_of

    return program_of(loaded)


def _from_torchscript(loaded: LoadedModel, module: ScriptModule, inputs: Inputs) -> Program:
    from graphopt.loading.torchscript_export import export_torchscript

    exported = export_torchscript(module, inputs.kwargs, str(loaded.source))
    return _from_pt2(replace(loaded, exported=exported))


def options_from(
    recipe: str | None,
    passes: tuple[str, ...],
    strict: bool,
    measure: bool,
) -> Options:
    """Command-line options as `Options`.

    Raises:
        RecipeError: the recipe or a pass cannot be read, or both are given.
    """
    if passes and recipe is not None:
        raise RecipeError(
            f"--pass runs instead of a recipe, and --recipe {recipe} was given too",
            where="--pass",
            fix="leave one of them out; a YAML recipe can hold the passes of both",
        )
    chosen = resolve(list(passes) if passes else recipe or DEFAULT_RECIPE)
    return Options(chosen, strict=strict, measure=measure)
