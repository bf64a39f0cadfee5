"""What the zoo says about one model: how to build it, call it, train it, and what may vary."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim

Inputs = dict[str, Any]
Axes = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    ``example(batch, seq)`` gives keyword arguments for ``forward``; equal sizes give equal values.
    ``dynamic_axes`` maps an input to ``{dim: axis name}`` for the dims that may change, or to a
    dict or list of such where the input has parts; what shares an axis name shares its size.
    ``label(inputs)`` adds what makes the model return a loss.
    ``seq`` is the size of the model's second axis (tokens, samples, pixels), 0 where it is fixed.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    example: Callable[[int, int], Inputs]
    dynamic_axes: Axes
    label: Callable[[Inputs], Inputs] | None = None
    label_axes: Axes = field(default_factory=dict)
    seq: int = 0
    unseen_seq: int = 0

    @property
    def has_loss(self) -> bool:
        return self.label is not None

    def inputs(self, batch: int = 2, seq: int | None = None) -> Inputs:
        return self.example(batch, self.seq if seq is None else seq)

    def unseen(self) -> Inputs:
        """Inputs at a second size: every dynamic axis differs from ``inputs()``."""
        return self.example(3, self.unseen_seq)

    def train_inputs(self, batch: int = 2, seq: int | None = None) -> Inputs:
        if self.label is None:
            raise ValueError(f"{self.name} returns no loss")
        inputs = self.inputs(batch, seq)
        return inputs | self.label(inputs)

    def dynamic_shapes(self, inputs: Inputs, dim: Any = Dim.DYNAMIC) -> dict[str, Any]:
        """``dynamic_shapes`` of ``torch.export`` for ``inputs``; ``dim=None`` names the dims."""
        axes = {**self.dynamic_axes, **self.label_axes}
        named: dict[str, Any] = {}

        def resolve(spec: Any) -> Any:
            if isinstance(spec, list):
                return [resolve(part) for part in spec]
            if isinstance(spec, str):
                return named.setdefault(spec, Dim(spec)) if dim is None else dim
            return {key: resolve(part) for key, part in spec.items()}

        return {key: resolve(axes[key]) if key in axes else None for key in inputs}


def generator(*key: object) -> torch.Generator:
    """A generator whose stream depends on ``key`` alone, equal in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


@contextmanager
def seeded(*key: object) -> Iterator[torch.Generator]:
    """Inside, the global and the yielded generator both follow ``key``; outside is undisturbed."""
    source = generator(*key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.initial_seed())
        yield source


@torch.no_grad()
def perturb(model: nn.Module, source: torch.Generator) -> nn.Module:
    """Move every parameter off its initial value, in place.

    A norm whose scale is 1 and bias 0, or an attention whose logits are all near 0, hides a wrong
    rewrite. Vectors get noise of scale 0.1, matrices and kernels of about ``fan_in ** -0.5``.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float32)
            parameter.add_(noise.to(parameter.dtype) * _noise_scale(parameter))
    return model


def _noise_scale(parameter: torch.Tensor) -> float:
    if parameter.ndim < 2 or parameter.numel() == 0:
        return 0.1
    gain = 0.5 if parameter.ndim == 2 else 1.0
    return gain * (parameter.numel() / parameter.shape[0]) ** -0.5


@torch.no_grad()
def settle(model: nn.Module, inputs: Inputs, source: torch.Generator) -> nn.Module:
    """Give BatchNorms the statistics of ``inputs``, off by a tenth; return ``model`` in eval mode.

    Statistics of 0 and 1 hide wrong folds, and unrelated ones let deep networks vanish or explode.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    if not norms:
        return model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        mean.add_(0.1 * torch.randn(mean.shape, generator=source))
        var.mul_(1 + 0.1 * torch.randn(var.shape, generator=source))
    return model.eval()


def images(batch: int, side: int, source: torch.Generator) -> torch.Tensor:
    """``(batch, 3, side, side)`` noise around a mean of its own per image and channel.

    Averaging plain noise over an image leaves next to nothing for a classifier to see.
    """
    offset = torch.randn(batch, 3, 1, 1, generator=source)
    return offset + torch.randn(batch, 3, side, side, generator=source)
