"""What a Hugging Face folder holds, checked before transformers sees it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import LoadError, MissingDependencyError
from graphopt.loading.checkpoint import require_weights_only
from graphopt.loading.findings import Finding, Limits, reading
from graphopt.loading.gguf_files import read_gguf
from graphopt.loading.safetensors_files import read_header

_COUNTS = re.compile(r"(num|n)_.*(layers?|blocks?|experts)|n_layer|layers|depths?")
_MOST_LAYERS = 10_000


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


def count_findings(config: dict[str, Any], where: str) -> Iterator[Finding]:
    """Numbers of layers that would be built one by one without end."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from count_findings(value, where)
        elif isinstance(value, int) and value > _MOST_LAYERS and _COUNTS.fullmatch(key):
            yield Finding(f"{key}={value} in the config is out of all proportion", where)


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


def check_weights(kind: str, files: list[Path], limits: Limits) -> None:
    """Check every file of weights by its own rules.

    Raises:
        LoadError: one is damaged, or a pickle that the weights-only reader refuses.
        MissingDependencyError: the package that reads GGUF files is not installed.
    """
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


def only_gguf(files: list[Path]) -> str:
    """The name of the one GGUF file.

    Raises:
        LoadError: there are several.
    """
    if len(files) == 1:
        return files[0].name
    raise LoadError(
        f"the folder holds {len(files)} GGUF files: {', '.join(f.name for f in files[:6])}",
        where=str(files[0].parent),
        fix="keep the one to load in a folder of its own, with config.json",
    )
