"""Losses of some rows: the rows are selected before the product, whatever the frontend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.backend import Backend
from graphopt.errors import CaptureError
from graphopt.passes import FuseLossHead
from graphopt.passes.loss_head.heads import (
    DYNAMIC,
    HEADS,
    MASKS_COMPARED,
    Head,
    masked_divergence,
)
from graphopt.recipe import Options

CLASSES, WIDTH, BATCH, TOKENS = 520, 12, 4, 65
PASSES = ["Canonicalize", FuseLossHead()]
MASKED = ("masked", "found", "sampled", "masked teacher", "masked, accuracy")


def inputs() -> tuple[Tensor, Tensor]:
    hidden = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    return hidden, torch.randint(0, CLASSES, (BATCH, TOKENS))


def rules(fast: Any) -> list[str]:
    return [a.rule for a in fast.report.applied]


def slopes(model: nn.Module, call: Any, h: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
    result = call(h, t)
    loss = result[0] if isinstance(result, tuple) else result
    return loss, list(torch.autograd.grad(loss, [model.w, h]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKED)
def test_however_many_rows_are_selected(name: str, dynamic: bool, tmp_path: Any) -> None:
    """All, one, none: the mean of none is NaN, and its gradients are zero."""
    model, (h, t) = Head(HEADS[name]).train(), inputs()
    shapes = DYNAMIC if dynamic else None
    fast = graphopt.compile(
        model, example_inputs=(h, t), passes=PASSES, dynamic_shapes=shapes, measure=False
    )
    assert {"SelectFirst", "FuseRowSummaries"} <= {*rules(fast)}, fast.report.missed
    loaded = graphopt.load(graphopt.save(fast, tmp_path / "head.pt2"))
    none = torch.full_like(t, 7)
    one = none.index_put((torch.tensor(2), torch.tensor(9)), torch.tensor(300))
    for targets in (t, torch.full_like(t, 300), one, none):
        (loss, wanted), (made, found) = (slopes(model, c, h, targets) for c in (model, fast))
        assert made.isnan() == loss.isnan() == bool((targets == 7).all())
        for a, b in zip((loss, *wanted), (made, *found), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, equal_nan=True)
        result = loaded(h, targets)
        result = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(result, loss, equal_nan=True)


def test_a_row_that_is_read_twice_gets_both_gradients() -> None:
    def twice(m: Head, h: Tensor, t: Tensor) -> Tensor:
        rows = torch.tensor([3, 3, 3, 64, 259] * 40)
        return F.cross_entropy(m.logits(h).flatten(0, 1)[rows], t.flatten()[rows])

    model, (h, t) = Head(twice).train(), inputs()
    fast = graphopt.compile(model, example_inputs=(h, t), passes=PASSES, measure=False)
    assert {"SelectFirst", "FuseRowSummaries"} <= {*rules(fast)}
    (_, wanted), (_, found) = (slopes(model, c, h, t) for c in (model, fast))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_two_products_of_one_selection_are_fused() -> None:
    """Each is selected before the other's rewrite has made what both are computed from anew."""
    model, (h, t) = Head(masked_divergence).train(), inputs()
    fast = graphopt.compile(model, example_inputs=(h, t), passes=PASSES, measure=False)
    assert {"SelectFirst", "FuseRowSummaries"} <= {*rules(fast)}, fast.report.missed
    (loss, wanted), (made, found) = (slopes(model, c, h, t) for c in (model, fast))
    for a, b in zip((loss, *wanted), (made, *found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def _returning(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x, keep = m.logits(h), t > 100
    return F.cross_entropy(x[keep], t[keep]), x


def _returning_with_accuracy(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, x = _returning(m, h, t)
    return loss, x, (x.argmax(-1) == t).float().mean()


@pytest.mark.parametrize("head", [_returning, _returning_with_accuracy])
@pytest.mark.parametrize("option", ["drop_logits", "lazy_logits", None])
def test_logits_that_are_returned(head: Any, option: str | None) -> None:
    model, (h, t) = Head(head).train(), inputs()
    passes = ["Canonicalize", FuseLossHead(**({option: True} if option else {}))]
    fast = graphopt.compile(model, example_inputs=(h, t), passes=passes, measure=False)
    (_, wanted), (_, found) = (slopes(model, c, h, t) for c in (model, fast))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    logits = fast(h, t)[1]
    if option == "drop_logits":
        assert logits is None
    else:
        torch.testing.assert_close(logits + 0, model(h, t)[1])
    if option is None:
        (missed,) = [m for m in fast.report.missed if m.rule == "SelectFirst"]
        assert "output of the model" in missed.reason and "lazy_logits=True" in missed.option
    else:
        assert {"SelectFirst", "FuseRowSummaries"} <= {*rules(fast)}, fast.report.missed


@pytest.mark.skipif(not MASKS_COMPARED, reason="capture refuses it: see the next test")
def test_masks_that_select_different_numbers_of_rows_are_still_an_error() -> None:
    def wrong(m: Head, h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(m.logits(h)[t > 100], t[h[..., 0] < 9])

    model, (h, t) = Head(wrong).train(), inputs()
    t = t.clamp(min=101)
    fast = graphopt.compile(model, example_inputs=(h, t), passes=PASSES, measure=False)
    assert "SelectFirst" in rules(fast)
    with pytest.raises((RuntimeError, ValueError), match=r"u0|batch_size"):
        fast(h, t.clone().fill_(3))


@pytest.mark.skipif(MASKS_COMPARED, reason="capture takes it")
def test_a_mask_spelled_twice_is_named() -> None:
    model = Head(lambda m, h, t: F.cross_entropy(m.logits(h)[t > 9], t[t > 9])).train()
    with pytest.raises(CaptureError, match="of one size") as caught:
        graphopt.compile(model, example_inputs=inputs(), passes=PASSES)
    assert "computed once" in str(caught.value)


def test_an_operator_that_asks_whether_there_are_rows_is_named() -> None:
    model = Head(lambda m, h, t: m.logits(h)[t > 100].logsumexp(-1).sum()).train()
    with pytest.raises(CaptureError, match="are none") as caught:
        graphopt.compile(model, example_inputs=inputs(), passes=PASSES)
    assert "torch._check(x.shape[0] > 0)" in str(caught.value)


def test_selected_scores_in_an_onnx_file(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model = Head(lambda m, h, t: m.logits(h)[t > 100].amax(-1)).eval()
    h, t = inputs()
    fast = graphopt.compile(model, example_inputs=(h.detach(), t), passes=PASSES, measure=False)
    assert {"SelectFirst", "FuseRowSummaries"} <= {*rules(fast)}
    result = graphopt.export_onnx(fast, tmp_path / "scores.onnx")
    assert result.error is not None and result.error < 1e-5


@pytest.mark.parametrize("name", MASKED)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_steps_through_dynamo(name: str, fresh_dynamo: None) -> None:
    model, (h, t) = Head(HEADS[name]).train(), inputs()
    backend = Backend(Options(passes=PASSES, measure=False))
    fast = torch.compile(model, backend=backend)
    for targets in (t, torch.full_like(t, 300)):
        (_, wanted), (_, found) = (slopes(model, c, h, targets) for c in (model, fast))
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    (report,) = backend.reports
    assert {"SelectFirst", "FuseRowSummaries"} <= {a.rule for a in report.applied}


class Routed(nn.Module):
    """Rows of two experts, as many as their labels say, each with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 32) for _ in range(2))

    def forward(self, x, labels):
        counts = [(labels == expert).sum().item() for expert in range(2)]
        for count in counts:
            torch._check(count >= 0)
            torch._check(count <= x.shape[0])
        torch._check(counts[0] + counts[1] == x.shape[0])
        parts = x[labels.argsort()].split(counts)
        sums = [e(p).exp().sum() for e, p in zip(self.experts, parts, strict=True)]
        return torch.stack(sums)


def test_rows_of_parts_whose_sizes_values_decide():
    torch.manual_seed(0)
    model, inputs = Routed().eval(), (torch.randn(6, 8), torch.tensor([0, 1, 1, 0, 1, 1]))
    fast = graphopt.compile(model, example_inputs=inputs, passes=[FuseLossHead(min_bytes=0)])
    assert fast.report.verified
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs))
