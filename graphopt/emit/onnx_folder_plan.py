"""How a Hugging Face model is called for the ONNX files of its folder, before any capture."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.errors import ExportError
from graphopt.huggingface_caches import CAUSAL
from graphopt.huggingface_decoding import Decoding, decoding, is_causal
from graphopt.huggingface_inputs import huggingface_inputs
from graphopt.huggingface_seq2seq import Part, seq2seq_parts
from graphopt.inputs import Inputs


@dataclass(frozen=True)
class FolderPlan:
    """The files of a folder, and what lies beside them.

    Attributes:
        model: as it was given, or a copy in float32 of one in bfloat16.
        parts: its files: one, or those of an encoder and a decoder.
        decoder: the call with a cache of a causal language model.
        origin: the folder that the model came from.
        tokenizer: written into the folder where the origin has none.
    """

    model: nn.Module
    task: str
    parts: tuple[Part, ...]
    decoder: Decoding | None = None
    origin: Path | None = None
    tokenizer: Any = None
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> Inputs:
        """The call of the first file."""
        return self.parts[0].inputs

    @property
    def is_split(self) -> bool:
        """Whether encoder and decoder are files of their own."""
        return len(self.parts) > 1


def plan_folder(model: nn.Module, origin: Path | None = None, tokenizer: Any = None) -> FolderPlan:
    """How ``model`` is called in its folder: with a cache where it generates text.

    Raises:
        ExportError: it is no model of transformers, or one of an encoder and a decoder without
            text.
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
        part = Part(CAUSAL, model, found.inputs, (found.input_names, found.output_names))
        return FolderPlan(model, "text-generation", (part,), found, *rest)
    if _is_encoder_decoder(model):
        parts = seq2seq_parts(model, tokenizer)
        return FolderPlan(model, _task_of_source(parts[0]), tuple(parts), None, *rest)
    part = Part(CAUSAL, model, huggingface_inputs(model, tokenizer))
    return FolderPlan(model, _task(model), (part,), None, *rest)


def _in_float(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in a dtype that ONNX Runtime has products of on a CPU; float32 holds bfloat16."""
    if model.dtype != torch.bfloat16:
        return model, ()
    told = "weights were bfloat16 and are float32 in the file: ONNX Runtime has no such products"
    return copy.deepcopy(model).float(), (told,)


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _check_model(model: Any) -> None:
    if getattr(model, "config", None) is None or not hasattr(model, "save_pretrained"):
        raise ExportError(
            f"a {type(model).__name__} has no Hugging Face config to write a folder with",
            fix="give a transformers model or its folder, or write a file that ends in .onnx",
        )
    if _is_encoder_decoder(model) and not model.can_generate():
        raise ExportError(
            f"{type(model).__name__} has an encoder and a decoder, and generates no text",
            where="config.json, architectures",
            fix="export its encoder, model.get_encoder(), as a folder, or the model with its "
            "language head; --format onnx writes the whole as one file",
        )


def _task_of_source(encoder: Part) -> str:
    is_text = "input_ids" in encoder.inputs.kwargs
    return "text2text-generation" if is_text else "automatic-speech-recognition"


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
