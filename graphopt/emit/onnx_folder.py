"""A Hugging Face model as a folder with ONNX files that other programs load by their names."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
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
from graphopt.emit.onnx_folder_plan import FolderPlan, plan_folder
from graphopt.emit.onnx_half_choice import check_dtype
from graphopt.emit.onnx_runtime import TOLERANCE
from graphopt.emit.onnx_seq2seq import hold_seq2seq
from graphopt.errors import ExportError, GraphoptError, LoadError
from graphopt.files import atomic_path
from graphopt.huggingface_seq2seq import Part
from graphopt.optimize import capture_model, optimize_program
from graphopt.presets import Recipe, resolve
from graphopt.program import Program
from graphopt.recipe import Options

SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers reads of a folder, besides the folders that ``modules.json`` names."""


@dataclass(frozen=True)
class OnnxFolder:
    """A folder that was written.

    Attributes:
        task: ``text-generation``, or what the outputs of the files are for.
        models: what there is to tell of each ONNX file.
        files: everything in the folder, by its path in there.
        walked: largest relative error of logits on prompts and tokens behind them; None where it
            was not compared, or nothing is generated.
    """

    path: Path
    task: str
    models: tuple[OnnxResult, ...]
    files: tuple[str, ...] = ()
    walked: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> OnnxResult:
        """The first ONNX file, which is the only one unless encoder and decoder are apart."""
        return self.models[0]

    def lines(self) -> list[str]:
        """What was written, in words."""
        told = [f"wrote {self.path} for {self.task}: {', '.join(self.files)}"]
        for model in self.models:
            prefix = f"{model.path.name}: " if len(self.models) > 1 else ""
            told.append(
                f"{prefix}inputs: {_few(model.inputs)}; outputs: {_few(model.outputs)}",
            )
            told += [f"{prefix}{line}" for line in model.lines()[2:]]
        if self.walked is not None:
            told.append(f"prompts and tokens behind them: relative error {self.walked:.1e}")
        return [*told, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data."""
        models = [model.to_dict() for model in self.models]
        return {**asdict(self), "path": str(self.path), "models": models}


def _few(names: tuple[str, ...]) -> str:
    """Names without those of the layers between the first and the last."""
    return ", ".join(names if len(names) < 10 else [*names[:4], "...", names[-1]])


@dataclass(frozen=True)
class _Made:
    """A part after optimization, and its program before."""

    part: Part
    module: OptimizedModule
    captured: Program


def write_folder(
    plan: FolderPlan,
    folder: str | Path,
    options: Options,
    *,
    opset: int | None = None,
    fuse: bool = True,
    verify: bool = True,
    dtype: str | None = None,
    one_copy: bool = False,
) -> OnnxFolder:
    """Optimize the plan's model and write it; arguments as `export_onnx_folder` takes them.

    Raises:
        see `export_onnx_folder`.
    """
    refuse_taken(Path(folder))
    refuse_calibration(plan, options.calibration)
    made = [_optimized(part, plan, options, dtype) for part in plan.parts]
    target, inside = Path(folder), _inside(plan)
    options.progress("translate and compare in ONNX Runtime")
    settings: dict[str, Any] = {
        "opset": opset,
        "fuse": fuse,
        "verify": verify,
        "measure": options.measure,
        "dtype": dtype,
        "one_copy": one_copy,
    }
    with atomic_path(target) as temporary:
        place = temporary / inside
        place.mkdir(parents=True)
        files = [
            export_onnx(m.module, place / m.part.file, names=m.part.names, **settings) for m in made
        ]
        walked = _walk(place, plan, made, files, dtype) if verify else None
        _write_beside(temporary, plan, files[0].inputs, dtype)
        found = sorted(str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file())
    models = tuple(replace(f, path=target / inside / f.path.name) for f in files)
    return OnnxFolder(target, plan.task, models, tuple(found), walked, plan.notes)


def _optimized(part: Part, plan: FolderPlan, options: Options, dtype: str | None) -> _Made:
    def told(text: str) -> None:
        options.progress(f"{part.file}: {text}" if plan.is_split else text)

    told("capture")
    program, eager = capture_model(part.module, (), part.inputs.kwargs, part.inputs.dynamic or None)
    check_program(program)
    check_dtype(program, dtype)
    module = optimize_program(program, replace(options, progress=told), eager=eager)
    return _Made(part, module, program)


def _walk(
    place: Path,
    plan: FolderPlan,
    made: Sequence[_Made],
    files: Sequence[OnnxResult],
    dtype: str | None,
) -> float | None:
    """The error of logits in a generation; None where nothing is generated.

    Raises:
        VerificationError: it is too large.
    """
    measured = max(file.error or 0.0 for file in files)
    if dtype is not None:
        measured = max(measured, TOLERANCE[torch.float16])
    programs = [m.module.current_program() for m in made]
    captured = [m.captured for m in made]
    if plan.is_split:
        return hold_seq2seq(place, plan.parts, programs, captured, plan.model, measured)
    if plan.decoder is None:
        return None
    path = place / plan.parts[0].file
    return hold_decoder(path, plan.decoder, programs[0], captured[0], plan.model, measured)


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
    one_copy: bool = False,
    strict: bool = False,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> OnnxFolder:
    """Optimize a Hugging Face model, and write it as a folder with an ONNX file, or several.

    A causal language model becomes one file for prompts and for tokens behind a cache, with the
    names that optimum's ``ORTModelForCausalLM`` and `graphopt.generation.OnnxCausalLM` read;
    ``genai_config.json`` tells onnxruntime-genai the same. An encoder and a decoder (T5, BART,
    Whisper) become ``encoder_model.onnx``, ``decoder_model.onnx`` and
    ``decoder_with_past_model.onnx``, as ``ORTModelForSeq2SeqLM``, ``ORTModelForSpeechSeq2Seq`` and
    `graphopt.generation.OnnxSeq2SeqLM` read them. Other models keep the names of
    transformers. Config and tokenizer lie beside it; the file of a folder of sentence-transformers
    lies in its folder ``onnx``.

    Args:
        model: a ``transformers.PreTrainedModel`` in eval mode, or its folder.
        folder: where to write; it may not hold files yet.
        passes: as `graphopt.compile` takes them, with ``calibration`` and ``strict``.
        tokenizer: of transformers, written into the folder; default: that of the model's folder.
        opset, fuse, verify, measure, dtype, one_copy: as `graphopt.export_onnx` takes them. In
            ``float16`` keys and values are halves too, in ``mixed`` they are float32.

    Raises:
        ExportError: the folder has files, or the model has no such form.
        CaptureError: the model cannot be captured, or caches something else than keys and values.
        GraphoptError: ``calibration`` for an encoder and a decoder.
        VerificationError: a file is not right; nothing is written.
    """
    refuse_taken(Path(folder))
    check_dtype(None, dtype, verify=verify)
    model, origin = _source(model)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(origin)
    told = progress or (lambda _text: None)
    options = Options(resolve(passes), calibration, strict=strict, measure=measure, progress=told)
    plan = plan_folder(model, origin, tokenizer)
    settings: dict[str, Any] = {"opset": opset, "fuse": fuse, "verify": verify, "dtype": dtype}
    return write_folder(plan, folder, options, one_copy=one_copy, **settings)


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


def refuse_calibration(plan: FolderPlan, calibration: Any) -> None:
    """Refuse inputs to learn from where each file has others.

    Raises:
        GraphoptError: says so.
    """
    if plan.is_split and calibration is not None:
        raise GraphoptError(
            f"the files of {type(plan.model).__name__} have inputs of their own, and calibration "
            "inputs are of the whole model",
            where="calibration",
            fix="leave it out, and quantize with a method that needs none (rtn, hqq)",
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


def _inside(plan: FolderPlan) -> PurePosixPath:
    """Where in the folder the files lie."""
    is_sentence = plan.origin is not None and (plan.origin / SENTENCES[0]).is_file()
    return PurePosixPath("onnx" if is_sentence else ".")


def _write_beside(
    folder: Path, plan: FolderPlan, inputs: tuple[str, ...], dtype: str | None
) -> None:
    """Configs, the tokenizer's files, and what sentence-transformers reads."""
    model: Any = plan.model
    config = copy.deepcopy(model.config)
    halves = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    config.architectures = [type(model).__name__]
    config.dtype = halves.get(dtype or "", model.dtype)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the file holds the weights, not torch
    generates = plan.is_split or plan.decoder is not None
    if generates:
        config.use_cache = True
    config.save_pretrained(folder)
    for file in files_beside(plan.origin):
        shutil.copy(file, folder / file.name)
    if plan.tokenizer is not None and not any(folder.glob("*token*")):
        plan.tokenizer.save_pretrained(folder)
    if plan.origin is not None:
        _copy_sentence_modules(plan.origin, folder)
    if generates:
        if not (folder / "generation_config.json").exists():
            model.generation_config.save_pretrained(folder)
        _use_cache(folder / "generation_config.json")
    if plan.decoder is not None:
        made = genai_config(model, plan.decoder, inputs)
        text = json.dumps(made, indent=2) + "\n"
        (folder / "genai_config.json").write_text(text, encoding="utf-8")


def _use_cache(file: Path) -> None:
    """``generate`` fills the cache whatever the model was trained with: the files have one."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("use_cache") is False:
        text = json.dumps(settings | {"use_cache": True}, indent=2, sort_keys=True) + "\n"
        file.write_text(text, encoding="utf-8")


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
