"""Loading a model of any supported kind, by its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.loading.checkpoint import load_checkpoint
from graphopt.loading.findings import Limits
from graphopt.loading.huggingface import load_folder, load_tokenizer
from graphopt.loading.onnx_files import check_external_data
from graphopt.loading.pt2 import load_pt2
from graphopt.loading.safetensors_files import load_safetensors
from graphopt.loading.sniff import sniff
from graphopt.loading.state_dict import build_architecture, describe, find_state, load_into
from graphopt.loading.torchscript import load_torchscript


@dataclass(frozen=True)
class LoadedModel:
    """A model as it came from disk; modules are in evaluation mode, their tensors on the CPU.

    Attributes:
        source: the file or folder.
        kind: ``state_dict``, ``pickled_module``, ``torchscript``, ``pt2``, ``huggingface`` or
            ``onnx``.
        module: the model, except for the kinds ``pt2`` and ``onnx``.
        exported: the program, for the kind ``pt2``.
        extra_files: the texts that were saved beside the program, for the kind ``pt2``.
        config: the transformers config, for the kind ``huggingface``.
        notes: what was done on the way that a person may want to know.
    """

    source: Path
    kind: str
    module: torch.nn.Module | None = None
    exported: torch.export.ExportedProgram | None = None
    extra_files: dict[str, str] = field(default_factory=dict)
    config: Any = None
    notes: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """The tokenizer of a Hugging Face folder.

        Raises:
            LoadError: the model is of another kind, or its folder has none.
        """
        if self.kind != "huggingface" or not self.source.is_dir():
            raise LoadError(f"a {self.kind} file has no tokenizer", where=str(self.source))
        return load_tokenizer(self.source)


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    dequantize: bool = False,
    limits: Limits | None = None,
) -> LoadedModel:
    """Load a model without running code from the file.

    What a file is, its content decides, not its name.

    Args:
        path: a checkpoint (``.pt``, ``.pth``, ``.bin``), ``.safetensors``, TorchScript archive,
            ``.pt2``, ``.onnx`` (checked, not loaded), ``.gguf``, or Hugging Face folder.
        arch: ``package.module:factory``, imported from the working folder or the installed
            packages and called without arguments; gives the module that a state dict fills.
        trust_pickle: let a checkpoint run the code it names, and TorchScript reach files.
        dequantize: make floats of the quantized weights of a Hugging Face folder or GGUF file,
            which otherwise stay as they are stored, in `interchange.modules`.
        limits: sizes above which a file is refused; by default from the environment.

    Raises:
        LoadError: the file is missing, damaged, hostile, of an unknown kind, or does not fit
            ``arch``; or it needs ``arch`` or ``trust_pickle`` and does not have it.
        MissingDependencyError: a package that the kind of file needs is not installed.
    """
    source, limits = Path(path), limits or Limits.from_env()
    kind = sniff(source, limits)
    if kind in ("checkpoint", "legacy", "safetensors"):
        return _from_weights(source, kind, arch, trust_pickle, limits)
    if arch is not None:
        raise LoadError(
            f"--arch fits a state dict, but this is a whole model ({kind})",
            where=str(source),
            fix="leave --arch (in Python, arch=) out",
        )
    if kind == "torchscript":
        module = load_torchscript(source, trusted=trust_pickle, limits=limits)
        return LoadedModel(source, kind, module=module.eval())
    if kind in ("huggingface", "gguf"):
        return _from_folder(source, limits, dequantize)
    if loader := _WHOLE_MODELS.get(kind):
        return loader(source, limits)
    raise _no_model(source, kind)


def _from_weights(
    source: Path, kind: str, arch: str | None, trust_pickle: bool, limits: Limits
) -> LoadedModel:
    _refuse_renamed(source)
    if kind == "safetensors":
        loaded: Any = load_safetensors(source, limits)
    else:
        loaded = load_checkpoint(source, trust_pickle=trust_pickle, limits=limits)
    if arch is None:
        if isinstance(loaded, torch.nn.Module):
            return LoadedModel(source, "pickled_module", module=loaded.eval())
        raise _needs_arch(source, loaded)
    state, notes = find_state(loaded, str(source))
    module = build_architecture(arch)
    notes += load_into(module, state, str(source))
    return LoadedModel(source, "state_dict", module=module.eval(), notes=tuple(notes))


def _refuse_renamed(source: Path) -> None:
    if source.suffix.lower() == ".pt2":
        raise LoadError(
            "the file is called .pt2 but holds pickled weights, not an exported program",
            where=str(source),
            fix="rename it to .pt and give --arch, or export the model with torch.export.save",
        )


def _needs_arch(source: Path, loaded: Any) -> LoadError:
    return LoadError(
        f"the file holds weights, not a model: {describe(loaded)}",
        where=str(source),
        fix="add --arch package.module:factory, the function or class that builds the model; in "
        "Python build the model, call its load_state_dict, and give it to graphopt.compile",
    )


def _from_pt2(source: Path, limits: Limits) -> LoadedModel:
    exported, extra_files = load_pt2(source, limits)
    return LoadedModel(source, "pt2", exported=exported, extra_files=extra_files)


def _from_onnx(source: Path, limits: Limits) -> LoadedModel:
    files = check_external_data(source, limits)
    notes = (f"external data in {', '.join(f.name for f in files)}",) if files else ()
    return LoadedModel(source, "onnx", notes=notes)


def _from_folder(source: Path, limits: Limits, dequantize: bool) -> LoadedModel:
    module, notes = load_folder(source, limits, dequantize)
    return LoadedModel(
        source, "huggingface", module=module, config=module.config, notes=tuple(notes)
    )


_WHOLE_MODELS: dict[str, Callable[[Path, Limits], LoadedModel]] = {
    "pt2": _from_pt2,
    "onnx": _from_onnx,
}


def _no_model(source: Path, kind: str) -> LoadError:
    if kind == "old_pt2":
        return LoadError(
            "the program was saved by torch before 2.8, in a format whose weights are pickles",
            where=str(source),
            fix="load it with that torch where you trust it, and save it again with a newer one",
        )
    return LoadError(
        "the archive holds no model: no checkpoint, TorchScript or exported program",
        where=str(source),
        fix=f"`graphopt inspect {source}` shows what it holds",
    )
