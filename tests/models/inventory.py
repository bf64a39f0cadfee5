"""Every module that torch itself tests, with torch's own sample inputs.

The samples come from ``torch.testing._internal.common_modules.module_db``, which needs the package
``expecttest``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from models.entry import perturb, seeded

# Their samples hold float64 random numbers, which the modules refuse beside a float32 input.
UNUSABLE = {"nn.FractionalMaxPool2d", "nn.FractionalMaxPool3d"}


@dataclass(frozen=True)
class Sample:
    """A module in train or eval mode and one way to call it: ``module(*args, **kwargs)``."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def samples(limit: int = 2) -> Iterator[Sample]:
    """float32 CPU samples: the first ``limit`` of each module, in eval and in training mode.

    Lazy modules are materialised by one call; equal calls of this function give equal samples.
    """
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if torch.float32 not in info.dtypes or info.name in UNUSABLE:
            continue
        for training in (False, True):
            yield from _of(info, training, limit)


def _of(info: Any, training: bool, limit: int) -> Iterator[Sample]:
    mode = "train" if training else "eval"
    with seeded("samples", info.name, mode):
        listed = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
        )
    usable = (given for given in listed if given.forward_input is not None)
    for index, given in enumerate(islice(usable, limit)):
        with seeded("weights", info.name, mode, index) as source:
            made = given.constructor_input
            module = info.module_cls(*made.args, **made.kwargs)
            module.train(training)
            args, kwargs = given.forward_input.args, given.forward_input.kwargs
            if info.is_lazy:
                with torch.no_grad():
                    module(*args, **kwargs)
            perturb(module, source)
        yield Sample(f"{info.name}[{mode},{index}]", module, args, kwargs)
