"""From the MODEL argument to something that can be captured: module, example inputs, program."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from graphopt.errors import GraphoptError, LoadError
from graphopt.inputs import Inputs, from_file, from_spec
from graphopt.loading import LoadedModel, load_model
from graphopt.presets import Recipe
from graphopt.program import Program
from graphopt.recipe import Options


@dataclass(frozen=True)
class Subject:
    """A loaded model with example inputs; ``module`` is ``None`` for a ``.pt2``."""

    loaded: LoadedModel
    module: nn.Module | None
    inputs: Inputs
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.loaded.source.stem or self.loaded.source.name

    def capture(self) -> tuple[Program, list[Any] | None]:
        """The program, and what the original gives on the example inputs."""
        from graphopt.optimize import capture_model

        if self.module is None:
            return _from_pt2(self.loaded), None
        if isinstance(self.module, ScriptModule):
            return _from_torchscript(self.loaded, self.module, self.inputs), None
        return capture_model(self.module, (), self.inputs.kwargs, self.inputs.dynamic or None)


def load_subject(
    model: str, inputs: str | None, arch: str | None, trust_pickle: bool, train: bool = False
) -> Subject:
    """Load MODEL safely and find example inputs for it.

    Raises:
        LoadError: the file is refused.
        GraphoptError: no example inputs were given and none can be guessed.
    """
    loaded = load_model(model, arch=arch, trust_pickle=trust_pickle)
    if loaded.kind == "onnx":
        raise LoadError(
            "an ONNX file cannot be captured",
            where=model,
            fix="give the PyTorch model it came from",
        )
    if loaded.exported is not None:
        return Subject(loaded, None, Inputs({}), loaded.notes)
    module = loaded.module
    if module is None:
        raise LoadError(f"{loaded.kind} holds no module", where=model)
    module.train(train)
    found = _inputs(loaded, module, inputs)
    return Subject(loaded, module, found, loaded.notes + found.notes)


def _inputs(loaded: LoadedModel, module: nn.Module, inputs: str | None) -> Inputs:
    if inputs is not None:
        return from_file(inputs) if Path(inputs).is_file() else from_spec(inputs, module)
    if loaded.kind == "huggingface":
        from graphopt.huggingface_inputs import huggingface_inputs, tokenizer_of

        return huggingface_inputs(module, tokenizer_of(loaded))
    raise GraphoptError(
        "the model needs example inputs",
        where=str(loaded.source),
        fix="--inputs 'NAME:DTYPE[DIM,...]', such as --inputs 'x:float32[batch,3,224,224]'",
    )


def _from_pt2(loaded: LoadedModel) -> Program:
    from graphopt.artifact import program_of

    return program_of(loaded)


def _from_torchscript(loaded: LoadedModel, module: ScriptModule, inputs: Inputs) -> Program:
    from graphopt.loading.torchscript_export import export_torchscript

    exported = export_torchscript(module, inputs.kwargs, str(loaded.source))
    return _from_pt2(replace(loaded, exported=exported))


def options_from(
    recipe: str, passes: tuple[str, ...], strict: bool, measure: bool, calibration: str | None
) -> Options:
    """Command-line options as `Options`."""
    chosen: Recipe = list(passes) if passes else recipe
    batches = [from_file(calibration).kwargs] if calibration else None
    return Options(chosen, calibration=batches, strict=strict, measure=measure)
