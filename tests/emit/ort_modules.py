"""Modules that are compiled for ONNX Runtime, and an operator that parts their regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.emit.ort.call import OrtRegion
from graphopt.report import Partition, TorchPart


@torch.library.custom_op("ort_tests::mirrored", mutates_args=())
def mirrored(x: Tensor) -> Tensor:
    """Rows in the other order: ONNX has no translation of it."""
    return x.flip(1)


@mirrored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    options = {"measure": False, "strict": True, **options}
    return graphopt.compile(model.eval(), example_inputs=inputs, target="onnxruntime", **options)


def in_regions(module: nn.Module) -> list[OrtRegion]:
    return [m for m in module.modules() if isinstance(m, OrtRegion)]


def part(found: Partition, word: str) -> TorchPart:
    return next(p for p in found.torch if word in p.reason)


def check(fast: nn.Module, model: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
