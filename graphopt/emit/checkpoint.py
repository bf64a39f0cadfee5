"""Writing an optimized Hugging Face model as a folder that other programs serve."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.emit.module import OptimizedModule
from graphopt.errors import ExportError, GraphoptError, MissingDependencyError
from graphopt.files import atomic_path
from graphopt.interchange.recover import recovered
from graphopt.interchange.written import FORMATS, Written, written
from graphopt.original import run_original
from graphopt.program import Program

_BESIDE = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "*processor_config.json",
)
"""Files of the original folder that are copied: tokenizers, templates, processors."""

TOLERANCES = {torch.float32: 0.02, torch.float64: 0.02}
LOW_PRECISION = 0.06
"""What outputs of the written folder may be off by, relative: scales may be rounded to float16, and
activations in 8 bits round otherwise then. A weight in the wrong place costs far more."""


@dataclass
class Checkpoint:
    """A folder that was written.

    Attributes:
        error: relative error of its outputs against those of the module; None where not compared.
    """

    path: Path
    format: str
    layers: int
    bytes: int
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What was written, in words."""
        compared = "" if self.error is None else f", error {self.error:.2g} when read back"
        head = f"wrote {self.path} ({self.format}, {self.layers} quantized layers, "
        return [f"{head}{self.bytes / 1e6:.1f} MB{compared})", *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data."""
        return {**self.__dict__, "path": str(self.path)}


def export_huggingface(
    module: OptimizedModule,
    folder: str | Path,
    source: nn.Module | str | Path,
    *,
    format: str = "compressed-tensors",
    verify: bool = True,
) -> Checkpoint:
    """Write a module with quantized weights as a Hugging Face folder.

    The folder holds ``config.json`` with ``quantization_config``, safetensors under the original
    parameter names, and the tokenizer's files. Projections that were merged are taken apart, and
    folded weights stand under the names of those that they replace.

    Args:
        module: what `graphopt.compile` made of the model, with ``example_inputs``.
        folder: where to write; it may not hold files yet.
        source: the model that was compiled, a ``transformers.PreTrainedModel``, or its folder.
        format: ``"compressed-tensors"``, or ``"gptq"`` for integer weights alone; scales become
            float16 there.
        verify: load the folder again and compare it with the module on the captured inputs, before
            it is put in place.

    Raises:
        ExportError: nothing in the module is quantized, the format cannot hold it, a rewrite has
            no words in the original model's parameters, or the folder does not verify.
        MissingDependencyError: transformers is not installed.
    """
    program = _checked(module, format)
    model, origin = _source(source)
    target, beside = Path(folder), files_beside(origin)
    found = recovered(program, model)
    if not found.products:
        raise ExportError(
            f"no linear layer of {program.name} is quantized: {format} has nothing to hold",
            fix="passes=[QuantizeMatmul(...)], or model.save_pretrained for a float model",
        )
    made = written(found.products, model, format)
    biases = {f"{n}.bias": p.bias for n, p in found.products.items() if p.bias is not None}
    state = found.floats | biases | made.tensors
    result = Checkpoint(target, format, len(found.products), 0, notes=found.notes)
    if not any("token" in file.name for file in beside):
        result.notes.append("no tokenizer was found beside the model: none is in the folder")
    with atomic_path(target) as temporary:
        temporary.mkdir()
        _write(temporary, model, state, made, beside)
        result.bytes = sum(f.stat().st_size for f in temporary.glob("*.safetensors"))
        if verify:
            result.error = _compare(temporary, program)
    return result


def _checked(module: OptimizedModule, form: str) -> Program:
    if not isinstance(module, OptimizedModule):
        raise GraphoptError(
            f"cannot export a {type(module).__name__}",
            fix="export what graphopt.compile(model, example_inputs=...) returned",
        )
    if form not in FORMATS:
        raise ExportError(f"unknown format {form!r}", fix=f"use one of {', '.join(FORMATS)}")
    return module.current_program()


def _source(source: nn.Module | str | Path) -> tuple[Any, Path | None]:
    """The original model, and the folder it came from."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "a Hugging Face folder needs transformers", fix="pip install 'graphopt[hf]'"
        ) from error
    if isinstance(source, str | Path):
        from graphopt.loading import load_model

        return load_model(source).module, Path(source)
    if not isinstance(source, transformers.PreTrainedModel):
        raise ExportError(
            f"a {type(source).__name__} has no Hugging Face folder",
            fix="give the transformers model that was compiled, or its folder",
        )
    origin = Path(source.config.name_or_path or "")
    return source, origin if origin.name and origin.is_dir() else None


