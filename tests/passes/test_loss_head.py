"""Loss heads end to end: no product is ever held, and every mode of training is eager's."""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import graphopt
from graphopt.backend import Backend
from graphopt.errors import RecipeError
from graphopt.passes import FuseLossHead
from graphopt.passes.loss_head.heads import HEADS, Head
from graphopt.recipe import Options
from graphopt.report.explain import explain_lines
from graphopt.rewrite.passes import parse_pass

CLASSES, WIDTH, BATCH, TOKENS = 520, 12, 4, 65
SMALL_CHUNKS = ["Canonicalize", FuseLossHead(chunk_bytes=32 * CLASSES * 4)]
"""Chunks of 32 rows, the last one shorter."""

SQUARE = frozenset({"contrastive", "sigmoid pairs"})
"""Heads whose product is small beside a chunk."""


def inputs() -> tuple[Tensor, Tensor]:
    hidden = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    return hidden, torch.randint(0, CLASSES, (BATCH, TOKENS))


def fused(model: nn.Module, *args: Any, **options: Any) -> Any:
    options = {"passes": SMALL_CHUNKS, "measure": False} | options
    fast = graphopt.compile(model, example_inputs=args, **options)
    assert "FuseRowSummaries" in [a.rule for a in fast.report.applied], fast.report.missed
    return fast


def loss_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def gradients(model: nn.Module, call: Any, *args: Any) -> tuple[Any, list[Tensor]]:
    """The result, and gradients of parameters and of floating inputs."""
    given = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
    result = call(*given)
    wanted = [*model.parameters(), *(g for g in given if g.requires_grad)]
    found = torch.autograd.grad(loss_of(result), wanted, allow_unused=True)
    return result, [
        torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)
    ]


