"""A Hugging Face model as a folder with an ONNX file that other programs load by its names."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from graphopt.emit.checkpoint import files_beside
from graphopt.emit.genai_config import genai_config
from graphopt.emit.module import OptimizedModule
from graphopt.emit.onnx import OnnxResult, check_program, export_onnx
from graphopt.emit.onnx_decoding import hold_decoder
from graphopt.errors import ExportError, LoadError
from graphopt.files import atomic_path
from graphopt.huggingface_decoding import Decoding, decoding, is_causal
from graphopt.huggingface_inputs import huggingface_inputs
from graphopt.inputs import Inputs
from graphopt.optimize import capture_model, optimize_program
from graphopt.presets import Recipe, resolve
from graphopt.program import Program
from graphopt.recipe import Options

NAME = "model.onnx"
SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers reads of a folder, besides the folders that ``modules.json`` names."""


@dataclass(frozen=True)
class OnnxFolder:
    """A folder that was written.

    Attributes:
        task: ``text-generation``, or what the outputs of the file are for.
        file: what there is to tell of the ONNX file.
        files: everything in the folder, by its path in there.
        walked: largest relative error of logits on prompts and tokens behind them; None where it
            was not compared, or nothing is generated.
    """

    path: Path
    task: str
    file: OnnxResult
    files: tuple[str, ...] = ()
    walked: float | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was written, in words."""
        told = [f"wrote {self.path} for {self.task}: {', '.join(self.files)}"]
        told.append(f"inputs: {_few(self.file.inputs)}; outputs: {_few(self.file.outputs)}")
        told += self.file.lines()[2:]
        if self.walked is not None:
            told.append(f"prompts and tokens behind them: relative error {self.walked:.1e}")
        return [*told, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data."""
        return {**asdict(self), "path": str(self.path), "file": self.file.to_dict()}


def _few(names: tuple[str, ...]) -> str:
    """Names without those of the layers between the first and the last."""
    return ", ".join(names if len(names) < 10 else [*names[:4], "...", names[-1]])


@dataclass(frozen=True)
class FolderPlan:
    """How a model is captured for its folder, before anything is.

    Attributes:
        model: as it was given, or a copy in float32 of one in bfloat16.
        decoder: the call with a cache; None where nothing is generated.
        origin: the folder that the model came from.
        tokenizer: written into the folder where the origin has none.
    """

    model: nn.Module
    task: str
    inputs: Inputs
    decoder: Decoding | None = None
    origin: Path | None = None
    tokenizer: Any = None
    notes: tuple[str, ...] = ()


def plan_folder(model: nn.Module, origin: Path | None = None, tokenizer: Any = None) -> FolderPlan:
    """How ``model`` is called in its folder: with a cache where it generates text.

    Raises:
        ExportError: it is no model of transformers, or one of an encoder and a decoder.
        CaptureError: it generates with something else than keys and values.
        GraphoptError: no inputs are known for it.
    """
    _check_model(model)
    model, notes = _in_float(model)
    if tokenizer is None and "input_ids" in inspect.signature(model.forward).parameters:
        notes = (*notes, "no tokenizer was found beside the model: none is in the folder")
    rest = (origin, tokenizer, notes)
    if is_causal(model):
        found = decoding(model, tokenizer)
        return FolderPlan(model, "text-generation", found.inputs, found, *rest)
    return FolderPlan(model, _task(model), huggingface_inputs(model, tokenizer), None, *rest)


