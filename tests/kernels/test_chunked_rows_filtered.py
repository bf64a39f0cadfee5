"""``graphopt::chunked_rows`` with gradients that leave out what rounds to nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from heads import (
    CROSS_ENTROPY,
    DISTILLATION,
    HEADS,
    PAIRS,
    PER_ROW,
    SELECTED,
    Z_LOSS,
    Call,
    Head,
    Recorder,
    assert_close,
    error,
    make,
)
from torch import Tensor

from graphopt.kernels import filtering
from graphopt.kernels.chunked_rows import chunked_rows, read
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.chunked_rows.operands import Operands
from graphopt.kernels.chunked_rows.thinning import kept_classes

grad = torch.autograd.grad
BOUND = filtering.THRESHOLD**0.5
"""What is left out of softmax slopes, at most, in the Euclidean norm."""

CHUNK = 4 * 1000 * 50
"""Of 50 rows of 1,000 classes."""


def peaked(head: Head, n: int = 123, v: int = 1000, d: int = 33, chunk_bytes: int = CHUNK) -> Call:
    """Every tenth class likely, the others hardly; targets are likely."""
    call = make(head, n, v, d, chunk_bytes * head.products)
    with torch.no_grad():
        for hidden, weight in zip(call.hidden, call.weight, strict=True):
            hidden /= d**0.5
            hidden[:, 0] = 4.0
            weight[:, 0] = -5.0
            weight[::10, 0] = 0.0
        for tensor in call.rows:
            if not tensor.is_floating_point():
                tensor.copy_(tensor.div(10, rounding_mode="trunc") * 10)
    return replace(call, filter_threshold=filtering.THRESHOLD)


def flat(head: Head) -> Call:
    call = make(head, 123, 257, 33, 4 * 257 * 50 * head.products)
    with torch.no_grad():
        for hidden in call.hidden:
            hidden *= 1e-3
    return replace(call, filter_threshold=filtering.THRESHOLD)


def share_of(call: Call) -> tuple[float, tuple[Tensor, ...]]:
    """The share kept in one backward pass, and its gradients."""
    with filtering.kept() as shares:
        found = call.gradients(call.chunked())
    (share,) = shares
    return share.item(), found


SHARES = {CROSS_ENTROPY: (0.08, 0.11), Z_LOSS: (0.08, 0.11), PAIRS: (0.08, 1.0)}
SHARES |= {PER_ROW: (0.08, 1.0), SELECTED: (0.0, 1.0), DISTILLATION: (0.05, 0.3)}


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 0])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_peaked_logits(head: Head, chunk_bytes: int) -> None:
    call = peaked(head, chunk_bytes=chunk_bytes)
    exact = call.to(torch.float64)
    found, wanted = call.chunked(), exact.dense()
    assert_close(found, wanted, 1e-5)
    share, gradients = share_of(call)
    assert_close(gradients, exact.gradients(wanted), BOUND)
    low, high = SHARES[head]
    assert low <= share <= high


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_flat_logits_keep_all_and_every_bit(head: Head) -> None:
    call = flat(head)
    share, found = share_of(call)
    assert share == 1.0
    plain = replace(call, filter_threshold=0.0)
    assert all(a.equal(b) for a, b in zip(found, call.gradients(plain.chunked()), strict=True))


def test_without_a_threshold_nothing_is_told() -> None:
    call = replace(peaked(CROSS_ENTROPY), filter_threshold=0.0)
    with filtering.kept() as shares:
        found = call.gradients(call.chunked())
    assert not shares
    exact = call.to(torch.float64)
    assert_close(found, exact.gradients(exact.dense()), 1e-5)


def test_some_rows_peaked_and_some_flat() -> None:
    """Rows in the middle keep all classes; those around them do not."""
    call = peaked(CROSS_ENTROPY, n=192, chunk_bytes=4 * 1000 * 192)
    with torch.no_grad():
        call.hidden[0][64:128] = 0.01 * torch.randn(64, 33)
    exact = call.to(torch.float64)
    share, found = share_of(call)
    assert 0.35 < share < 0.42
    assert_close(found, exact.gradients(exact.dense()), BOUND)
    exact_rows = exact.gradients(exact.dense())[0][64:128]
    assert error(found[0][64:128], exact_rows) < BOUND


def test_a_threshold_above_all_but_the_targets_is_no_longer_exact() -> None:
    call = replace(peaked(CROSS_ENTROPY), filter_threshold=0.9)
    exact = call.to(torch.float64)
    share, found = share_of(call)
    errors = map(error, found, exact.gradients(exact.dense()))
    assert share < 0.06
    assert all(e > BOUND for e in errors)


def tailed() -> Call:
    """Nine classes in ten are left out of every row, with 8 % of the mass between them.

    The second feature of all weights is one number, along which the slopes of a row cancel.
    """
    call = peaked(PER_ROW)
    call = replace(call, head=NONE_REDUCED, rows=call.rows[:1], whole=[])
    with torch.no_grad():
        call.hidden[0].mul_(0.05)
        call.hidden[0][:, :3] = torch.tensor([1.0, 0.0, 2.0])
        call.weight[0][:, :3] = torch.tensor([-4.7, 30.0, 0.0])
        call.weight[0][::10, 0] = 0.0
        call.rows[0].clamp_(min=0)
    return call


NONE_REDUCED = Head(
    "cross entropy per row",
    """def body(x, target):
    a = aten.cross_entropy_loss.default(x, target, None, 0)
    return [a], []""",
    lambda x, target: [torch.nn.functional.cross_entropy(x, target, reduction="none")],
    (True,),
    rows=("some",),
)
SIGNS = {
    "losses": torch.linspace(0.5, 1.5, 123),
    "turned": -torch.linspace(0.5, 1.5, 123),
    "either, as of a policy gradient": torch.linspace(-1.0, 1.2, 123),
}


@pytest.mark.parametrize("signs", SIGNS)
def test_what_is_left_out_counts_by_its_sums(signs: str) -> None:
    call = tailed()
    exact, factors = call.to(torch.float64), SIGNS[signs]
    with filtering.kept() as shares:
        mine = grad((call.chunked()[0] * factors).sum(), call.leaves)
    theirs = grad((exact.dense()[0] * factors).sum(), exact.leaves)
    assert shares[0].item() == pytest.approx(0.1)
    assert_close(mine, theirs, BOUND / 4)
    unlikely = torch.arange(1000) % 10 != 0
    assert error(mine[1][unlikely], theirs[1][unlikely]) < 0.2
    assert (mine[0][:, 1].abs() < 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    call = peaked(Z_LOSS).to(dtype)
    exact = call.to(torch.float64)
    share, found = share_of(call)
    assert share < 0.12
    assert [g.dtype for g in found] == [dtype] * len(found)
    assert_close(found, exact.gradients(exact.dense()), BOUND)


def test_autocast() -> None:
    call = peaked(CROSS_ENTROPY)
    exact = call.to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        share, found = share_of(call)
    assert share < 0.12
    assert [g.dtype for g in found] == [torch.float32] * 2
    assert_close(found, exact.gradients(exact.dense()), 2e-2)


@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW], ids=str)
def test_a_second_backward(head: Head) -> None:
    call = peaked(head)
    exact = call.to(torch.float64)
    loss, wanted = call.loss(call.chunked()), exact.gradients(exact.dense())
    for factor in (1.0, 3.0, 1.0):
        found = grad(loss * factor, call.leaves, retain_graph=True)
        assert_close([g / factor for g in found], wanted, BOUND)


def test_a_second_derivative_is_exact() -> None:
    call = peaked(CROSS_ENTROPY, n=12)
    exact, found = call.to(torch.float64), []
    for each, results in ((call, call.chunked()), (exact, exact.dense())):
        first = grad(each.loss(results), each.leaves, create_graph=True)
        found.append(grad(sum(g.square().sum() for g in first), each.leaves))
    assert_close(*found, 1e-4)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_operands(frozen: str) -> None:
    call = peaked(CROSS_ENTROPY)
    getattr(call, frozen)[0].requires_grad_(False)
    exact = call.to(torch.float64)
    share, found = share_of(call)
    assert share < 0.12
    assert len(found) == 1
    assert_close(found, exact.gradients(exact.dense()), BOUND)


def test_a_weight_by_columns() -> None:
    call = peaked(CROSS_ENTROPY)
    turned = call.weight[0].detach().T.contiguous().T.requires_grad_()
    call = replace(call, weight=[turned])
    exact = call.to(torch.float64)
    share, found = share_of(call)
    assert share < 0.12
    assert_close(found, exact.gradients(exact.dense()), BOUND)


def test_no_rows() -> None:
    for head in HEADS:
        call = replace(make(head, 0, 123, 7), filter_threshold=filtering.THRESHOLD)
        share, found = share_of(call)
        assert share == 1.0
        assert all(not g.any() for g in found)


def test_all_rows_ignored() -> None:
    call = peaked(PER_ROW)
    call.rows[0].fill_(-100)
    share, found = share_of(call)
    assert share == 0.0
    assert all(not g.any() for g in found)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(wrong: float) -> None:
    call = peaked(CROSS_ENTROPY)
    with torch.no_grad():
        call.hidden[0][70, 3] = wrong
    exact = call.to(torch.float64)
    mine, theirs = call.gradients(call.chunked()), exact.gradients(exact.dense())
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().equal(b.isfinite())
    others = torch.arange(123) != 70
    assert error(mine[0][others], theirs[0][others]) < BOUND


def test_classes_kept() -> None:
    """By the largest slope of each row, not of all."""
    slope = torch.zeros(3, 100)
    slope[0, 5], slope[0, 6], slope[0, 7] = -1.0, 2**-11, 2**-13
    slope[1, 8], slope[1, 9] = 2**-20, 2**-31
    found = kept_classes(slope, filtering.THRESHOLD)
    assert found is not None
    assert found.tolist() == [5, 6, 8, 9]
    for wrong in (1.0, torch.inf, torch.nan):
        odd = slope.clone()
        odd[2] = wrong
        assert kept_classes(odd, filtering.THRESHOLD) is None
    slope[2, 3] = torch.inf
    assert kept_classes(slope, filtering.THRESHOLD) is None


def test_no_tensor_is_larger_than_a_chunk_or_a_gradient() -> None:
    call = peaked(CROSS_ENTROPY, n=256, v=4100, d=7)
    operands = Operands(call.hidden, call.weight, call.rows, call.whole)
    loop = Loop(read(CROSS_ENTROPY.body), operands, 4 * 4100 * 8, None, filtering.THRESHOLD)
    with Recorder() as seen, torch.no_grad(), filtering.kept() as shares:
        loop.run_with_gradients([t.requires_grad for t in call.all], CROSS_ENTROPY.differentiable)
    assert shares[0] < 0.2
    assert max(seen.sizes) == 8 * 4100


@pytest.mark.parametrize("threshold", [-1.0, 1.0, float("nan")])
def test_thresholds_that_make_no_sense_are_refused(threshold: float) -> None:
    call = replace(make(CROSS_ENTROPY, 5, 123, 7), filter_threshold=threshold)
    with pytest.raises(ValueError, match="filter_threshold is"):
        call.chunked()


def test_a_call_without_the_setting_is_one_without_a_filter() -> None:
    call = peaked(CROSS_ENTROPY)
    operands = (call.hidden, call.weight, call.rows, call.whole)
    with filtering.kept() as shares:
        (found,) = chunked_rows(*operands, CROSS_ENTROPY.body, CHUNK, [True])
        grad(found, call.leaves)
    assert not shares


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    compiled = torch.compile(
        lambda *t: replace(base, hidden=[t[0]], weight=[t[1]], rows=[t[2]]).chunked()[0],
        backend="aot_eager",
        dynamic=dynamic,
        fullgraph=True,
    )
    for n in (50, 90):
        base = peaked(CROSS_ENTROPY, n=n)
        exact = base.to(torch.float64)
        with filtering.kept() as shares:
            found = base.gradients([compiled(base.hidden[0], base.weight[0], base.rows[0])])
        assert [s.item() < 0.12 for s in shares] == [True]
        assert_close(found, exact.gradients(exact.dense()), BOUND)
