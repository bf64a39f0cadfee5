"""What a quantized weight is stored as: number format, bits, groups, zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Format(NamedTuple):
    """What a number format allows. ``group`` is the one group size that its definition has."""

    bits: tuple[int, ...]
    grouped: bool = True
    group: int | None = None
    zeros: bool = False


FORMATS = {
    "int": Format((2, 3, 4, 6, 8), zeros=True),
    "nf4": Format((4,)),
    "fp4": Format((4,)),
    "fp8": Format((8,), grouped=False),
    "mxfp4": Format((4,), group=32),
    "nvfp4": Format((4,), group=16),
}


@dataclass(frozen=True)
class Scheme:
    """How a weight ``(N, K)``, K inputs of each of N output channels, is stored.

    A number is ``(code - zero) * scale``, or ``table[code] * scale`` for formats with a table;
    scale and zero belong to a group of ``group_size`` neighbours along K.

    Attributes:
        bits: of a code. ``int`` has 8, 6, 4, 3 and 2, ``fp8`` has 8, the others have 4.
        dtype: ``"int"``; ``"nf4"`` (Dettmers et al. 2023, "QLoRA", section 3 and appendix E);
            ``"fp4"``, the E2M1 numbers; ``"fp8"``, E4M3 numbers with a scale per output channel;
            ``"mxfp4"``, E2M1 with groups of 32 and scales that are powers of two in E8M0 (OCP
            Microscaling Formats specification 1.0, section 5); ``"nvfp4"``, E2M1 with groups of
            16, scales in E4M3, and one float32 for the tensor (NVIDIA, "Introducing NVFP4", 2025).
        group_size: divides K. None is one group per output channel, or the group of a format that
            has one of its own.
        symmetric: no zero points. Only ``int`` has zero points.

    Raises:
        ValueError: the fields do not go together; the message says what does.
    """

    bits: int = 8
    dtype: str = "int"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(FORMATS)}")
        if self.bits not in self.format.bits:
            can = ", ".join(map(str, self.format.bits))
            raise ValueError(f"{self.dtype} has {can} bits, not {self.bits}")
        if not (self.symmetric or self.format.zeros):
            raise ValueError(f"{self.dtype} has no zero points: symmetric=True, or dtype='int'")
        self._check_group()

    def _check_group(self) -> None:
        own, size = self.format.group, self.group_size
        if own is not None and size is None:
            object.__setattr__(self, "group_size", own)
        elif own is not None and size != own:
            raise ValueError(f"{self.dtype} has groups of {own}, not {size}: leave group_size out")
        elif size is not None and not self.format.grouped:
            raise ValueError(f"{self.dtype} has a scale per output channel: group_size=None")
        elif size is not None and size < 1:
            raise ValueError(f"group_size is {size}; it is positive, or None for output channels")

    @property
    def arguments(self) -> tuple[int, str, int | None, bool]:
        """The fields, in the order in which the operators take them."""
        return self.bits, self.dtype, self.group_size, self.symmetric

    @property
    def format(self) -> Format:
        return FORMATS[self.dtype]

    @property
    def packed(self) -> bool:
        """Whether several codes share a byte."""
        return self.bits < 8

    @property
    def offset(self) -> int:
        """What is added to a signed code before it is packed: ``2 ** (bits - 1)``, or 0."""
        return 1 << self.bits - 1 if self.dtype == "int" and self.packed else 0

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code of ``int``."""
        half = 1 << self.bits - 1
        return -half, half - 1

    def groups(self, width: int) -> int:
        """Groups in a row of K = ``width`` numbers.

        Raises:
            ValueError: the group size does not divide K; the message names the nearest that do.
        """
        if width < 1:
            raise ValueError("a weight without inputs (K = 0) has nothing to quantize")
        size = self.group_size or width
        if width % size == 0:
            return width // size
        if self.format.group is not None:
            raise ValueError(
                f"{self.dtype} has groups of {size}, which do not divide K = {width}: "
                "take another dtype for this weight"
            )
        near = " and ".join(map(str, _nearest_divisors(width, size)))
        raise ValueError(
            f"group_size {size} does not divide K = {width}: the nearest that do are {near}; "
            "None takes one group per output channel"
        )

    def row_codes(self, width: int) -> int:
        """Elements of a stored row of K = ``width`` codes."""
        return -(-width * self.bits // 8) if self.packed else width


def _nearest_divisors(width: int, size: int) -> list[int]:
    """The largest divisor below ``size``, and the smallest above."""
    below = next(d for d in range(min(size, width), 0, -1) if width % d == 0)
    above = [d for d in range(size, width + 1) if width % d == 0][:1]
    return sorted({below, *above})
