"""Tracing Hugging Face models: caches as pytrees, export patches, output flags."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from graphopt.errors import MissingDependencyError

OUTPUT_FLAGS = (
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_loss",
)

# Functions whose backward is the derivative of their forward, so that tracing loses nothing.
EXACT_FUNCTIONS = frozenset({"transformers.models.bloom.modeling_bloom.GeLUFunction"})


def pretrained_models(model: nn.Module) -> list[nn.Module]:
    """Every ``transformers.PreTrainedModel`` in ``model``, the outermost first."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None:
        return []
    return [m for m in model.modules() if isinstance(m, loaded.PreTrainedModel)]


def by_keyword(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call with every argument by name, and the output flags taken out of it.

    Flags such as ``use_cache`` decide what is computed; they become part of the program, which then
    does not demand them again at every call.
    """
    names = list(inspect.signature(model.forward).parameters)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    flags = {k: named.pop(k) for k in OUTPUT_FLAGS if k in named}
    return named, flags


def precomputed(model: nn.Module, values: dict[str, Any]) -> list[str]:
    """Add to ``values`` what a model computes from its inputs in Python; returns the new names.

    Multimodal models derive positions and window indices from the sizes of their images in loops
    that no graph holds. transformers computes them beforehand; callers then pass them as well.
    """
    exporters = _exporters()
    known = list(values)
    exporters.utils.precompute_export_inputs(model, values)
    return [name for name in values if name not in known]


def register_caches(models: list[nn.Module]) -> None:
    """Let caches of keys and values be taken apart and rebuilt, as inputs and as outputs."""
    for model in models:
        _exporters().exporter_dynamo.register_cache_pytrees_for_model(model)


@contextmanager
def tracing_patches(models: list[nn.Module]) -> Iterator[None]:
    """Patches of `transformers.exporters` for the model code that is loaded, undone on exit."""
    exporters = _exporters()
    dynamo, utils = exporters.exporter_dynamo, exporters.utils
    with ExitStack() as stack:
        stack.enter_context(_quiet("transformers.exporters"))
        stack.enter_context(utils.patch_attributes(_loaded_patches(utils)))
        for model in models:
            stack.enter_context(dynamo.reset_model_state(model))
        yield


def _exporters() -> Any:
    try:
        import transformers.exporters.exporter_dynamo
        import transformers.exporters.utils
    except ImportError as error:
        raise MissingDependencyError(
            "capturing a Hugging Face model needs transformers.exporters",
            fix="pip install 'transformers>=5.20'",
        ) from error
    return transformers.exporters


def _loaded_patches(utils: Any) -> list[tuple[Any, str, Any]]:
    """The patches whose owner is imported already; importing every model takes seconds."""
    found = []
    for path, attribute, factory in utils._PATCHES.get("dynamo", ()):
        module = next((m for m in _prefixes(path) if m in sys.modules), None)
        if module is None or (path.startswith("transformers.models.") and module.count(".") < 3):
            continue
        owner = utils.import_dotted_path(path, missing_ok=True)
        if owner is not None:
            found.append((owner, attribute, factory))
    return found


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
