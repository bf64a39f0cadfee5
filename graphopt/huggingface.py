"""Tracing Hugging Face models: their caches as pytrees, their export patches, their output flags."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

OUTPUT_FLAGS = (
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_loss",
)


@contextmanager
def tracing_patches(model: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Patches of `transformers.exporters`, undone on exit; moves output flags out of ``values``.

    Flags such as ``use_cache`` become part of the configuration during the trace, so that the
    captured program does not demand them again at every call.
    """
    from transformers.exporters import exporter_dynamo as dynamo
    from transformers.exporters.utils import apply_patches, precompute_export_inputs

    flags = {k: values.pop(k) for k in OUTPUT_FLAGS if k in values}
    log = logging.getLogger("transformers.exporters")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        precompute_export_inputs(model, values)
        dynamo.register_cache_pytrees_for_model(model)
        with (
            apply_patches("dynamo"),
            dynamo.reset_model_state(model),
            dynamo.patch_model_config(model, flags),
            dynamo.patch_forward_signature(model, values),
        ):
            yield
    finally:
        log.setLevel(level)