def peak(run: Any) -> int:
    """Most numbers of 4 bytes that were allocated at once while something ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes)) // 4


@pytest.mark.parametrize("name", HEADS)
def test_no_head_holds_its_product(name: str) -> None:
    model = Head(HEADS[name]).train()
    args = inputs()
    fast = fused(model, *args)
    wanted, slopes = gradients(model, model, *args)
    made, found = gradients(model, fast, *args)
    taken, dense = (peak(lambda c=c: gradients(model, c, *args)) for c in (fast, model))
    assert taken < dense / 2
    assert name in SQUARE or taken < BATCH * TOKENS * CLASSES
    for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(made), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for a, b in zip(slopes, found, strict=True):
        scale = float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * scale)


def test_the_report_says_what_is_saved() -> None:
    model = Head(lambda m, h, t: F.cross_entropy(m.logits(h).flatten(0, 1), t.flatten())).train()
    (note,) = [n for n in fused(model, *inputs()).report.notes if "held" in n]
    size = BATCH * TOKENS * CLASSES * 4 / 2**20
    assert note.startswith(f"`linear` of {size:.3g} MiB (") and "test_loss_head.py:" in note
    chunk = 32 * CLASSES * 4 / 2**20
    assert f"never held whole; {size - chunk:.3g} MiB of it are saved" in note
    (note,) = [n for n in fused(model, *inputs(), passes="exact").report.notes if "held" in n]
    assert note.endswith("is one chunk of rows: with more it is never held whole")


@pytest.mark.parametrize("option", ["chunk_bytes=-5", "chunk_bytes=0", "min_bytes=-1"])
def test_sizes_that_are_none_are_refused(option: str) -> None:
    name, _, number = option.partition("=")
    with pytest.raises(ValueError, match=f"{option} is no size; give a number of bytes, [01] or"):
        FuseLossHead(**{name: int(number)})
    with pytest.raises(RecipeError, match=f"{option} is no size"):
        parse_pass(f"FuseLossHead:{option}")
    for other in ("64 MiB", 1.5, True):
        with pytest.raises(ValueError, match="is no size"):
            FuseLossHead(**{name: other})


def _one_sorted(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return HEADS["mean"](m, h, t), F.linear(h, m.teacher).sort(1)[0].sum()


def test_each_large_product_is_explained() -> None:
    report = graphopt.explain(Head(_one_sorted).train(), example_inputs=inputs())
    saved, *_, where, why, at = explain_lines(report)
    size = f"{BATCH * TOKENS * CLASSES * 4 / 2**20:.3g} MiB"
    assert "never held whole" in saved and size in saved
    assert "test_loss_head.py:" in where
    assert f"aten.sort mixes rows, so all of `linear_1` is needed ({size})" in why
    assert "at node sort" in at


def test_a_chunk_takes_the_memory_it_was_given() -> None:
    model, args = Head(HEADS["mean"]).train(), inputs()
    peaks = []
    for rows in (8, 64):
        fast = fused(
            model, *args, passes=["Canonicalize", FuseLossHead(chunk_bytes=rows * CLASSES * 4)]
        )
        peaks.append(peak(lambda fast=fast: gradients(model, fast, *args)))
    more = (peaks[1] - peaks[0]) / (56 * CLASSES)
    assert 0.7 <= more <= 1  # chunks are even: of 8 and of 52 rows


def test_a_batch_in_which_every_target_is_ignored() -> None:
    model = Head(lambda m, h, t: F.cross_entropy(m.logits(h).flatten(0, 1), t.flatten())).train()
    hidden, targets = inputs()
    fast = fused(model, hidden, targets)
    result, found = gradients(model, fast, hidden, torch.full_like(targets, -100))
    assert result.isnan()
    assert all(bool((g == 0).all()) for g in found)


@pytest.mark.parametrize(
    "head", ["mean", "class weights", "soft targets", "binary", "one hot by hand", "by index"]
)
def test_a_target_that_does_not_exist_is_named(head: str) -> None:
    """An error in eager mode too, also where the matrix of targets is made in the body."""
    model, (hidden, targets) = Head(HEADS[head]).train(), inputs()
    fast = fused(model, hidden, targets)
    targets[1, 7] = CLASSES
    for call in (model, fast):
        with pytest.raises((IndexError, RuntimeError)) as raised:
            call(hidden, targets)
    assert str(raised.value).startswith(f"row {TOKENS + 7}: ")
    assert f"{CLASSES} is out of bounds" in str(raised.value)


def test_one_hot_of_fewer_classes() -> None:
    def narrow(m: Head, h: Tensor, t: Tensor) -> Tensor:
        logits = m.logits(h)[..., :512]
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(t % 512, 512).float())

    model, args = Head(narrow).train(), inputs()
    found, wanted = (gradients(model, call, *args)[1] for call in (fused(model, *args), model))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_backward_twice_and_through_the_gradient() -> None:
    model, args = Head(HEADS["z"]).train(), inputs()
    fast = fused(model, *args)
    twice = []
    for call in (model, fast):
        loss = call(*args)
        one, two = (torch.autograd.grad(loss, args[0], retain_graph=True)[0] for _ in range(2))
        assert torch.equal(one, two)
        (slope,) = torch.autograd.grad(loss, args[0], create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), model.w)
        twice.append((one, second))
    for a, b in zip(*twice, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("frozen", ["trunk", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    model, (hidden, targets) = Head(HEADS["mean"]).train(), inputs()
    hidden = hidden.detach().requires_grad_(frozen == "head")
    model.w.requires_grad_(frozen == "trunk")
    fast = fused(model, hidden, targets)
    fast(hidden, targets).backward()
    assert (hidden.grad is None, model.w.grad is None) == (frozen == "trunk", frozen == "head")


class Tied(nn.Module):
    """An embedding that is the head, with a low-rank addition to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.down = nn.Parameter(torch.randn(2, WIDTH))
        self.up = nn.Parameter(torch.randn(CLASSES, 2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        logits = F.linear(h, self.embedding.weight) + F.linear(F.linear(h, self.down), self.up)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_tied_weights_and_low_rank_additions() -> None:
    model, (_, ids) = Tied().train(), inputs()
    fast = fused(model, ids)
    _, found = gradients(model, fast, ids)
    _, wanted = gradients(model, model, ids)
    assert peak(lambda: gradients(model, fast, ids)) < BATCH * TOKENS * CLASSES
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_under_autocast() -> None:
    model, args = Head(HEADS["mean"]).train(), inputs()
    fast = fused(model, *args)
    with torch.autocast("cpu", torch.bfloat16):
        (wanted, slopes), (made, found) = (gradients(model, c, *args) for c in (model, fast))
    assert made.dtype == wanted.dtype
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(slopes, found, strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, (hidden, targets) = Head(HEADS["shifted"]).train().to(dtype), inputs()
    exact = copy.deepcopy(model).double()
    args = hidden.to(dtype), targets
    fast = fused(model, *args)
    _, reference = gradients(exact, exact, args[0].double(), targets)
    worst = []
    for call in (model, fast):
        loss, found = gradients(model, call, *args)
        assert loss.dtype == torch.float32
        pairs = zip(reference, found, strict=True)
        worst.append(max(float((a - b).norm() / a.norm()) for a, b in pairs if a.any()))
    # This head takes its loss in float32, whatever the dtype.
    assert worst[1] <= min(max(1.5 * worst[0], 1e-7), 5e-3)


def _returning(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return F.cross_entropy(x.flatten(0, 1), t.flatten()), x


@pytest.mark.parametrize("dropped", [False, True])
def test_logits_that_are_returned(dropped: bool) -> None:
    model, args = Head(_returning).train(), inputs()
    passes = ["Canonicalize", FuseLossHead(drop_logits=dropped)]
    fast = graphopt.compile(model, example_inputs=args, passes=passes)
    loss, logits = fast(*args)
    torch.testing.assert_close(loss, model(*args)[0])
    if dropped:
        assert logits is None and fast.report.applied[-1].rule == "FuseRowSummaries"
    else:
        (missed,) = [m for m in fast.report.missed if m.rule == "FuseRowSummaries"]
        assert "is an output of the model" in missed.reason
        assert "lazy_logits=True" in missed.option and "drop_logits=True" in missed.option
        assert missed.source is not None and "test_loss_head.py" in missed.source
        torch.testing.assert_close(logits, model(*args)[1])


def test_logits_under_two_conditions_are_dropped() -> None:
    """What is given up is found before the spelling of operators of Python is settled."""

    def masked(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = m.logits(h)
        off = (torch.arange(CLASSES) != t[..., None]) & (x > 1)
        return F.cross_entropy(x.masked_fill(off, -1e4).flatten(0, 1), t.flatten()), x

    model, args = Head(masked).train(), inputs()
    fast = fused(model, *args, passes=["Canonicalize", FuseLossHead(drop_logits=True)])
    loss, logits = fast(*args)
    assert logits is None
    torch.testing.assert_close(loss, model(*args)[0])


def test_a_file_keeps_the_operator(tmp_path: Any) -> None:
    model, args = Head(HEADS["padded"]).train(), inputs()
    fast = fused(model, *args)
    path = graphopt.save(fast, tmp_path / "head.pt2")
    loaded = graphopt.load(path)
    torch.testing.assert_close(loaded(*args), fast(*args))


def test_an_onnx_file_holds_the_product(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(CLASSES, WIDTH))

        def forward(self, h: Tensor) -> Tensor:
            return F.linear(h, self.w).logsumexp(-1)

    hidden = torch.randn(BATCH, TOKENS, WIDTH)
    fast = fused(Scorer().eval(), hidden)
    result = graphopt.export_onnx(fast, tmp_path / "scorer.onnx")
    assert result.error is not None and result.error < 1e-5


@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_steps_of_training_through_dynamo(target: str, fresh_dynamo: None) -> None:
    """Logits that the step does not return are dropped by Dynamo itself."""
    model, args = Head(_returning).train(), inputs()
    backend = Backend(Options(passes=SMALL_CHUNKS, target=target, measure=False))

    def step(h: Tensor, t: Tensor) -> Tensor:
        return model(h, t)[0]

    fast = torch.compile(step, backend=backend, dynamic=True)
    for tokens in (TOKENS, TOKENS - 10):
        given = args[0][:, :tokens], args[1][:, :tokens]
        (wanted, slopes), (made, found) = (gradients(model, c, *given) for c in (step, fast))
        torch.testing.assert_close(made, wanted)
        for a, b in zip(slopes, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert all("FuseRowSummaries" in [a.rule for a in r.applied] for r in backend.reports)


STATIC_IN_DYNAMO = frozenset({"last rows", "preferred", "two halves", "by index", "groups shifted"})
"""Heads that name sizes (a slice demands one, halves fix one), or that may read fewer rows than
there are, as Dynamo does not know two inputs to be of one size, or a slice to have several rows."""


@pytest.mark.parametrize("name", [n for n in HEADS if n not in STATIC_IN_DYNAMO | SQUARE])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_heads_with_dynamic_sizes_through_dynamo(name: str, fresh_dynamo: None) -> None:
    model, (h, t) = Head(HEADS[name]).train(), inputs()
    backend = Backend(Options(passes=SMALL_CHUNKS, measure=False))
    fast = torch.compile(model, backend=backend, dynamic=True)
    for tokens in (TOKENS, TOKENS - 10):
        given = h[:, :tokens].contiguous(), t[:, :tokens].contiguous()
        (wanted, slopes), (made, found) = (gradients(model, c, *given) for c in (model, fast))
        torch.testing.assert_close(made, wanted)
        for a, b in zip(slopes, found, strict=True):
            scale = float(a.abs().max())
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * scale)
    rules = [[a.rule for a in r.applied] for r in backend.reports]
    assert all("FuseRowSummaries" in r for r in rules), [r.missed for r in backend.reports]


@pytest.mark.parametrize("given", [{}, {"drop_logits": True}, {"lazy_logits": True}], ids=str)
def test_what_capture_asserts_of_logits_does_not_stop_the_pass(given: dict[str, bool]) -> None:
    """``.float()`` leaves an assert of the dtype, which Canonicalize does not take away here."""

    def loss(m: Any, h: Tensor, t: Tensor) -> Any:
        logits = m.logits(h)
        value = F.cross_entropy(logits.float().flatten(0, 1), t.flatten())
        return (value, logits) if given else value

    model, args = Head(loss).train(), inputs()
    fast = fused(model, *args, passes=FuseLossHead(**given))
    (wanted, slopes), (made, found) = (gradients(model, c, *args) for c in (model, fast))
    torch.testing.assert_close(loss_of(made), loss_of(wanted))
    for a, b in zip(slopes, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
