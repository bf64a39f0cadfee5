"""Logits that are returned and computed when they are read: values, gradients, memory, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import graphopt
from graphopt.backend import Backend
from graphopt.emit.unchunked import unchunked
from graphopt.errors import RecipeError
from graphopt.kernels.deferred import DeferredTensor
from graphopt.passes import FuseLossHead
from graphopt.passes.loss_head.heads import (
    BATCH,
    CLASSES,
    DYNAMIC,
    TOKENS,
    WIDTH,
    Head,
    flat,
    loss,
)
from graphopt.recipe import Options
from graphopt.rewrite.passes import parse_pass

LAZY = ["Canonicalize", FuseLossHead(lazy_logits=True)]


def inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(BATCH, tokens, WIDTH, requires_grad=True)
    return hidden, torch.randint(0, CLASSES, (BATCH, tokens))


def returned(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = m.logits(h)
    return loss(x, t), x


def capped(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = 30 * torch.tanh(F.linear(h, m.w, m.b) / 30)
    return loss(x.float(), t), x


def shifted(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = m.logits(h)
    return loss(x[:, :-1], t[:, 1:]), x


def views(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = m.logits(h) / 2
    return loss(x, t), x[:, :-1], x[:, -1], x[..., :500], x.mT, x.argmax(-1)


def detached(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = m.logits(h)
    return loss(x, t), x.detach(), x.double()


def masked(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    x = m.logits(h) * (t > 100).float().unsqueeze(-1)
    return loss(x, t), x


def taught(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    student, teacher = m.logits(h) / 2, m.taught(h) / 2
    each = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    return each / t.numel(), student, teacher


def contrastive(m: Head, h: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    left, right = F.normalize(flat(h), dim=-1), F.normalize(flat(h).flip(0) + 0.1, dim=-1)
    x = m.scale.exp() * left @ right.T
    places = torch.arange(len(x))
    return (F.cross_entropy(x, places) + F.cross_entropy(x.T, places)) / 2, x, x.T


FORMS: list[Callable[..., Any]] = [
    returned, capped, shifted, views, detached, masked, taught, contrastive,
]  # fmt: skip


def total(results: Any) -> Tensor:
    """One number that every floating result has a part in."""
    floats = [r for r in pytree.tree_leaves(results) if r.requires_grad]
    return sum((r.float().sin().sum() for r in floats), torch.zeros(()))


def assert_like_eager(model: Head, fast: Any, args: tuple[Tensor, ...]) -> None:
    wanted, found = model(*args), fast(*args)
    for a, b in zip(wanted, found, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert a.requires_grad == b.requires_grad
        assert type(b) is (DeferredTensor if a.numel() > BATCH * TOKENS else Tensor)
    leaves = [args[0], *model.parameters()]
    slopes = [torch.autograd.grad(total(r), leaves, allow_unused=True) for r in (wanted, found)]
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b.clone(), a)
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_outputs_are_those_of_eager_mode(form: Callable[..., Any], dynamic: bool) -> None:
    if form is contrastive and dynamic:
        pytest.skip("its sizes are written in the model")
    model, args = Head(form).train(), inputs()
    options = {"dynamic_shapes": DYNAMIC} if dynamic else {}
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False, **options)
    (note,) = [n for n in fast.report.notes if "held whole" in n]
    assert note.endswith("never held whole, unless the output is read: it is computed then")
    assert_like_eager(model, fast, args)
    if dynamic:
        assert_like_eager(model, fast, inputs(TOKENS - 4))


@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_a_step_holds_no_logits(target: str) -> None:
    model, (h, t) = Head(returned).train(), inputs(4 * TOKENS)
    passes = ["Canonicalize", FuseLossHead(lazy_logits=True, chunk_bytes=32 * CLASSES * 4)]
    fast = graphopt.compile(
        model, example_inputs=(h, t), passes=passes, measure=False, target=target
    )
    fast(h, t)[0].backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        made = fast(h, t)
        made[0].backward()
    rows = [e.input_shapes[0][0] for e in seen.events() if e.name == "aten::mm"]
    assert max(rows) < CLASSES + 1 and BATCH * 4 * TOKENS not in rows
    torch.testing.assert_close(made[1][:, -1].clone(), model(h, t)[1][:, -1])


def test_logits_are_kept_where_an_unread_row_is_needed() -> None:
    """What stands beside the logits has rows that the loss does not read."""

    def form(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = m.logits(h) * (t > 100).float().unsqueeze(-1)
        return loss(x[:, :-1], t[:, 1:]), x

    model, args = Head(form).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    assert "rows that are not read" in [m.reason for m in fast.report.missed][-1]
    assert type(fast(*args)[1]) is Tensor


def test_logits_without_a_loss_are_computed() -> None:
    model, args = Head(lambda m, h, t: m.logits(h)).eval(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    assert type(fast(*args)) is Tensor


def test_an_optimizer_step_before_logits_are_read() -> None:
    model, args = Head(returned).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    value, logits = fast(*args)
    value.backward()
    torch.optim.AdamW(model.parameters()).step()
    with pytest.raises(RuntimeError, match="lazy_logits off"):
        logits.argmax(-1)


@pytest.mark.parametrize("inside", [False, True], ids=["captured outside", "captured inside"])
@pytest.mark.parametrize("head", [returned, capped])
def test_a_bias_under_autocast(head: Any, *, inside: bool) -> None:
    """`linear` gives the low precision then, and what follows it stays there."""

    def biased(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        x = F.linear(h, m.w, m.b)
        return loss(x.float(), t), x

    model, args = Head(head if head is capped else biased).train(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        lazy = graphopt.compile(model, example_inputs=args, passes=LAZY)
    with torch.autocast("cpu", torch.bfloat16):
        (_, wanted), (_, made) = model(*args), lazy(*args)
    assert type(made) is DeferredTensor
    assert made.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(made + 0, wanted, rtol=2e-2, atol=2e-2)


def test_under_autocast() -> None:
    model, args = Head(returned).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = model(*args)[1], fast(*args)[1]
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found.clone(), wanted)


def test_files_keep_logits_lazy(tmp_path: Any) -> None:
    model, args = Head(capped).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    loaded = graphopt.load(graphopt.save(fast, tmp_path / "lazy.pt2"))
    assert type(loaded(*args)[1]) is DeferredTensor
    found, wanted = (torch.autograd.grad(total(m(*args)), args[0])[0] for m in (loaded, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_onnx_files_hold_logits(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model, (h, t) = Head(capped).eval(), inputs()
    fast = graphopt.compile(model, example_inputs=(h.detach(), t), passes=LAZY, measure=False)
    targets = {str(n.target) for n in unchunked(fast.program).graph.nodes}
    assert not any("graphopt" in name for name in targets)
    result = graphopt.export_onnx(fast, tmp_path / "lazy.onnx")
    assert result.error is not None and result.error < 1e-5


@pytest.mark.parametrize("target", ["torch", "inductor"])
@pytest.mark.parametrize("form", [returned, taught], ids=lambda f: f.__name__)
def test_through_dynamo(form: Callable[..., Any], target: str, fresh_dynamo: None) -> None:
    model, args = Head(form).train(), inputs()
    backend = Backend(Options(passes=LAZY, target=target, measure=False))
    fast = torch.compile(model, backend=backend)
    assert_like_eager(model, fast, args)
    (report,) = backend.reports
    assert report.verified and "FuseRowSummaries" in [a.rule for a in report.applied]


def test_logits_cross_a_graph_break(fresh_dynamo: None) -> None:
    model, args = Head(returned).train(), inputs()

    def step(h: Tensor, t: Tensor) -> Tensor:
        value, logits = model(h, t)
        torch._dynamo.graph_break()
        return value + logits.softmax(-1)[..., 0].sum()

    fast = torch.compile(step, backend=Backend(Options(passes=LAZY, measure=False)))
    slopes = [torch.autograd.grad(run(*args), model.w)[0] for run in (step, fast)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_inside_another_compiled_function(fresh_dynamo: None) -> None:
    model, args = Head(returned).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=LAZY, measure=False)
    found = torch.compile(fast, backend="aot_eager")(*args)
    assert type(found[1]) is Tensor
    torch.testing.assert_close(found, model(*args))


def test_one_of_two_options() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        FuseLossHead(lazy_logits=True, drop_logits=True)
    with pytest.raises(RecipeError, match="give one of the two"):
        parse_pass("FuseLossHead:lazy_logits=true,drop_logits=true")
    assert parse_pass("FuseLossHead:lazy_logits=true") == FuseLossHead(lazy_logits=True)
