"""What layouts share: the tensors that they want, checks on them, and the order of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graphopt.errors import LoadError
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static

Shape = tuple[int, ...]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HELD_BITS = (2, 3, 4, 6, 8)
DAMAGED = "get an undamaged copy, or the config.json that belongs to the weights"


class Wanted(NamedTuple):
    """A tensor of a layer: the shapes and dtypes it may have, and whether it may be missing."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Found(NamedTuple):
    """A tensor in a file, by its header."""

    shape: Shape
    dtype: torch.dtype | None
    file: str


class Linear(NamedTuple):
    """A quantized linear layer.

    Attributes:
        order: ``(K,)``, int64, or None: column ``k`` of the weight takes input ``order[k]``.
        activations: as ``graphopt::quantized_linear`` takes them.
        static: what static ones are quantized by.
    """

    weight: QuantizedWeight
    order: Tensor | None = None
    activations: str = "none"
    static: Static | None = None


class Layout(Protocol):
    """How a file stores one linear layer of N outputs and K inputs."""

    @property
    def text(self) -> str:
        """The layout in words, such as ``GPTQ, 4 bits, groups of 128``."""

    def wanted(self, outputs: int, inputs: int) -> dict[str, Wanted]:
        """The tensors of a layer, by the last part of their names.

        Raises:
            ValueError: a layer of this size cannot be held; the message says why.
        """

    def read(self, raw: Mapping[str, Tensor], outputs: int, inputs: int) -> Linear:
        """The layer of its tensors, which have the shapes and dtypes that are wanted.

        Raises:
            ValueError: the numbers in them make no sense; the message names the tensor.
        """


def check_found(
    found: Mapping[str, Found], wanted: Mapping[str, Wanted], layer: str, text: str
) -> None:
    """Refuse a layer whose tensors are missing, or of other shapes or dtypes than are wanted.

    Raises:
        LoadError: names the file, the tensor, and what it should be.
    """
    file = next(iter(found.values())).file
    for leaf, want in wanted.items():
        held = found.get(leaf)
        if held is None and not want.optional:
            raise LoadError(
                f"the layer {layer} ({text}) lacks {leaf}: the file holds {', '.join(found)}",
                where=f"{file}, tensor {layer}.{leaf}",
                fix=DAMAGED,
            )
        if held is not None and (held.shape not in want.shapes or held.dtype not in want.dtypes):
            shapes = " or ".join(map(str, map(list, dict.fromkeys(want.shapes))))
            kinds = " or ".join(str(d).removeprefix("torch.") for d in want.dtypes)
            raise LoadError(
                f"{leaf} of a layer ({text}) is {str(held.dtype).removeprefix('torch.')} "
                f"{list(held.shape)}; it should be {kinds} {shapes}",
                where=f"{held.file}, tensor {layer}.{leaf}",
                fix=DAMAGED,
            )


def held_bits(bits: int) -> int:
    """The smallest width of `Scheme` that holds codes of ``bits`` bits."""
    return next(held for held in HELD_BITS if held >= bits)


def order_of(g_idx: Tensor, groups: int) -> Tensor | None:
    """The order in which inputs stand group by group; None where they do already.

    Args:
        g_idx: ``(K,)``: the group of each input.

    Raises:
        ValueError: a group is out of range, or has not as many inputs as the others.
    """
    index = g_idx.to(torch.int64)
    size = len(index) // groups
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise ValueError(
            f"g_idx has groups {int(index.min())} to {int(index.max())}; there are {groups}"
        )
    if torch.equal(index, torch.arange(len(index)) // size):
        return None
    counts = torch.bincount(index, minlength=groups)
    if (odd := torch.nonzero(counts != size)).numel():
        group = int(odd[0])
        raise ValueError(f"g_idx gives group {group} {int(counts[group])} inputs instead of {size}")
    return torch.argsort(index, stable=True)


def finished(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    g_idx: Tensor | None,
    activations: str = "none",
) -> Linear:
    """A layer of integer codes ``(N, K)``, int8, and scales and signed zeros ``(N, G)``."""
    _check_finite(scales)
    scheme = Scheme(held_bits(bits), "int", group_size, zeros is None)
    order = None if g_idx is None else order_of(g_idx, scales.shape[1])
    codes = codes if order is None else codes[:, order]
    zeros = None if zeros is None else zeros.to(scales.dtype).contiguous()
    weight = QuantizedWeight.from_codes(codes, scales.contiguous(), zeros, scheme)
    return Linear(weight, order, activations)


def _check_finite(scales: Tensor) -> None:
    if not scales.isfinite().all():
        raise ValueError("its scales hold NaN or infinity")