def _write(
    folder: Path, model: Any, state: dict[str, Tensor], made: Written, beside: list[Path]
) -> None:
    hub = importlib.import_module("huggingface_hub")
    config = copy.deepcopy(model.config)
    config.quantization_config = made.config
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.tie_word_embeddings = _is_tied(model, state)
    config.save_pretrained(folder)
    for file in beside:
        shutil.copy(file, folder / file.name)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)
    hub.save_torch_state_dict(
        _untied(state, model),
        folder,
        filename_pattern="model{suffix}.safetensors",
        metadata={"format": "pt"},
    )


def files_beside(origin: Path | None) -> list[Path]:
    """Tokenizer, templates and processors of a folder; nothing that would run."""
    if origin is None or not origin.is_dir():
        return []
    found = {f for pattern in _BESIDE for f in origin.glob(pattern) if f.is_file()}
    return sorted(f for f in found if f.suffix not in (".py", ".safetensors", ".bin", ".pt"))


def _output(model: Any) -> tuple[str, str] | None:
    """Names of the weights of the head and of the embedding."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    names = {m: n for n, m in model.named_modules()}
    return None if head is None else (f"{names[head]}.weight", f"{names[table]}.weight")


def _is_tied(model: Any, state: Mapping[str, Tensor]) -> bool:
    names = _output(model)
    if names is None or not model.config.tie_word_embeddings:
        return bool(model.config.tie_word_embeddings)
    head, table = (state.get(name) for name in names)
    return head is not None and table is not None and torch.equal(head, table)


def _untied(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Without the second name of a tied weight, each tensor in memory of its own."""
    names = _output(model)
    tied = names[0] if names is not None and _is_tied(model, state) else None
    seen: set[int] = set()
    return {n: _alone(t.detach(), seen) for n, t in state.items() if n != tied}


def _alone(tensor: Tensor, seen: set[int]) -> Tensor:
    whole = tensor.untyped_storage()
    is_shared = whole.data_ptr() in seen or whole.nbytes() != tensor.nbytes
    made = tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()
    seen.add(made.untyped_storage().data_ptr())
    return made


def _compare(folder: Path, program: Program) -> float:
    """The relative error of the folder's outputs, of which the largest counts.

    Raises:
        ExportError: it is too large, or the folder gives other outputs.
    """
    from graphopt.loading import load_model

    again = load_model(folder).module
    call = program.call
    if again is None or call is None:
        raise ExportError("a program without the call it was captured by", fix="verify=False")
    args, kwargs = pytree.tree_unflatten(list(program.example_inputs), call.in_spec)
    found = run_original(program, again, args, {**kwargs, **call.fixed})
    with torch.no_grad():
        wanted = program.run(program.example_inputs)
    pairs = [(f, w) for f, w in zip(found, wanted, strict=False) if isinstance(w, Tensor)]
    error = max((_error(f, w) for f, w in pairs), default=0.0)
    kinds = {w.dtype for _, w in pairs if w.is_floating_point()}
    allowed = max((TOLERANCES.get(kind, LOW_PRECISION) for kind in kinds), default=0.0)
    if len(found) != len(wanted) or not error <= allowed:
        raise ExportError(
            f"the written folder does not compute what the module does: error {error:.2g}, "
            f"allowed {allowed:.2g}",
            where=str(folder.name),
            fix="quantize the model as it is: passes=[QuantizeMatmul(...)], and no other pass",
        )
    return error


def _error(found: Any, wanted: Tensor) -> float:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return float("inf")
    wide, exact = found.double(), wanted.double()
    scale = float(exact.norm())
    return float((wide - exact).norm()) / scale if scale else float((wide - exact).abs().sum())
