"""``graphopt::chunked_rows`` traced: ``opcheck``, ``torch.compile``, ``torch.export``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from heads import CROSS_ENTROPY, HEADS, PAIRS, PER_ROW, SELECTED, Head, assert_close, make
from torch import Tensor, nn

from graphopt.kernels.chunked_rows import chunked_rows

operators = torch.ops.graphopt
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_opcheck(head: Head) -> None:
    call = make(head, 5, 123, 7, 4 * 123 * 2)
    groups = (call.hidden, call.weight, call.rows, call.whole)
    settings = (head.body, call.chunk_bytes, list(head.differentiable))
    torch.library.opcheck(chunked_rows, (*groups, *settings))
    counts, flags = [len(g) for g in groups], [t.requires_grad for t in call.all]
    tensors = [t.detach() for t in call.all]
    made = operators.chunked_rows_with_gradients.default
    torch.library.opcheck(made, (tensors, counts, *settings), {"wanted": flags})
    pairs = zip(call.dense(), head.differentiable, strict=True)
    cotangents = [torch.randn_like(r) for r, counts_too in pairs if counts_too]
    backward = operators.chunked_rows_backward.default
    totals = [r.detach() for r in call.dense()[1:3]] if head is PAIRS else []
    kwargs = {"wanted": flags, "cotangents": cotangents, "totals": totals}
    torch.library.opcheck(backward, (tensors, counts, *settings), kwargs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW, SELECTED], ids=str)
def test_compiled_with_backward(head: Head, backend: str) -> None:
    call = make(head, 5, 123, 7, 4 * 123 * 2)
    exact = call.to(torch.float64)

    @torch.compile(fullgraph=True, backend=backend)
    def loss() -> Tensor:
        return call.loss(call.chunked())

    found = loss()
    wanted = exact.gradients(exact.dense())
    assert_close([found], [exact.loss(exact.dense())], 1e-5)
    for factor in (1.0, 3.0):
        scaled = torch.autograd.grad(found * factor, call.leaves, retain_graph=True)
        assert_close([g / factor for g in scaled], wanted, 1e-5)


def test_compiled_with_sizes_that_change() -> None:
    flags = list(SELECTED.differentiable)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(h: Tensor, w: Tensor, index: Tensor, scale: Tensor, heat: Tensor) -> Tensor:
        return chunked_rows([h], [w], [index, scale], [heat], SELECTED.body, 999, flags)[1]

    for n in (5, 123, 2):
        call = make(SELECTED, n, 123, 7)
        found = torch.autograd.grad(loss(*call.all), call.leaves)
        exact = call.to(torch.float64)
        assert_close(found, torch.autograd.grad(exact.dense()[1], exact.leaves), 1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_compiled_with_all_sizes_open(reduction: str) -> None:
    """Classes and features too, as where all operands are arguments of a function."""
    body = "def body(x, t):\n    a = aten.cross_entropy_loss.default(x, t, None, 0)\n"
    ends = {"none": "    return [a], []", "sum": "    b = aten.sum.default(a)\n    return [], [b]"}
    ends["mean"] = "    b = aten.mean.default(a)\n    return [], [b]"

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return chunked_rows([h], [w], [t], [], body + ends[reduction], 2**20, [True])[0]

    call = make(CROSS_ENTROPY, 5, 123, 7)
    h, w, t = call.hidden[0], call.weight[0], call.rows[0]
    wanted = torch.nn.functional.cross_entropy(h @ w.mT, t, reduction=reduction)
    assert_close([loss(h, w, t)], [wanted.double()], 1e-5)


def test_compiled_under_autocast() -> None:
    call = make(PER_ROW, 123, 123, 7, 4 * 123 * 2)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            results = call.chunked()
        return call.loss(results)

    wanted = torch.autograd.grad(loss(), call.leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(), call.leaves), wanted, 1e-6)


class Scored(nn.Module):
    """A loss and a record of values per row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(123, 7))
        self.heat = nn.Parameter(torch.tensor(1.7))

    def forward(self, h: Tensor, index: Tensor, scale: Tensor) -> list[Tensor]:
        groups = ([h], [self.weight], [index, scale], [self.heat])
        flags = list(SELECTED.differentiable)
        return chunked_rows(*groups, SELECTED.body, 999, flags)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_saved_and_loaded(tmp_path: Path, dynamic: bool) -> None:
    model, call = Scored(), make(SELECTED, 5, 123, 7)
    given = (call.hidden[0].detach(), call.rows[0], call.rows[1].detach())
    rows = {0: torch.export.Dim("rows", min=2, max=1000)}
    shapes = {"h": rows, "index": rows, "scale": rows} if dynamic else None
    program = torch.export.export(model, given, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    for n in (5, 123) if dynamic else (5,):
        other = make(SELECTED, n, 123, 7)
        inputs = (other.hidden[0].detach(), other.rows[0], other.rows[1].detach())
        found, wanted = loaded(*inputs), model(*inputs)
        assert_close(found, wanted, 1e-6)
        pairs = ((found[1], loaded.parameters()), (wanted[1], model.parameters()))
        assert_close(*(torch.autograd.grad(loss, list(leaves)) for loss, leaves in pairs), 1e-6)


def test_a_wrong_number_of_rows_is_refused_while_tracing() -> None:
    call = make(CROSS_ENTROPY, 5, 123, 7)
    call.rows[0] = torch.zeros(6, dtype=torch.long)
    with torch._subclasses.FakeTensorMode() as mode:
        groups = (call.hidden, call.weight, call.rows, call.whole)
        fakes = [[mode.from_tensor(t) for t in group] for group in groups]
        with pytest.raises(ValueError, match=r"\(6,\) stands beside hidden, which has 5 rows"):
            chunked_rows(*fakes, CROSS_ENTROPY.body, 0, [True])
