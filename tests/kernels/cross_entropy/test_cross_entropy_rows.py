"""The definition of ``graphopt::cross_entropy_rows`` against eager mode, and its modes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_calls import (
    ALONE_AND_IN_PAIRS,
    LIMITS,
    SIZES,
    assert_as_dense,
    assert_close,
    assert_rows_as_dense,
    cross_entropy,
    make,
    weighted,
)
from torch import Tensor

from graphopt.kernels.cross_entropy import cross_entropy_rows, reference
from graphopt.kernels.filtering import kept


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_summaries_and_gradients(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_rows_as_dense(make(*sizes, ("bias", "softcap", "ignore")).to(dtype))


@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids="-".join)
def test_options_alone_and_in_pairs(options: tuple[str, ...]) -> None:
    assert_as_dense(make(37, 123, 7, options))


def test_rows_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 123 * 10)
    call = make(37, 123, 7, ("bias", "ignore"))
    head = reference.Head(call.hidden, call.weight, call.target, call.bias)
    assert [span.stop - span.start for span, _ in reference.chunks(head)] == [10] * 4
    assert_rows_as_dense(call)


def test_double_precision_is_kept() -> None:
    call = make(5, 9, 3, ("bias", "softcap", "ignore")).to(torch.float64)
    tensors = (call.hidden, call.weight, call.bias)

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return cross_entropy_rows(h, w, call.target, b, 5.0, 2, True, True, True)[:4]

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_what_is_not_asked_for_is_empty() -> None:
    call = make(5, 123, 7)
    operands = (call.hidden, call.weight, call.target)
    assert [t.numel() for t in cross_entropy_rows(*operands)] == [5, 5, 0, 0, 0]
    found = cross_entropy_rows(*operands, sums=True, argmax=True)
    assert [t.numel() for t in found] == [5, 5, 5, 0, 5]
    assert [t.dtype for t in found] == [torch.float32] * 4 + [torch.int64]
    assert [t.requires_grad for t in found] == [True] * 4 + [False]


def test_opcheck() -> None:
    call = make(5, 123, 7, ("bias", "ignore"))
    operands = (call.hidden, call.weight, call.target, call.bias)
    torch.library.opcheck(cross_entropy_rows, (*operands, 5.0, 2, True, True, True))
    torch.library.opcheck(cross_entropy_rows, operands)
    lse, _, _, entropies, _ = (t.detach() for t in call.rows())
    plain = [t.detach() for t in operands]
    cotangents = (torch.randn(5), None, torch.randn(5), torch.randn(5))
    backward = torch.ops.graphopt.cross_entropy_rows_backward.default
    for wanted in ([True] * 3, [False, True, False]):
        args = (*plain, None, 2, lse, entropies, *cotangents, wanted)
        torch.library.opcheck(backward, args)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_sizes_that_change(backend: str) -> None:
    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def loss(h: Tensor, w: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        found = cross_entropy(h, w, target, bias, label_smoothing=0.1, z_loss=0.01)
        return (found * torch.linspace(-0.7, 2.0, target.shape[0])).sum()

    for n in (5, 37):
        call = make(n, 123, 7, ("bias", "smoothing", "z_loss"))
        found = loss(call.hidden, call.weight, call.target, call.bias)
        exact = call.to(torch.float64)
        wanted = weighted(exact.dense())
        assert_close([found], [wanted], 1e-5)
        gradients = torch.autograd.grad(found, call.leaves)
        assert_close(gradients, torch.autograd.grad(wanted, exact.leaves), 1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_operands_get_no_gradient(frozen: str) -> None:
    call = make(37, 123, 7, ("bias",))
    getattr(call, frozen).requires_grad_(False)
    assert_as_dense(call)
    weighted([call.losses()]).backward()
    grads = {name: getattr(call, name).grad for name in ("hidden", "weight", "bias")}
    assert [name for name, g in grads.items() if g is None] == [frozen]


def test_a_second_backward_pass_and_a_second_derivative() -> None:
    call = make(5, 123, 7, ("bias", "softcap", "ignore", "smoothing", "z_loss", "entropy"))
    exact = call.to(torch.float64)
    loss, wanted = weighted(call.results()), weighted(exact.dense())
    once = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(once, twice, strict=True))
    first = torch.autograd.grad(loss, call.leaves, create_graph=True)
    expected = torch.autograd.grad(wanted, exact.leaves, create_graph=True)
    assert_close(first, expected, 1e-5)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), call.leaves)
    wanted_second = torch.autograd.grad(sum(g.square().sum() for g in expected), exact.leaves)
    assert_close(second, wanted_second, 1e-5)


def test_one_tensor_as_hidden_and_weight() -> None:
    call = make(37, 37, 7)
    tied = replace(call, weight=call.hidden)
    exact = tied.to(torch.float64)
    exact = replace(exact, weight=exact.hidden)
    found = torch.autograd.grad(weighted(tied.results()), tied.hidden)
    wanted = torch.autograd.grad(weighted(exact.dense()), exact.hidden)
    assert_close(found, wanted, 1e-5)


def test_all_rows_ignored() -> None:
    call = make(5, 123, 7, ("bias", "ignore", "smoothing", "z_loss"))
    call.target.fill_(2)
    losses = call.losses()
    assert not losses.any()
    assert all(not g.any() for g in torch.autograd.grad(losses.sum(), call.leaves))


def test_no_rows() -> None:
    call = make(0, 123, 7, ("bias",))
    found, wanted = call.rows(), call.dense_rows()
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert all(not g.any() for g in torch.autograd.grad(call.losses().sum(), call.leaves))


def test_classes_that_a_bias_rules_out() -> None:
    call = make(37, 123, 7, ("bias",))
    with torch.no_grad():
        call.bias[:100] = -torch.inf
    call.target.fill_(110)
    exact = call.to(torch.float64)
    lse, _, _, entropies, _ = call.rows()
    z = exact.logits()[:, 100:]
    assert_close(
        [lse, entropies],
        [z.logsumexp(1), z.log_softmax(1).exp().mul(-1).mul(z.log_softmax(1)).sum(1)],
        1e-5,
    )
    found = torch.autograd.grad(weighted([lse, entropies]), call.leaves)
    assert all(g.isfinite().all() for g in found)


def test_targets_out_of_range_are_named_by_their_row() -> None:
    call = make(5, 123, 7)
    for wrong in (123, -1):
        call.target[3] = wrong
        with pytest.raises(IndexError, match=f"row 3: target {wrong} is out of range for 123"):
            call.losses()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "three axes": ({"hidden": torch.zeros(5, 1, 7)}, "are not matrices"),
    "other columns": ({"hidden": torch.zeros(5, 8)}, r"\(5, 8\) and .* differ in their columns"),
    "other dtype": ({"hidden": torch.zeros(5, 7).half()}, "hidden is torch.float16, weight"),
    "no classes": ({"weight": torch.zeros(0, 7)}, "has no classes"),
    "short target": ({"target": torch.zeros(4).long()}, r"target \(4,\) is not one class for each"),
    "real target": ({"target": torch.zeros(5)}, "target is torch.float32"),
    "short bias": ({"bias": torch.zeros(122)}, r"bias \(122,\) is not one number"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_operands_that_do_not_fit_are_refused(case: str) -> None:
    damage, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        replace(make(5, 123, 7), **damage).losses()
    with pytest.raises(ValueError, match="softcap is 0"):
        cross_entropy(torch.zeros(5, 7), torch.zeros(9, 7), torch.zeros(5).long(), softcap=0.0)


def test_under_autocast_products_are_narrow_and_gradients_wide() -> None:
    call = make(37, 123, 7, ("bias",))
    narrow = call.to(torch.bfloat16).to(torch.float64)
    narrow = replace(narrow, bias=call.to(torch.float64).bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.results()
    wanted = narrow.dense()
    assert_close(found, wanted, 1e-5)
    gradients = torch.autograd.grad(weighted(found), call.leaves)
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    assert_close(gradients, torch.autograd.grad(weighted(wanted), narrow.leaves), 4e-3)


def test_the_definition_leaves_no_tile_out() -> None:
    call = replace(make(37, 123, 7), filter_threshold=0.5)
    with kept() as shares:
        assert_as_dense(call)
    assert [s.item() for s in shares] == [1.0]


def test_a_loss_of_known_value() -> None:
    h, w = torch.zeros(123, 7), torch.zeros(1000, 7)
    found = cross_entropy(h, w, torch.arange(123)).mean().item()
    assert found == pytest.approx(F.cross_entropy(h @ w.T, torch.arange(123)).item(), rel=1e-6)


def test_importing_loads_no_triton() -> None:
    code = "import sys, graphopt.kernels.cross_entropy; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
