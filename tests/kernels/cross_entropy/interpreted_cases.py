"""The Triton kernels under Triton's interpreter: run by `test_cross_entropy_interpreted`.

Apart from other tests, in a process that has ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from cross_entropy_calls import (
    ALONE_AND_IN_PAIRS,
    LIMITS,
    SIZES,
    Call,
    assert_as_dense,
    assert_close,
    assert_rows_as_dense,
    make,
    weighted,
)
from interpreting import scalars_of_one_number  # noqa: F401 - a fixture of all cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.kernels.cross_entropy import cross_entropy_rows, launch, reference
from graphopt.kernels.cross_entropy.operands import Cotangents, Head
from graphopt.kernels.filtering import kept

assert os.environ.get("TRITON_INTERPRET") == "1"
LIMITS[torch.bfloat16] = 8e-3
"""The interpreter cuts bfloat16 off where a GPU rounds it."""


@pytest.fixture(autouse=True)
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are about runs by Triton or not at all."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "forward", refuse)
    monkeypatch.setattr(reference, "backward", refuse)


@pytest.fixture
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a tile and a half, so that there are several and all are cut."""
    monkeypatch.setattr(launch, "panel_width", lambda *_: 96)


class Sizes(TorchDispatchMode):
    """Notes the bytes of the tensors that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, list | tuple) else [made]
        self.found += [t.nbytes for t in tensors if isinstance(t, Tensor)]
        return made


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_summaries_and_gradients(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_rows_as_dense(make(*sizes, ("bias", "softcap", "ignore")).to(dtype))


@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids="-".join)
def test_options_alone_and_in_pairs(options: tuple[str, ...]) -> None:
    assert_as_dense(make(5, 123, 33, options))


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_several_panels(dtype: torch.dtype) -> None:
    assert_rows_as_dense(make(123, 257, 33, ("bias", "ignore")).to(dtype))


@pytest.mark.parametrize("spans", [1, 3, 8])
def test_several_spans_of_classes(spans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PROGRAMS", spans)
    assert_rows_as_dense(make(5, 2100, 7, ("bias",)))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_peaked_logits(dtype: torch.dtype) -> None:
    assert_as_dense(make(37, 257, 64, ("smoothing", "z_loss", "entropy"), scale=20.0).to(dtype))


def test_gradients_of_a_bfloat16_weight_are_summed_in_float32() -> None:
    """The slopes of 2048 rows are each far below the rounding of their sum."""
    call = make(2048, 3, 2).to(torch.bfloat16)
    with torch.no_grad():
        call.hidden.fill_(1.0)
        call.weight.zero_()
    call.target.zero_()
    (found,) = torch.autograd.grad(call.losses().sum(), call.weight)
    slope = torch.tensor([-2 / 3, 1 / 3, 1 / 3], dtype=torch.float64) * 2048
    assert_close([found], [slope[:, None].expand(3, 2)], 4e-3)


@pytest.mark.usefixtures("narrow_panels")
def test_gradients_of_bfloat16_hidden_are_summed_in_float32() -> None:
    """Over 22 panels, where rounding after each would be off by 1 %."""
    call = make(5, 2100, 2).to(torch.bfloat16)
    with torch.no_grad():
        call.weight.fill_(1.0)
    _, _, total, _, _ = call.rows()
    (found,) = torch.autograd.grad(total.sum(), call.hidden)
    assert_close([found], [torch.full((5, 2), 2100.0)], 4e-3)


def test_equal_logits_give_the_first_class() -> None:
    """Whole numbers, so that no sum rounds; copies in one tile, in one span and in others."""
    call = make(5, 2100, 7, scale=10.0)
    with torch.no_grad():
        call.hidden.round_()
        call.weight.copy_(call.weight[:50].round().repeat(42, 1))
    assert call.rows()[4].equal(call.dense_rows()[4])


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("options", [(), ("bias",), ("softcap", "ignore", "entropy", "turned")])
def test_a_filter_that_drops_nothing(options: tuple[str, ...]) -> None:
    call = replace(make(123, 257, 33, options), filter_threshold=1e-30)
    with kept() as shares:
        assert_as_dense(call)
    assert all(s.item() == 1.0 for s in shares)


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("options", [(), ("bias",)])
def test_a_filter_drops_tiles_of_small_slopes(options: tuple[str, ...]) -> None:
    """Classes that are likely lie 7 apart; sorted, they share tiles."""
    call = _peaked(make(123, 1000, 33, options))
    with kept() as shares:
        assert_as_dense(replace(call, filter_threshold=2**-12), limit=4e-3)
    assert len(shares) == 1
    assert 0.1 < shares[0].item() < 0.4


def test_a_filter_above_all_but_the_targets_is_no_longer_exact() -> None:
    call = replace(make(5, 1000, 33), filter_threshold=0.2)
    with pytest.raises(AssertionError):
        assert_as_dense(call, limit=4e-3)


def test_a_filter_keeps_nothing_of_rows_that_are_ignored() -> None:
    call = replace(make(37, 257, 33, ("bias", "ignore")), filter_threshold=2**-12)
    call.target.fill_(2)
    with kept() as shares:
        found = torch.autograd.grad(call.losses().sum(), call.leaves)
    assert [s.item() for s in shares] == [0.0]
    assert all(not g.any() for g in found)


def _peaked(call: Call) -> Call:
    """Every seventh class likely, the others hardly; targets are likely."""
    with torch.no_grad():
        call.hidden[:, 0] = 4.0
        call.weight[:, 0] = -5.0
        call.weight[::7, 0] = 0.0
    return replace(call, target=call.target // 7 * 7)


@pytest.mark.parametrize(
    ("wanted", "products"), [([True, False, False], 1), ([False, True, True], 1), ([True] * 3, 2)]
)
def test_products_of_frozen_operands_are_left_out(
    wanted: list[bool], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, seen, real = make(37, 123, 7, ("bias",)), [], launch._product
    monkeypatch.setattr(launch, "_product", lambda *a, **k: (seen.append(1), real(*a, **k)))
    for tensor, asked in zip((call.hidden, call.weight, call.bias), wanted, strict=True):
        tensor.requires_grad_(asked)
    assert_as_dense(call)
    assert len(seen) == products


def test_a_second_backward_pass_is_the_same_to_the_bit() -> None:
    call = make(37, 257, 33, ("bias", "softcap"))
    loss = call.losses().sum()
    once = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(once, twice, strict=True))


def test_a_second_derivative() -> None:
    call = make(5, 123, 7, ("smoothing",))
    exact, found = call.to(torch.float64), []
    for loss, leaves in ((call.losses(), call.leaves), (exact.dense()[0], exact.leaves)):
        first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_close(*found, 1e-5)


def test_all_rows_ignored() -> None:
    call = make(5, 123, 7, ("bias", "ignore", "smoothing", "z_loss"))
    call.target.fill_(2)
    losses = call.losses()
    assert not losses.any()
    assert all(not g.any() for g in torch.autograd.grad(losses.sum(), call.leaves))


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_no_rows(threshold: float) -> None:
    call = replace(make(0, 123, 7, ("bias",)), filter_threshold=threshold)
    found, wanted = call.rows(), call.dense_rows()
    assert [(t.shape, t.numel()) for t in found] == [(t.shape, 0) for t in wanted]
    gradients = torch.autograd.grad(call.losses().sum(), call.leaves)
    assert [g.shape for g in gradients] == [t.shape for t in call.leaves]
    assert all(not g.any() for g in gradients)


def test_classes_that_a_bias_rules_out() -> None:
    call = make(37, 257, 7, ("bias",))
    with torch.no_grad():
        call.bias[:100] = -torch.inf
    call = replace(call, target=call.target.clamp(min=100))
    lse, own, _, entropies, best = call.rows()
    z = call.to(torch.float64).logits()[:, 100:]
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    assert_close([lse, entropies], [z.logsumexp(1), entropy], 1e-5)
    assert best.equal(z.argmax(1) + 100)
    found = torch.autograd.grad(weighted([lse, own, entropies]), call.leaves)
    assert all(g.isfinite().all() for g in found)
    assert not found[1][:100].any()


def test_an_infinite_logit() -> None:
    """As in ``logsumexp``: inf, whose slope is NaN at that class and zero at the others."""
    call = make(37, 257, 7, ("bias",))
    with torch.no_grad():
        call.bias[200] = torch.inf
    lse = call.rows()[0]
    assert lse.equal(torch.full_like(lse, torch.inf))
    (slope,) = torch.autograd.grad(lse.sum(), call.bias)
    assert slope.isnan().nonzero().flatten().tolist() == [200]
    assert not slope.nan_to_num().any()


def test_targets_out_of_range_are_refused() -> None:
    call = make(5, 123, 7)
    call.target[3] = 123
    with pytest.raises(IndexError, match="row 3: target 123 is out of range for 123"):
        call.losses()


def test_rows_further_apart_than_32_bits_count() -> None:
    """The last row lies 2^31 numbers behind the first; pages between are never touched."""
    apart, rows = 2**29, 5
    store = torch.empty(apart * (rows - 1) + 7, dtype=torch.bfloat16)
    far = store.as_strided((rows, 7), (apart, 1))
    call = make(rows, rows, 7).to(torch.bfloat16)
    far.copy_(call.hidden.detach())
    tensors = (far, call.weight.detach(), call.target)
    assert_close(cross_entropy_rows(*tensors)[:2], call.rows()[:2], 1e-6)
    turned = (call.hidden.detach(), far, call.target)
    plain = (call.hidden.detach(), call.hidden.detach(), call.target)
    assert_close(cross_entropy_rows(*turned)[:2], cross_entropy_rows(*plain)[:2], 1e-6)


@pytest.mark.usefixtures("narrow_panels")
def test_the_largest_tensor_is_a_panel_or_a_gradient() -> None:
    call = make(96, 1100, 7)
    head = Head(call.hidden.detach(), call.weight.detach(), call.target)
    with Sizes() as seen, torch.no_grad():
        found = launch.forward(head, True, True, True)
        given = Cotangents(*found[:4])
        launch.backward(head, found.lse, found.entropy, given, [True] * 3, 0.0)
    assert max(seen.found) == 4 * 96 * 96