def _in_float(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in a dtype that ONNX Runtime has products of on a CPU; float32 holds bfloat16."""
    if model.dtype != torch.bfloat16:
        return model, ()
    told = "weights were bfloat16 and are float32 in the file: ONNX Runtime has no such products"
    return copy.deepcopy(model).float(), (told,)


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        raise ExportError(
            f"a {type(model).__name__} has no Hugging Face config to write a folder with",
            fix="give a transformers model or its folder, or write a file that ends in .onnx",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{type(model).__name__} has an encoder and a decoder, and there is no folder of both "
            "yet",
            where="config.json, is_encoder_decoder",
            fix="export its encoder, model.get_encoder(), as a folder; --format onnx writes the "
            "whole as one file without a cache",
        )


def _task(model: nn.Module) -> str:
    """The task by the name of the model's class, as transformers forms them."""
    names = {
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForMaskedLM": "fill-mask",
        "ForMultipleChoice": "multiple-choice",
        "ForImageClassification": "image-classification",
    }
    found = (task for ending, task in names.items() if type(model).__name__.endswith(ending))
    return next(found, "feature-extraction")


def write_folder(
    module: OptimizedModule,
    captured: Program,
    folder: str | Path,
    plan: FolderPlan,
    *,
    opset: int | None = None,
    fuse: bool = True,
    verify: bool = True,
    measure: bool = True,
) -> OnnxFolder:
    """Write what was made of the plan's model; arguments as `export_onnx` and `plan_folder`.

    Args:
        captured: the program before passes.

    Raises:
        ExportError: see `export_onnx`.
        VerificationError: the file is not right; nothing is written.
    """
    target, inside = Path(folder), _place(plan)
    names = (plan.decoder.input_names, plan.decoder.output_names) if plan.decoder else None
    with atomic_path(target) as temporary:
        (temporary / inside).parent.mkdir(parents=True)
        file = export_onnx(
            module,
            temporary / inside,
            opset=opset,
            fuse=fuse,
            verify=verify,
            measure=measure,
            names=names,
        )
        walked = None
        if plan.decoder and verify:
            walked = hold_decoder(
                temporary / inside,
                plan.decoder,
                module.current_program(),
                captured,
                plan.model,
                file.error or 0.0,
            )
        _write_beside(temporary, plan, names[0] if names else file.inputs)
        files = sorted(str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file())
    file = replace(file, path=target / inside)
    return OnnxFolder(target, plan.task, file, tuple(files), walked, plan.notes)


def export_onnx_folder(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    passes: Recipe = "exact",
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    opset: int | None = None,
    fuse: bool = True,
    verify: bool = True,
    measure: bool = True,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> OnnxFolder:
    """Optimize a Hugging Face model, and write it as a folder with an ONNX file.

    A causal language model becomes one file for prompts and for tokens behind a cache, with the
    names that optimum's ``ORTModelForCausalLM`` and `graphopt.generation.OnnxCausalLM` read;
    ``genai_config.json`` tells onnxruntime-genai the same. Other models keep the names of
    transformers. Config and tokenizer lie beside it; the file of a folder of sentence-transformers
    lies in its folder ``onnx``.

    Args:
        model: a ``transformers.PreTrainedModel`` in eval mode, or its folder.
        folder: where to write; it may not hold files yet.
        passes: as `graphopt.compile` takes them, with ``calibration`` and ``strict``.
        tokenizer: of transformers, written into the folder; default: that of the model's folder.
        opset, fuse, verify, measure: as `graphopt.export_onnx` takes them.

    Raises:
        ExportError: the folder has files, or the model has no such form.
        CaptureError: the model cannot be captured, or caches something else than keys and values.
        VerificationError: the file is not right; nothing is written.
    """
    refuse_taken(Path(folder))
    model, origin = _source(model)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(origin)
    plan, told = plan_folder(model, origin, tokenizer), progress or (lambda _text: None)
    options = Options(resolve(passes), calibration, strict=strict, measure=measure, progress=told)
    told("capture")
    captured, eager = capture_model(plan.model, (), plan.inputs.kwargs, plan.inputs.dynamic)
    check_program(captured)
    module = optimize_program(captured, options, eager=eager)
    told("translate and compare in ONNX Runtime")
    return write_folder(
        module, captured, folder, plan, opset=opset, fuse=fuse, verify=verify, measure=measure
    )


def refuse_taken(folder: Path) -> None:
    """Refuse a place where files lie.

    Raises:
        ExportError: names it.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExportError(
            "there are files already where the folder is to be written",
            where=str(folder),
            fix="name a new folder",
        )


def _source(model: nn.Module | str | Path) -> tuple[nn.Module, Path | None]:
    if isinstance(model, nn.Module):
        origin = Path(str(getattr(getattr(model, "config", None), "name_or_path", "") or ""))
        return model, origin if origin.name and origin.is_dir() else None
    from graphopt.loading import load_model

    loaded = load_model(model)
    if loaded.kind != "huggingface" or loaded.module is None:
        raise ExportError(
            f"a {loaded.kind} file has no Hugging Face config", fix="give a Hugging Face folder"
        )
    return loaded.module, Path(model)


def _tokenizer(origin: Path | None) -> Any:
    if origin is None:
        return None
    from graphopt.loading.huggingface import load_tokenizer

    try:
        return load_tokenizer(origin)
    except LoadError:
        return None


def _place(plan: FolderPlan) -> PurePosixPath:
    is_sentence = plan.origin is not None and (plan.origin / SENTENCES[0]).is_file()
    return PurePosixPath("onnx", NAME) if is_sentence else PurePosixPath(NAME)


def _write_beside(folder: Path, plan: FolderPlan, inputs: tuple[str, ...]) -> None:
    """Configs, the tokenizer's files, and what sentence-transformers reads."""
    model: Any = plan.model
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the file holds the weights, not torch
    if plan.decoder is not None:
        config.use_cache = True
    config.save_pretrained(folder)
    for file in files_beside(plan.origin):
        shutil.copy(file, folder / file.name)
    if plan.tokenizer is not None and not any(folder.glob("*token*")):
        plan.tokenizer.save_pretrained(folder)
    if plan.origin is not None:
        _copy_sentence_modules(plan.origin, folder)
    if plan.decoder is None:
        return
    if not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)
    made = genai_config(model, plan.decoder, inputs)
    (folder / "genai_config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _copy_sentence_modules(origin: Path, folder: Path) -> None:
    """``modules.json`` and the folders of pooling and normalization that it names."""
    if not (origin / SENTENCES[0]).is_file():
        return
    for name in SENTENCES:
        if (origin / name).is_file():
            shutil.copy(origin / name, folder / name)
    for entry in json.loads((origin / SENTENCES[0]).read_text(encoding="utf-8")):
        inside = PurePosixPath(str(entry.get("path", "")))
        if not inside.name or inside.is_absolute() or ".." in inside.parts:
            continue
        for file in sorted((origin / inside).glob("*")):
            if file.suffix in (".json", ".safetensors") and file.is_file():
                (folder / inside).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / inside / file.name)


__all__ = ["FolderPlan", "OnnxFolder", "export_onnx_folder", "plan_folder", "write_folder"]
