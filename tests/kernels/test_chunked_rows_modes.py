"""``graphopt::chunked_rows`` in every mode of autograd."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from heads import (
    CROSS_ENTROPY,
    DISTILLATION,
    HEADS,
    PER_ROW,
    SELECTED,
    Call,
    Head,
    Recorder,
    assert_as_exact,
    assert_close,
    make,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graphopt.kernels.chunked_rows import chunked_rows, read
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.chunked_rows.operands import Operands, cast
from graphopt.kernels.chunked_rows.steps import Cotangents

grad = torch.autograd.grad


def call_of(head: Head, n: int = 5) -> Call:
    """With two rows in a chunk."""
    return make(head, n, 123, 7, 4 * 123 * head.products * 2)


def groups_of(call: Call) -> tuple[list[Tensor], ...]:
    return call.hidden, call.weight, call.rows, call.whole


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_second_backward_gives_the_same(head: Head) -> None:
    call = call_of(head)
    exact = call.to(torch.float64)
    loss, wanted = call.loss(call.chunked()), exact.gradients(exact.dense())
    for factor in (1.0, 3.0):
        found = grad(loss * factor, call.leaves, retain_graph=True)
        assert_close([g / factor for g in found], wanted, 1e-5)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_add_up_over_two_backward_calls(head: Head) -> None:
    call = call_of(head)
    exact = call.to(torch.float64)
    for _ in range(2):
        call.loss(call.chunked()).backward()
        exact.loss(exact.dense()).backward()
    assert_close([t.grad for t in call.leaves], [t.grad for t in exact.leaves], 1e-5)


def test_gradients_do_not_share_memory_with_what_a_second_backward_reads() -> None:
    call = call_of(CROSS_ENTROPY)
    loss = call.loss(call.chunked())
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in call.leaves]
    for t in call.leaves:
        t.grad.zero_()
    loss.backward()
    assert_close([t.grad for t in call.leaves], first, 1e-6)


@pytest.mark.parametrize("head", [CROSS_ENTROPY, DISTILLATION], ids=str)
@pytest.mark.parametrize("frozen", [{0}, {1}, {0, 1}, {2}, {0, 2}], ids=str)
def test_frozen_operands(head: Head, frozen: set[int]) -> None:
    """Of distillation 0 and 1 are student and teacher, 2 and 3 their weights."""
    call = call_of(head)
    for i in frozen & set(range(len(call.all))):
        call.all[i].requires_grad_(False)
    if not call.leaves:
        assert not any(t.requires_grad for t in call.chunked())
        return
    exact = call.to(torch.float64)
    assert len(exact.leaves) == len(call.leaves)
    assert_close(call.gradients(call.chunked()), exact.gradients(exact.dense()), 1e-5)


def test_a_frozen_product_is_not_differentiated() -> None:
    """A student and a teacher: two products, and two more in backward, for the student."""
    call = call_of(DISTILLATION, n=2)
    call.hidden[1].requires_grad_(False)
    call.weight[1].requires_grad_(False)
    flags = [t.requires_grad for t in call.all]
    loop = Loop(read(call.head.body), Operands(*groups_of(call)), 0)
    with Recorder() as seen, torch.no_grad():
        loop.gradients(flags, call.head.differentiable, Cotangents([torch.ones(2)]))
    assert seen.names.count("aten::mm") == 3
    assert seen.names.count("aten::addmm_") == 1
    assert seen.names.count("aten::_log_softmax_backward_data") == 1


def test_no_gradient_is_asked() -> None:
    call = call_of(CROSS_ENTROPY)
    with torch.no_grad():
        assert not call.chunked()[0].requires_grad
    with torch.inference_mode():
        assert_close(call.chunked(), call.dense(), 1e-5)


def test_results_without_gradient_have_none() -> None:
    lse, total = call_of(SELECTED).chunked()
    assert not lse.requires_grad
    assert total.requires_grad


def test_a_weight_given_as_a_transposed_view_gets_its_gradient_in_that_layout() -> None:
    call = call_of(CROSS_ENTROPY)
    exact = call.to(torch.float64)
    weight = call.weight[0].detach().T.contiguous().T.requires_grad_()
    call.weight[0] = weight
    found = call.gradients(call.chunked())
    assert_close(found, exact.gradients(exact.dense()), 1e-5)
    assert found[1].stride() == weight.stride() == (1, 123)


def test_operands_without_a_layout_of_their_own() -> None:
    call = call_of(CROSS_ENTROPY, n=6)
    exact = call.to(torch.float64)
    hidden, weight = call.hidden[0].detach(), call.weight[0].detach()
    call.hidden[0] = torch.stack([hidden, hidden], 1)[:, 1].requires_grad_()
    call.weight[0] = F.pad(weight, (1, 2))[:, 1:-2].requires_grad_()
    assert_close(call.gradients(call.chunked()), exact.gradients(exact.dense()), 1e-5)


def tied(call: Call) -> tuple[Tensor, Tensor]:
    """Two products on one weight, the hidden states computed from it; chunked, and in eager mode.

    Operands given twice, or computed from each other, must not be counted twice.
    """
    weight, scale = call.weight[0], call.rows[0]

    def hidden() -> list[Tensor]:
        return [weight[:5] * 2, weight[2:7].tanh()]

    groups = (hidden(), [weight, weight], [scale], [])
    body, flags = DISTILLATION.body, list(DISTILLATION.differentiable)
    found = chunked_rows(*groups, body, call.chunk_bytes, flags)[0]
    dense = DISTILLATION.dense(*(h @ weight.T for h in hidden()), scale)[0]
    return found.pow(2).sum(), dense.pow(2).sum()


def test_a_weight_given_twice() -> None:
    call = call_of(DISTILLATION).to(torch.float64)
    found, wanted = tied(call)
    leaves = [call.weight[0], call.rows[0]]
    assert_close(grad(found, leaves), grad(wanted, leaves), 1e-12)


def test_second_gradients_of_a_weight_given_twice() -> None:
    call = call_of(DISTILLATION).to(torch.float64)
    leaves = [call.weight[0], call.rows[0]]
    second = []
    for loss in tied(call):
        first = grad(loss, leaves, create_graph=True)
        second.append([*first, *grad(sum(g.pow(2).sum() for g in first), leaves)])
    assert_close(*second, 1e-12)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head: Head) -> None:
    call = make(head, 5, 4, 3, 8 * 4 * head.products * 2).to(torch.float64)

    def run(*leaves: Tensor) -> list[Tensor]:
        given = iter(leaves)
        groups = ([next(given) if t.requires_grad else t for t in g] for g in groups_of(call))
        results = Call(head, *groups, call.chunk_bytes).chunked()
        return [r for r in results if r.requires_grad]

    assert torch.autograd.gradcheck(run, call.leaves)
    assert torch.autograd.gradgradcheck(run, call.leaves)


def test_create_graph_after_the_gradients_of_the_forward_pass_were_used() -> None:
    call = call_of(CROSS_ENTROPY).to(torch.float64)
    loss = call.chunked()[0]
    first = grad(loss, call.leaves, retain_graph=True)
    again = grad(loss, call.leaves, create_graph=True)
    assert_close(again, first, 1e-12)
    assert all(g.requires_grad for g in again)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW], ids=str)
def test_checkpoint(head: Head, reentrant: bool) -> None:
    call = call_of(head)
    exact = call.to(torch.float64)
    hidden = call.hidden[0]

    def run(x: Tensor) -> Tensor:
        call.hidden[0] = x * 1.0
        return call.loss(call.chunked())

    loss = checkpoint(run, hidden, use_reentrant=reentrant)
    loss.backward()
    call.hidden[0] = hidden
    exact.loss(exact.dense()).backward()
    assert_close([t.grad for t in call.leaves], [t.grad for t in exact.leaves], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW], ids=str)
def test_a_cotangent_as_a_gradient_scaler_gives_it(head: Head, dtype: torch.dtype) -> None:
    call = call_of(head).to(dtype)
    exact = call.to(torch.float64)
    scale = 1024.0 if dtype == torch.float16 else 65536.0
    found = grad(call.loss(call.chunked()) * scale, call.leaves)
    wanted = grad(exact.loss(exact.dense()) * scale, exact.leaves)
    limit = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    assert_close(found, wanted, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_autocast(head: Head, dtype: torch.dtype) -> None:
    """As in eager mode, though backward runs outside of the region: dtypes, and errors."""
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    call = call_of(head, n=123)
    exact = call.to(torch.float64)
    with torch.autocast("cpu", dtype):
        found, eager = call.chunked(), call.dense()
    assert [t.dtype for t in found] == [t.dtype for t in eager]
    for mine, theirs, counts in zip(found, eager, head.differentiable, strict=True):
        if counts:
            assert_close([mine], [theirs], limit / 2)
    gradients, theirs = call.gradients(found), call.gradients(eager)
    assert [g.dtype for g in gradients] == [torch.float32] * len(gradients)
    wanted = exact.gradients(exact.dense())
    assert_close(gradients, wanted, limit)
    assert_as_exact(gradients, theirs, wanted, limit / 10)
    assert gradients[0].to(dtype).float().equal(gradients[0])  # a product taken in `dtype`


SQUARES = """def body(x):
    a = aten.zeros_like.default(x)
    b = aten.mse_loss.default(x, a, 0)
    c = aten.sum.dim_IntList(b, [1])
    return [c], []"""


def test_autocast_of_the_body_holds_in_backward() -> None:
    """Autocast takes this loss in float32, the product in bfloat16."""
    h, w = torch.randn(5, 7, requires_grad=True), torch.randn(9, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        x = h @ w.T
        dense = F.mse_loss(x, torch.zeros_like(x), reduction="none").sum(1)
        (found,) = chunked_rows([h], [w], [], [], SQUARES, 0, [True])
    seed = torch.rand(5)
    assert_close([found], [dense], 1e-6)
    assert_close(grad(found, h, seed), grad(dense, h, seed), 1e-4)


def test_autocast_casts_a_weight_once() -> None:
    call = make(CROSS_ENTROPY, 5, 123, 7)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Recorder() as seen:
        Loop(read(call.head.body), Operands(*groups_of(call)), 1, torch.bfloat16).run()
    assert seen.names.count("aten::mm") == 5
    # The operands, and what the loss itself takes in float32: a row, and no row for the dtype.
    assert seen.names.count("aten::_to_copy") == 2 + 2 * 5


def test_autocast_leaves_float64_alone() -> None:
    h, w, r = torch.randn(5, 7), torch.randn(9, 7).double(), torch.randn(5)
    found = cast(Operands([h], [w], [r], []), torch.bfloat16)
    assert [t.dtype for t in found.all] == [torch.bfloat16, torch.float64, torch.float32]


def test_torch_func() -> None:
    call = call_of(CROSS_ENTROPY)
    target = call.rows[0]

    def chunked(h: Tensor, w: Tensor) -> Tensor:
        return chunked_rows([h], [w], [target], [], CROSS_ENTROPY.body, 1, [True])[0]

    def dense(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(h @ w.T, target, reduction="sum")

    given = call.hidden[0].detach(), call.weight[0].detach()
    both = (0, 1)
    assert_close(torch.func.grad(chunked, both)(*given), torch.func.grad(dense, both)(*given), 1e-5)
    tangents = torch.randn_like(given[0]), torch.randn_like(given[1])
    found, wanted = (torch.func.jvp(f, given, tangents) for f in (chunked, dense))
    assert_close(found, wanted, 1e-5)
    found, wanted = (torch.func.hessian(f)(*given) for f in (chunked, dense))
    assert_close([found], [wanted], 1e-5)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda s: chunked(given[0] * s, given[1]))(torch.ones(3))


def test_forward_mode() -> None:
    call = call_of(CROSS_ENTROPY)
    with fwd.dual_level():
        call.hidden[0] = fwd.make_dual(call.hidden[0].detach(), torch.ones(5, 7))
        found, wanted = (fwd.unpack_dual(r[0]).tangent for r in (call.chunked(), call.dense()))
    assert_close([found], [wanted], 1e-5)


@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW], ids=str)
def test_gradient_operators_below_autograd(head: Head) -> None:
    """Where a compiled graph without gradients of its own calls them."""
    call = call_of(head)
    flags = [t.requires_grad for t in call.all]
    tensors = [t.detach() for t in call.all]
    counts = [len(g) for g in groups_of(call)]
    settings = (head.body, call.chunk_bytes, list(head.differentiable))
    seed = [torch.ones_like(r) for r in call.chunked()]
    wanted = grad([call.chunked()[0]], call.leaves, seed)
    backward = torch.ops.graphopt.chunked_rows_backward
    given = {"wanted": flags, "cotangents": seed, "totals": []}
    with torch._C._AutoDispatchBelowAutograd():
        found = backward(tensors, counts, *settings, **given)
    assert_close(found, wanted, 1e-6)
    with torch.inference_mode():
        found = backward(tensors, counts, *settings, **given)
    assert_close(found, wanted, 1e-6)
