"""Small models for traps, and how the optimized one is held to eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphopt

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)


class One(nn.Module):
    """One input under a name, for dynamic shapes."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Net(nn.Module):
    """A forward function with the modules, parameters and buffers that it uses."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            plain = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if plain else setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def fresh(structure: Any) -> Any:
    """Copies that lie in memory as the originals do; gradients start anew."""
    memo: dict[int, Any] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copy.deepcopy(tensor.detach(), memo).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, copied, structure)


def optimized(model: nn.Module, *inputs: Any, training: bool = False, **options: Any) -> Any:
    """The model compiled on copies of the inputs; compared with eager on the inputs twice.

    The second call sees the buffers that the first one left.
    """
    options = {"passes": "exact", "measure": False} | options
    twin = copy.deepcopy(model.train(training))
    fast = graphopt.compile(model, example_inputs=fresh(inputs), **options)
    assert fast.report.verified
    for _ in range(2):
        equal_to(twin, fast, *inputs)
    return fast


def equal_to(eager: nn.Module, fast: nn.Module, *inputs: Any) -> None:
    """The same values, kinds and strides; and the same values in the inputs afterwards."""
    given, taken = fresh(inputs), fresh(inputs)
    wanted, made = eager(*given), fast(*taken)
    for a, b in zip(
        pytree.tree_leaves((wanted, given)), pytree.tree_leaves((made, taken)), strict=True
    ):
        torch.testing.assert_close(b, a, equal_nan=True, check_stride=a.numel() > 0, **close(a))


def close(value: Tensor) -> dict[str, float]:
    limits = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    limit = limits.get(value.dtype, 1e-6 if value.is_complex() else 0.0)
    return {"rtol": limit, "atol": limit}


def rules(fast: Any) -> list[str]:
    return [applied.rule for applied in fast.report.applied]


def reasons(fast: Any) -> str:
    return "\n".join(f"{m.rule}: {m.reason}" for m in fast.report.missed)


def settled(norm: Any) -> Any:
    """A batch norm that has seen data."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight, 1.0)
    nn.init.normal_(norm.bias)
    return norm


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def hardswish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def soft(x: Tensor) -> Tensor:
    powers = (x - x.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2, -1) @ v


def self_attend(x: Tensor) -> Tensor:
    heads = x.unsqueeze(1)
    return attend(heads, heads, heads).squeeze(1)


COMPOSITES = {
    "RecognizeSilu": silu,
    "RecognizeGelu": gelu,
    "RecognizeHardswish": hardswish,
    "RecognizeRMSNorm": rms,
    "RecognizeLayerNorm": layer,
    "RecognizeSoftmax": soft,
    "RecognizeAttention": self_attend,
}
