"""Hugging Face folders: ``config.json`` and weights, loaded with transformers' own classes only.

Code in the folder is never run: no remote code, no kernels from the hub, no pickles, and nothing
is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError, MissingDependencyError
from graphopt.loading.findings import Limits, printable, reading, refuse
from graphopt.loading.hf_folder import (
    check_weights,
    count_findings,
    folder_findings,
    only_gguf,
    read_config,
    weight_files,
)
from graphopt.loading.tensors import check_tensors

_TOKENIZER_FILES = ("*tokenizer*", "vocab*", "*.model")
_PARAMETERS_PER_BYTE = 16  # more than any packing of weights reaches


def load_folder(folder: Path, limits: Limits) -> tuple[Any, list[str]]:
    """The model in evaluation mode, and notes on what was taken.

    A path to a GGUF file loads that file, which carries its own config.

    Raises:
        LoadError: the folder is incomplete, damaged, or would run code of its own.
        MissingDependencyError: transformers, or gguf for a GGUF file, is not installed.
    """
    if folder.is_file():
        folder, kind, files = folder.parent, "gguf", [folder]
    else:
        kind, files = weight_files(folder)
    config = read_config(folder)
    refuse(folder_findings(folder, config))
    check_weights(kind, files, limits)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options |= {"use_safetensors": kind == "safetensors", "weights_only": True, "dtype": "auto"}
    notes = [f"weights from {', '.join(f.name for f in files[:4])}"]
    if kind == "gguf":
        options = {"local_files_only": True, "gguf_file": only_gguf(files)}
        notes.append("dequantized to float32")
    if "auto_map" in config:
        notes.append("the folder's own code was not used (auto_map)")
    kind_of_model = model_class(config)
    with reading(folder, _fix(config)), _no_progress_bars():
        options["config"] = _full_config(kind_of_model, folder, options)
        stored = sum(file.stat().st_size for file in files)
        _check_size(kind_of_model, options["config"], stored, folder)
        with _quiet():
            model, info = kind_of_model.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    _refuse_mismatched(info.get("mismatched_keys") or (), folder)
    check_tensors(model, str(folder))
    return model.eval(), notes + _key_notes(info)


def _full_config(kind_of_model: Any, folder: Path, options: dict[str, Any]) -> Any:
    """The transformers config, with every default filled in."""
    kind = getattr(kind_of_model, "config_class", None) or _transformers().AutoConfig
    passed = {k: v for k, v in options.items() if k in ("gguf_file", "trust_remote_code")}
    return kind.from_pretrained(folder, local_files_only=True, **passed)


def _check_size(kind_of_model: Any, config: Any, stored: int, folder: Path) -> None:
    """Refuse a config of a far larger model than the weights are of: it would fill the memory."""
    refuse(count_findings(config.to_dict(), str(folder)))
    build = getattr(kind_of_model, "from_config", kind_of_model)
    with torch.device("meta"):
        model = build(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _PARAMETERS_PER_BYTE * stored + 1_000_000:
        raise LoadError(
            f"the config describes {count} parameters, the weights have {stored} bytes",
            where=str(folder),
            fix="get the complete weights, or the config that belongs to them",
        )


def _refuse_mismatched(found: Iterable[Any], folder: Path) -> None:
    """Weights of another shape than the config says, which transformers has left out."""
    rows = sorted(tuple(row) for row in found)
    if not rows:
        return
    name, stored, wanted = rows[0]
    more = f" (and {len(rows) - 1} more tensors do not fit)" if len(rows) > 1 else ""
    raise LoadError(
        f"the weights do not fit the config: {printable(str(name))!s:.200} has shape "
        f"{list(stored)} in the file, and {list(wanted)} by config.json{more}",
        where=str(folder),
        fix="get the config.json that belongs to the weights",
    )


def _key_notes(info: dict[str, Any]) -> list[str]:
    """Weights that the files lack, which transformers draws at random, and those it left unused."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    notes = [f"drawn at random, for the files lack them: {_some(missing)}"] if missing else []
    return notes + ([f"left unused: {_some(unused)}"] if unused else [])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return printable(", ".join(names[:6])) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing its own report on the weights; the notes tell it."""
    log = importlib.import_module("transformers.utils.logging")
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over the caller's output."""
    log = importlib.import_module("transformers.utils.logging")
    enabled = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            log.enable_progress_bar()


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
