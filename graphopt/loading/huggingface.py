"""Hugging Face folders: ``config.json`` and weights, loaded with transformers' own classes only.

Code in the folder is never run: no remote code, no kernels from the hub, no pickles, and nothing
is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt.errors import LoadError, MissingDependencyError
from graphopt.loading.checkpoint import require_weights_only
from graphopt.loading.findings import Finding, Limits, printable, reading, refuse
from graphopt.loading.gguf_files import read_gguf
from graphopt.loading.safetensors_files import read_header
from graphopt.loading.tensors import check_tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; a folder with a GGUF file, which is its own config, needs none.

    Raises:
        LoadError: there is none, or it is no JSON mapping.
    """
    path = folder / "config.json"
    if not path.is_file() and weight_files(folder)[0] == "gguf":
        return {"architectures": ["AutoModelForCausalLM"]}
    if not path.is_file():
        raise LoadError(
            "the folder holds no config.json, so it is no Hugging Face model",
            where=str(folder),
            fix="name a model file, or a folder written by save_pretrained()",
        )
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    return config


def folder_findings(folder: Path, config: dict[str, Any]) -> Iterator[Finding]:
    """What would bring in code or files from elsewhere."""
    yield from _kernel_findings(config, str(folder / "config.json"))
    if (folder / "adapter_config.json").exists():
        what = "the folder holds an adapter, whose base model lies elsewhere"
        yield Finding(what, str(folder), "merge it (peft: merge_and_unload) and save the result")
    for index in sorted(folder.glob("*.index.json")):
        with reading(index):
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for file in sorted(f for f in files if Path(f).name != f or not (folder / f).is_file()):
            yield Finding(f"the weights {file!r:.80} are not a file of the folder", str(index))


def _kernel_findings(config: dict[str, Any], where: str) -> Iterator[Finding]:
    """Kernels named in the config, or in that of a vision or text tower within it."""
    for key, value in config.items():
        if "_implementation" in key and "/" in json.dumps(value):
            what = f"{key}={value!r:.80} would download a kernel and run it"
            yield Finding(what, where, f"remove {key}")
        elif isinstance(value, dict):
            yield from _kernel_findings(value, where)


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """The kind of weights (``safetensors``, ``bin``, ``gguf``) that will be used, and the files.

    Raises:
        LoadError: there are none.
    """
    for kind, pattern in (
        ("safetensors", "model*.safetensors"),
        ("bin", "pytorch_model*.bin"),
        ("gguf", "*.gguf"),
    ):
        if files := sorted(folder.glob(pattern)):
            return kind, files
    raise LoadError(
        "the folder holds no weights",
        where=str(folder),
        fix="it must hold model*.safetensors, pytorch_model*.bin or a .gguf file",
    )


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
    _check_weights(kind, files, limits)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options |= {"use_safetensors": kind == "safetensors", "weights_only": True, "dtype": "auto"}
    notes = [f"weights from {', '.join(f.name for f in files[:4])}"]
    if kind == "gguf":
        options = {"local_files_only": True, "gguf_file": _only_gguf(files)}
        notes.append("dequantized to float32")
    if "auto_map" in config:
        notes.append("the folder's own code was not used (auto_map)")
    kind_of_model = model_class(config)
    with reading(folder, _fix(config)), _no_progress_bars():
        model, info = kind_of_model.from_pretrained(folder, output_loading_info=True, **options)
    check_tensors(model, str(folder))
    return model.eval(), notes + _key_notes(info)


def _key_notes(info: dict[str, Any]) -> list[str]:
    """Weights that the files lack, which transformers draws at random, and those it left unused."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    notes = [f"drawn at random, for the files lack them: {_some(missing)}"] if missing else []
    return notes + ([f"left unused: {_some(unused)}"] if unused else [])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return printable(", ".join(names[:6])) + more


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


def _check_weights(kind: str, files: list[Path], limits: Limits) -> None:
    for file in files:
        if kind == "safetensors":
            read_header(file, limits)
        elif kind == "bin":
            require_weights_only(file, limits, "save the model again with save_pretrained()")
        else:
            read_gguf(file, limits)
        if kind == "gguf" and importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError(
                "reading a GGUF file needs the package gguf",
                where=str(file),
                fix="pip install gguf",
            )


def _only_gguf(files: list[Path]) -> str:
    if len(files) == 1:
        return files[0].name
    raise LoadError(
        f"the folder holds {len(files)} GGUF files: {', '.join(f.name for f in files[:6])}",
        where=str(files[0].parent),
        fix="keep the one to load in a folder of its own, with config.json",
    )


def model_class(config: dict[str, Any]) -> Any:
    """The transformers class that ``architectures`` names first, ``AutoModel`` where it names none.

    Raises:
        LoadError: transformers has no such model class.
        MissingDependencyError: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "loading a Hugging Face folder needs transformers", fix="pip install 'graphopt[hf]'"
        ) from error
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


def _fix(config: dict[str, Any]) -> str | None:
    if "auto_map" in config:
        return "the model needs the folder's own code, which graphopt never runs: load it in Python"
    return None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, without running code of the folder or downloading anything.

    Raises:
        LoadError: the folder has no tokenizer that transformers knows.
    """
    transformers = importlib.import_module("transformers")
    with reading(folder, "the folder needs tokenizer.json"):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
