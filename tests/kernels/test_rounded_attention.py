"""Attention on operands rounded to half precision, by torch's kernels and in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels import rounded_attention as module
from graphopt.kernels.rounded_attention import _added as added
from graphopt.kernels.rounded_attention import cast_before, half_attention, rounded_attention

ROWS, COLUMNS = 40, 50
SEEN = torch.ones(ROWS, COLUMNS, dtype=torch.bool).tril(5)
HIDDEN = SEEN & (torch.arange(ROWS) != 3)[:, None]
FAR = -0.2 * (torch.arange(ROWS)[:, None] - torch.arange(COLUMNS)).abs().float()
LEAST = torch.finfo(torch.float32).min
PADDED = (torch.arange(COLUMNS) < torch.tensor([COLUMNS, 9])[:, None])[:, None, None]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.2},
    "causal": {"is_causal": True},
    "seen": {"mask": SEEN},
    "hidden row": {"mask": HIDDEN},
    "hidden row, added": {"mask": torch.where(HIDDEN, 0.0, -torch.inf)},
    "row at the least number": {"mask": torch.where(HIDDEN, 0.0, LEAST)},
    "added": {"mask": FAR},
    "mask of a batch": {"mask": PADDED},
    "mask of a batch, expanded": {"mask": PADDED.expand(2, 1, ROWS, COLUMNS)},
    "mask of heads": {"mask": FAR * torch.arange(4.0)[:, None, None]},
    "grouped": {"groups": 2},
    "grouped, masked": {"groups": 2, "mask": SEEN},
    "grouped, mask of heads": {"groups": 2, "mask": FAR * torch.arange(4.0)[:, None, None]},
    "one head of keys": {"groups": 1, "is_causal": True},
    "few rows": {"rows": 1},
    "few rows, masked": {"rows": 1, "mask": PADDED},
    "few rows, one hidden": {"rows": 5, "mask": HIDDEN[:5]},
    "more rows than columns": {"rows": 60, "is_causal": True},
}


def operands(rows: int = ROWS, groups: int = 4, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 4, rows, 8), (2, groups, COLUMNS, 8), (2, groups, COLUMNS, width)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
    return q, k, v


def case(name: str) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    given = dict(CASES[name])
    mask, causal, scale = (given.pop(n, None) for n in ("mask", "is_causal", "scale"))
    return operands(**given), (mask, bool(causal), scale)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Tensor:
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), wide, is_causal=causal, scale=scale, enable_gqa=True
    )


def half(
    given: Any,
    mask: Any = None,
    causal: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    side_by_side: bool = True,
) -> Tensor:
    return half_attention(*given, *added(mask, dtype), causal, scale, dtype, side_by_side)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("most", [1 << 20, 9000, 600], ids=["at once", "by example", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_in_bfloat16(
    name: str, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", most)
    given, (mask, causal, scale) = case(name)
    factor = 8**-0.5 if scale is None else scale
    cast = [t.to(dtype) for t in given]
    made = half(cast, mask, causal, factor)
    assert made.dtype == dtype
    assert off(made, exact(*cast, mask, causal, scale)) < 9e-3
    if "hidden" in name:
        assert (made[:, :, 3] == 0).all()


@pytest.mark.parametrize("most", [1 << 20, 9000, 600], ids=["at once", "by example", "in pieces"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_in_float32_rounds_nothing(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a mistake of a thousandth is seen."""
    monkeypatch.setattr(module, "MOST", most)
    given, (mask, causal, scale) = case(name)
    factor = 8**-0.5 if scale is None else scale
    made = half(given, mask, causal, factor, torch.float32, side_by_side=False)
    assert off(made, exact(*given, mask, causal, scale)) < 1e-6


def test_values_of_another_width_are_left_to_torch() -> None:
    given = operands(width=5)
    made = rounded_attention(*given, None, False, None, False, "bfloat16")
    assert made.shape[3] == 5 and off(made, exact(*given, None, False, None)) < 9e-3


@pytest.mark.parametrize("is_fast", [True, False], ids=["own", "torch's"])
@pytest.mark.parametrize("name", CASES)
def test_the_operator(name: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_fast", lambda _: is_fast)
    given, (mask, causal, scale) = case(name)
    wanted = exact(*given, mask, causal, scale)
    for operator in (rounded_attention, cast_before):
        made = operator(*given, mask, causal, scale, True, "bfloat16")
        assert made.dtype == torch.float32
        assert off(made, wanted) < 9e-3
    few = name.startswith("few rows") and is_fast
    assert (
        off(rounded_attention(*given, mask, causal, scale, True, "bfloat16"), wanted) < 1e-6
    ) is few


@pytest.mark.parametrize("name", CASES)
def test_float16_is_nearer(name: str) -> None:
    given, (mask, causal, scale) = case(name)
    made = rounded_attention(*given, mask, causal, scale, True, "float16")
    assert off(made, exact(*given, mask, causal, scale)) < 1.2e-3


def test_strided_operands() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands())
    made = half((q, k, v), scale=8**-0.5)
    again = half(operands(), scale=8**-0.5)
    assert torch.equal(made, again)
    assert made.stride() == q.stride() == F.scaled_dot_product_attention(q, k, v).stride()


def test_nothing_is_shared_between_calls() -> None:
    given = operands()
    first = half(given)
    kept = first.clone()
    half([2 * t for t in given])
    assert torch.equal(first, kept)


def test_inference_mode_leaves_nothing_behind() -> None:
    module._spaces.__dict__.clear()
    given = operands()
    with torch.inference_mode():
        first = half(given, SEEN)
    with torch.no_grad():
        again = half(given, SEEN)
    assert torch.equal(first, again)


def test_no_rows_and_no_examples() -> None:
    q, k, v = operands()
    assert half((q[:0], k[:0], v[:0])).shape[0] == 0
    assert half((q[:, :, :0], k, v)).numel() == 0


def test_float64_operands_are_rounded_and_nothing_else_is() -> None:
    q, k, v = (t.double() for t in operands())
    made = rounded_attention(q, k, v, None, False, None, False, "bfloat16")
    low = [t.bfloat16().double() for t in (q, k, v)]
    assert made.dtype == torch.float64
    assert torch.equal(made, F.scaled_dot_product_attention(*low))
    plain = rounded_attention(q, k, v, None, False, None, False, "none")
    assert torch.equal(plain, F.scaled_dot_product_attention(q, k, v))


def test_gradients_are_those_of_rounded_operands() -> None:
    given = [t.requires_grad_() for t in operands()]
    wide = [t.detach().bfloat16().double().requires_grad_() for t in given]
    made = rounded_attention(*given, None, True, None, False, "bfloat16")
    gradients = torch.autograd.grad(made.sin().sum(), given)
    wanted = torch.autograd.grad(
        F.scaled_dot_product_attention(*wide, is_causal=True).sin().sum(), wide
    )
    for one, other in zip(gradients, wanted, strict=True):
        assert off(one, other) < 8e-3


def test_what_it_cannot_do_is_an_error() -> None:
    q, k, v = operands()
    with pytest.raises(TypeError, match="int64"):
        rounded_attention(q.long(), k, v, None, False, None, False, "bfloat16")
    with pytest.raises(ValueError, match="'int8' are not none, bfloat16 or float16"):
        rounded_attention(q, k, v, None, False, None, False, "int8")


def test_it_is_registered_as_operators_are() -> None:
    given = (*operands(), None, None, False, 1.0, torch.bfloat16, True)
    torch.library.opcheck(half_attention, given, test_utils=("test_schema", "test_faketensor"))
