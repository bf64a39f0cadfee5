"""Modules put in place inside transformers' own loader, before it loads the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

METHOD = "graphopt"


@cache
def _classes() -> tuple[type[Any], type[Any]]:
    """The config and the quantizer, known to transformers by the method's name."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Places(QuantizationConfigMixin):
        """What stands in for which module."""

        def __init__(self, modules: Mapping[str, nn.Module], **_: Any) -> None:
            self.quant_method: Any = METHOD
            self.modules = modules

        def __deepcopy__(self, memo: dict[int, Any]) -> Places:
            return self

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    class Quantizer(HfQuantizer):
        """Puts the modules in place."""

        requires_calibration = False

        def __init__(self, config: Any, **named: Any) -> None:
            super().__init__(config, **named)
            self.pre_quantized = True  # tensors are loaded as they are

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            for name, module in self.quantization_config.modules.items():
                model.set_submodule(name, module)
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            """No: `graphopt.export_huggingface` writes what other programs read."""
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    register_quantization_config(METHOD)(Places)
    register_quantizer(METHOD)(Quantizer)
    return Places, Quantizer


def places(modules: Mapping[str, nn.Module]) -> Any:
    """A ``quantization_config`` under which transformers loads into ``modules``, by their names."""
    return _classes()[0](modules)
