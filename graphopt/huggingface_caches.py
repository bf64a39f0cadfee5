"""What caches of Hugging Face models are called: in calls, and in ONNX files, as optimum names them
(``optimum/exporters/onnx/base.py``)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the cache, from 5.24 on and before."""

CAUSAL = "model.onnx"
"""The file of a causal language model, for prompts and tokens alike."""
PAST, PRESENT = "past_key_values", "present"
"""How names of keys and values start, among inputs and among outputs."""


def filled_layer(keys: Tensor, values: Tensor) -> Any:
    """A layer of a cache that holds these very tensors."""
    layer = importlib.import_module("transformers.cache_utils").DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
