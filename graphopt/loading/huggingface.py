"""Hugging Face folders: ``config.json`` and weights, loaded with transformers' own classes only.

Code in the folder is never run: no remote code, no kernels from the hub, no pickles, and nothing
is downloaded.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.errors import LoadError, MissingDependencyError
from graphopt.loading.findings import Limits, reading, refuse
from graphopt.loading.gguf_model import load_gguf
from graphopt.loading.hf_checks import empty_model, key_notes, quiet, refuse_mismatched
from graphopt.loading.hf_folder import (
    check_weights,
    folder_findings,
    only_gguf,
    read_config,
    weight_files,
)
from graphopt.loading.quantized_folder import headers_of, quantized_plan
from graphopt.loading.tensors import check_tensors

_TOKENIZER_FILES = ("*tokenizer*", "vocab*", "*.model")


def load_folder(folder: Path, limits: Limits, dequantize: bool = False) -> tuple[Any, list[str]]:
    """The model in evaluation mode, and notes on what was taken.

    A path to a GGUF file loads that file, which carries its own config. Quantized weights stay as
    they are stored, with ``dequantize`` they become floats.

    Raises:
        LoadError: the folder is incomplete, damaged, quantized in a way that cannot be read, or
            would run code of its own.
        MissingDependencyError: transformers, or gguf for a GGUF file, is not installed.
    """
    if folder.is_file():
        folder, kind, files = folder.parent, "gguf", [folder]
    else:
        kind, files = weight_files(folder)
    config = read_config(folder)
    refuse(folder_findings(folder, config))
    check_weights(kind, files, limits)
    kind_of_model = model_class(config)
    notes = [f"weights from {', '.join(f.name for f in files[:4])}"]
    if "auto_map" in config:
        notes.append("the folder's own code was not used (auto_map)")
    if kind == "gguf":
        model, more = load_gguf(folder / only_gguf(files), kind_of_model, dequantize)
        return model, notes + more
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options |= {"use_safetensors": kind == "safetensors", "weights_only": True, "dtype": "auto"}
    with reading(folder, _fix(config)), quiet():
        options["config"] = _full_config(kind_of_model, folder)
        empty = empty_model(kind_of_model, options["config"], files, folder)
        plan = quantized_plan(empty, config, partial(headers_of, kind, files, limits), folder)
        options |= plan.options(options["config"])
        model, info = kind_of_model.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    refuse_mismatched(info.get("mismatched_keys") or (), folder)
    plan.finish(model, info["missing_keys"], dequantize)
    check_tensors(model, str(folder))
    return model.eval(), notes + plan.notes + key_notes(info)


def _full_config(kind_of_model: Any, folder: Path) -> Any:
    """The transformers config, with every default filled in."""
    kind = getattr(kind_of_model, "config_class", None) or _transformers().AutoConfig
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def model_class(config: dict[str, Any]) -> Any:
    """The transformers class that ``architectures`` names first, ``AutoModel`` where it names none.

    Raises:
        LoadError: transformers has no such model class.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers()
    names = config.get("architectures") or ["AutoModel"]
    found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if is_model or names[0] in ("AutoModel", "AutoModelForCausalLM"):
        return found
    raise LoadError(
        f"transformers {transformers.__version__} has no model class {names[0]!r}",
        where="config.json, architectures",
        fix="upgrade transformers; code in the folder is never run",
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "loading a Hugging Face folder needs transformers", fix="pip install 'graphopt[hf]'"
        ) from error


def _fix(config: dict[str, Any]) -> str | None:
    if "auto_map" in config:
        return "the model needs the folder's own code, which graphopt never runs: load it in Python"
    return None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, without running code of the folder or downloading anything.

    Raises:
        LoadError: the folder has no tokenizer that transformers knows.
    """
    transformers = _transformers()
    if not any(f for pattern in _TOKENIZER_FILES for f in folder.glob(pattern)):
        # transformers would make one with an empty vocabulary
        raise LoadError("the folder holds no tokenizer", where=str(folder))
    with reading(folder):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
