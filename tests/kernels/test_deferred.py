"""Deferred products: computed when they are read, and then what eager mode gives."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from graphopt.kernels.deferred import DeferredTensor, deferred

ROWS, WIDTH, CLASSES = (2, 5), 7, 11
PLAIN = "def body(x):\n    return [x], []"
CAPPED = """def body(x, b):
    a = aten.add.Tensor(x, b)
    c = aten.tanh.default(a)
    return [c], []"""


class Products:
    """Rows of each product that is taken, on whatever level."""

    rows: list[int]

    def __enter__(self) -> Products:
        self.seen = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seen.__exit__(*error)
        events = self.seen.events()
        self.rows = [e.input_shapes[0][0] for e in events if e.name == "aten::mm"]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.b = nn.Parameter(torch.randn(CLASSES))

    def dense(self, h: Tensor) -> Tensor:
        return (h @ self.w.T + self.b).tanh()

    def forward(self, h: Tensor) -> Tensor:
        flat = deferred([h.reshape(-1, WIDTH)], [self.w], [], [self.b], CAPPED)
        return flat.reshape(*h.shape[:-1], CLASSES)

    def both(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self(h), self.dense(h)


def hidden() -> Tensor:
    return torch.randn(*ROWS, WIDTH, requires_grad=True)


@pytest.fixture(autouse=True, scope="module")
def shapes_known() -> None:
    """The first call of a kind asks fake tensors for its dtype."""
    Head()(hidden())


def plain(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    h, w = torch.randn(n, WIDTH), nn.Parameter(torch.randn(CLASSES, WIDTH))
    return deferred([h], [w], [], [], PLAIN), h, w


def test_what_is_known_without_computing() -> None:
    head, h = Head(), hidden()
    with Products() as seen:
        x = head(h)
        found = x.shape, x.dtype, x.device, x.stride(), x.requires_grad, x.is_leaf, x.numel()
        others = x.float(), x.double(), x.detach(), x[:, -1], x.view(-1, CLASSES), x.mT, x.cpu()
        shown = repr(x)
    assert seen.rows == []
    dense = head.dense(h)
    assert found == (
        dense.shape, dense.dtype, dense.device, dense.stride(), True, False, dense.numel()
    )  # fmt: skip
    assert all(type(t) is DeferredTensor for t in others)
    assert [t.requires_grad for t in others] == [True, True, False, True, True, True, True]
    assert shown == "DeferredTensor(size=(2, 5, 11), dtype=torch.float32, not computed yet)"
    assert isinstance(x, Tensor)


def test_it_is_computed_once() -> None:
    head, h = Head(), hidden()
    with Products() as seen, torch.no_grad():
        x = head(h)
        total = x.sum() + x.logsumexp(-1).sum() + x[0].sum()
    assert seen.rows == [10]
    dense = head.dense(h)
    torch.testing.assert_close(total, dense.sum() + dense.logsumexp(-1).sum() + dense[0].sum())
    assert "not computed" not in repr(x)


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "last": (lambda x: x[:, -1], 2),
    "last, kept": (lambda x: x[:, -1:, :], 2),
    "one row": (lambda x: x[1, 3], 1),
    "every other": (lambda x: x[:, ::2].detach(), 6),
    "flat": (lambda x: x.view(-1, CLASSES)[3:5], 2),
    "unsqueezed": (lambda x: x[0].unsqueeze(0), 5),
    "cast": (lambda x: x.double()[:, :2].float(), 4),
    "cast behind": (lambda x: x[:, :2].double(), 4),
    "exchanged": (lambda x: x.transpose(0, 1)[1], 2),
    "rows behind classes": (lambda x: x.mT[..., 1], 2),
    "classes": (lambda x: x[..., 3:6], 10),
    "no rows": (lambda x: x[:0], 0),
}


@pytest.mark.parametrize("name", VIEWS)
def test_only_the_rows_that_are_read_are_computed(name: str) -> None:
    view, rows = VIEWS[name]
    head, h = Head(), hidden()
    with Products() as seen, torch.no_grad():
        shown = view(head(h))
        assert type(shown) is DeferredTensor
        found = shown.clone()
        shown.sum()
    assert seen.rows == [rows]
    wanted = view(head.dense(h).detach())
    torch.testing.assert_close(found.float(), wanted.float())
    assert found.dtype == wanted.dtype and shown.stride() == wanted.stride()


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x.sin(),
    "rows": lambda x: x[:, -1].sin(),
    "classes": lambda x: x[..., 2:5].sin(),
    "cast": lambda x: x.double().exp(),
    "flat": lambda x: x.view(-1, CLASSES)[3:].log_softmax(-1),
    "in place": lambda x: x.clone().mul_(2).sin(),
    "twice": lambda x: x[0].sin().sum() * x.cos(),
    "indexed": lambda x: x[torch.arange(2), torch.tensor([1, 3])].sin(),
}


@pytest.mark.parametrize("name", READS)
def test_gradients_are_those_of_eager_mode(name: str) -> None:
    head, h = Head(), hidden()
    leaves = [h, *head.parameters()]
    found, wanted = (torch.autograd.grad(READS[name](x).sum(), leaves) for x in head.both(h))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_through_a_write() -> None:
    _, h, w = plain()
    slopes = []
    for x in (deferred([h], [w], [], [], PLAIN), h @ w.T):
        x[1].mul_(2)
        slopes.append(torch.autograd.grad(x.sin().sum(), w)[0])
    torch.testing.assert_close(*slopes)


def test_gradients_in_float64() -> None:
    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return deferred([h], [w], [], [b], CAPPED).clone()

    shapes = (3, 2), (4, 2), (4,)
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_whether_there_is_a_gradient() -> None:
    head, h = Head(), hidden()
    with torch.no_grad():
        assert not head(h).requires_grad
    x = head.requires_grad_(False)(h.detach())
    assert not x.requires_grad and x.grad_fn is None
    h.sum().backward()
    x = head(h)
    x.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        x.sum().backward()


STEPS: dict[str, Callable[[nn.Parameter], Any]] = {
    "SGD": lambda w: torch.optim.SGD([w], 0.1).step(),
    "AdamW": lambda w: torch.optim.AdamW([w], 0.1).step(),
    "fused": lambda w: torch.optim.AdamW([w], 0.1, fused=True).step(),
    "data": lambda w: w.data.sub_(0.1),
    "numpy": lambda w: np.subtract(w.detach().numpy(), 0.1, out=w.detach().numpy()),
    "released": lambda w: w.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("name", STEPS)
def test_changed_weights_are_an_error(name: str) -> None:
    """A step that autograd does not see is no exception."""
    x, _, w = plain()
    last = x[-1:]
    w.grad = torch.ones_like(w)
    STEPS[name](w)
    for read in (x.sum, x.tolist, last.sum, x.double().sum, lambda: pickle.dumps(x)):
        with pytest.raises(RuntimeError, match=r"\(11, 7\).*has changed, by optimizer.step"):
            read()
    assert "not computed yet" in repr(x)


def test_what_was_read_before_stays() -> None:
    x, h, w = plain()
    y, _, v = plain()
    wanted, kept = (h @ w.T).detach(), y.clone()
    x.sum()
    with torch.no_grad():
        w.zero_()
        v.zero_()
    torch.testing.assert_close(x.detach(), wanted)
    assert kept.abs().sum() > 0


def test_rows_as_an_array_are_computed_alone() -> None:
    head, h = Head(), hidden()
    with Products() as seen:
        found = head(h).detach()[:, -1].numpy()
    assert seen.rows == [2] and np.allclose(found, head.dense(h).detach()[:, -1])


def test_changed_hidden_states_are_an_error() -> None:
    x, h, _ = plain()
    h.add_(1)
    with pytest.raises(RuntimeError, match=r"\(3, 7\)"):
        x.sum()


def test_weights_that_are_not_numbers_have_not_changed() -> None:
    w = torch.full((CLASSES, WIDTH), torch.nan)
    assert deferred([torch.ones(3, WIDTH)], [w], [], [], PLAIN).isnan().all()


def test_backward_after_the_weights_changed_is_an_error_as_in_eager_mode() -> None:
    x, _, w = plain()
    total = x.sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda x: x.mul_(2),
    "rows": lambda x: x[:, -1].div_(3),
    "an item": lambda x: x.__setitem__((slice(None), -1), 0.0),
    "classes": lambda x: x[..., 2:].fill_(1.0),
    "masked": lambda x: x.masked_fill_(x > 0, -1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_show_in_views_and_not_in_copies(name: str) -> None:
    head, h = Head(), hidden()
    found = []
    with torch.no_grad():
        for x in head.both(h):
            cast, row, read = x.double(), x[1], x[0].clone()
            WRITES[name](x)
            found.append((x.clone(), cast.clone(), row.clone(), read))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_ways_out_of_torch() -> None:
    head, h = Head(), hidden()
    wanted = head.dense(h).detach()
    with pytest.raises(RuntimeError, match="requires grad"):
        head(h).numpy()
    assert np.allclose(head(h).detach().cpu().numpy(), wanted)
    assert np.allclose(np.asarray(head(h).detach()), wanted)
    assert np.allclose(head(h).tolist(), wanted)
    assert head(h)[0, 0, 0].item() == pytest.approx(wanted[0, 0, 0].item())
    file = io.BytesIO()
    torch.save(head(h).detach(), file)
    file.seek(0)
    x = head(h).detach()
    copies = copy.deepcopy(x), copy.copy(x), pickle.loads(pickle.dumps(x)), torch.load(file)
    for other in (*copies, torch.from_dlpack(x)):
        torch.testing.assert_close(other.clone(), wanted)
    assert x.data_ptr() != 0 and x.untyped_storage().nbytes() == wanted.nbytes
    torch.testing.assert_close(head(h).data.clone(), wanted)


@pytest.mark.parametrize("body", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_the_autocast_of_the_call(body: str) -> None:
    h, w, b = hidden().flatten(0, 1), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        x = deferred([h], [w], [], [] if body == PLAIN else [b], body)
        wanted = h @ w.T if body == PLAIN else (h @ w.T + b).tanh()
    assert x.dtype == wanted.dtype
    torch.testing.assert_close(x.clone(), wanted)
    (found,), (slope,) = (torch.autograd.grad(t.sum(), h, retain_graph=True) for t in (x, wanted))
    torch.testing.assert_close(found, slope)


def test_inference_mode() -> None:
    head, h = Head(), hidden()
    with torch.inference_mode():
        x = head(h * 1)
        torch.testing.assert_close(x[:, -1].argmax(-1), head.dense(h)[:, -1].argmax(-1))
    assert not x.requires_grad
    torch.testing.assert_close(x + 0, head.dense(h).detach())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_hold_ordinary_operators(backend: str, fresh_dynamo: None) -> None:
    head, h = Head(), hidden()
    made = torch.compile(head, backend=backend)(h)
    assert type(made) is Tensor
    torch.testing.assert_close(made, head.dense(h))


def test_compiled_graphs_read_it(fresh_dynamo: None) -> None:
    head, h = Head(), hidden()
    read = torch.compile(lambda x: x.softmax(-1)[..., 0].sum(), backend="aot_eager")
    found, wanted = (torch.autograd.grad(read(x), h)[0] for x in head.both(h))
    torch.testing.assert_close(found, wanted)


def test_traces_and_transforms_see_ordinary_operators() -> None:
    head, h = Head(), hidden().detach()
    exported = torch.export.export(head, (h,), strict=False).run_decompositions()
    targets = {str(n.target) for n in exported.graph.nodes}
    assert not any("deferred" in t for t in targets) and "aten.tanh.default" in targets
    torch.testing.assert_close(exported.module()(h), head.dense(h))
    tangent = torch.ones_like(h)
    found, wanted = (torch.func.jvp(f, (h,), (tangent,)) for f in (head, head.dense))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def body(x):\n    a = aten.sum.default(x)\n    return [], [a]", "gives others"),
        ("def body(x):\n    return [x, x], []", "2 results"),
        ("def body(x, y):\n    return [x], []", "takes 2 tensors"),
        ("def body(x):\n    a = aten.amax.default(x, [1])\n    return [a], []", "no matrix"),
    ],
)
def test_bodies_that_give_no_matrix_are_refused(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deferred([torch.ones(3, WIDTH)], [torch.ones(CLASSES, WIDTH)], [], [], body)
