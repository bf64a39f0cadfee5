"""``graphopt::chunked_rows`` by a sweep in place of chunks: run by `test_dispatch`.

Apart from other tests, in a process that has ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cross_entropy_calls import LIMITS
from dispatch_heads import KIN, LOSS, MISSES, head
from heads import CROSS_ENTROPY, Z_LOSS, Call, Head, make
from heads import assert_close as close
from interpreting import scalars_of_one_number  # noqa: F401 - a fixture of all cases

from graphopt.kernels.chunked_rows import dispatch
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.cross_entropy import launch, reference
from graphopt.kernels.filtering import kept

assert os.environ.get("TRITON_INTERPRET") == "1"
LIMITS[torch.bfloat16] = 8e-3
"""The interpreter cuts bfloat16 off where a GPU rounds it."""


@pytest.fixture(autouse=True)
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(dispatch, "by_triton", lambda _: True)


@contextmanager
def refused(where: Any, *names: str) -> Iterator[None]:
    """These must not run inside."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this ran")

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(where, name, refuse)
        yield


@contextmanager
def by_a_sweep() -> Iterator[None]:
    with refused(Loop, "_chunks"), refused(reference, "forward", "backward"):
        yield


@contextmanager
def by_chunks() -> Iterator[None]:
    with refused(launch, "forward", "backward"):
        yield


def as_exact(call: Call, limit: float) -> None:
    """Results and gradients against float64 eager mode; dtypes those of eager mode."""
    exact = call.to(torch.float64)
    found, wanted, eager = call.chunked(), exact.dense(), call.dense()
    assert [f.dtype for f in found] == [e.dtype for e in eager]
    assert [f.requires_grad for f in found] == list(call.head.differentiable)
    close(found, wanted, limit)
    gradients = call.gradients(found)
    assert [g.dtype for g in gradients] == [t.dtype for t in call.leaves]
    close(gradients, exact.gradients(wanted), limit)


@pytest.mark.parametrize("sizes", [(5, 123, 7), (67, 257, 33)], ids=str)
@pytest.mark.parametrize("case", KIN, ids=str)
def test_kin(case: Head, sizes: tuple[int, int, int]) -> None:
    with by_a_sweep():
        as_exact(make(case, *sizes), 1e-5)


@pytest.mark.parametrize("case", KIN[:8], ids=str)
def test_kin_of_several_matrices(case: Head) -> None:
    with by_a_sweep():
        as_exact(make(case, 5, 123, 7, groups=3), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", KIN, ids=str)
def test_kin_in_narrow_dtypes(case: Head, dtype: torch.dtype) -> None:
    call = unit(make(case, 37, 123, 7)).to(dtype)
    scaled = any(s in case.name for s in ("scaled",)) and dtype == torch.float16
    with by_chunks() if scaled else by_a_sweep():
        as_exact(call, 2e-2 if scaled else LIMITS[dtype])


@pytest.mark.parametrize("case", KIN, ids=str)
def test_kin_without_gradients(case: Head) -> None:
    call = make(case, 37, 123, 7)
    with by_a_sweep():
        with torch.no_grad():
            found = call.chunked()
        with torch.inference_mode():
            close(call.chunked(), found, 0.0)
    close(found, call.to(torch.float64).dense(), 1e-5)
    assert not any(f.requires_grad for f in found)


def unit(call: Call) -> Call:
    """With logits of one, whose losses narrow dtypes hold."""
    with torch.no_grad():
        for hidden in call.hidden:
            hidden /= hidden.shape[1] ** 0.5
    return call


@pytest.mark.parametrize("case", MISSES, ids=str)
def test_near_misses(case: Head) -> None:
    with by_chunks():
        as_exact(make(case, 5, 123, 7), 1e-5)


def _turned(call: Call) -> Call:
    weight = [w.detach().T.contiguous().T.requires_grad_() for w in call.weight]
    return replace(call, weight=weight)


def _soft(call: Call) -> Call:
    return replace(call, rows=[torch.rand(5, 123, dtype=torch.float32).softmax(1)])


def _three_numbers_a_row(call: Call) -> Call:
    """Columns that the body would make of them could be many."""
    case = head(
        "weighted thrice",
        f"l = {LOSS}(x, target, None, 0); m = aten.unsqueeze.default(l, 1); "
        "a = aten.mul.Tensor(m, scale)",
        rows=("target", "scale"),
    )
    return replace(call, head=case, rows=[*call.rows, torch.rand(5, 3).requires_grad_()])


def _empty(call: Call) -> Call:
    return make(call.head, 0, 123, 7)


ODD: dict[str, Callable[[Call], Call]] = {
    "float64": lambda call: call.to(torch.float64),
    "a weight by columns": _turned,
    "soft targets": _soft,
    "three numbers a row": _three_numbers_a_row,
    "no rows": _empty,
}


@pytest.mark.parametrize("odd", ODD)
def test_operands_for_chunks(odd: str) -> None:
    call = ODD[odd](make(CROSS_ENTROPY, 5, 123, 7))
    with by_chunks():
        found = call.chunked()
        close(found, call.to(torch.float64).dense(), 1e-5)
        call.gradients(found)


@pytest.mark.parametrize("wrong", [-1, 123])
@pytest.mark.parametrize("recording", [True, False])
def test_a_class_that_does_not_exist_is_named_by_its_row(wrong: int, recording: bool) -> None:
    for case in (CROSS_ENTROPY, KIN[12]):
        call = make(case, 5, 123, 7)
        call.rows[0][3] = wrong
        with torch.set_grad_enabled(recording), pytest.raises(IndexError, match="row 3: "):
            call.chunked()


@pytest.mark.parametrize("ignored", [-100, 0])
def test_targets_to_ignore_are_no_classes_where_they_are_gathered(ignored: int) -> None:
    call = make(KIN[12], 5, 123, 7)
    call.rows[0][:, 0] = ignored
    if ignored < 0:
        with pytest.raises(IndexError, match="row 0: "):
            call.chunked()
    else:
        as_exact(call, 1e-5)


def test_all_rows_are_ignored() -> None:
    for case in (c for c in KIN if c.rows[:1] == ("some",) and "z-loss" not in c.name):
        call = make(case, 5, 123, 7)
        call.rows[0].fill_(-100)
        with by_a_sweep():
            found = call.chunked()
            assert not any(f.any() for f in found)
            assert not any(g.any() for g in call.gradients(found))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_targets_of_other_kinds_end_as_in_eager_mode(kind: torch.dtype) -> None:
    call = make(CROSS_ENTROPY, 5, 123, 7)
    call = replace(call, rows=[call.rows[0].to(kind)])
    try:
        wanted = call.dense()
    except (RuntimeError, IndexError):
        with by_chunks(), pytest.raises((RuntimeError, IndexError)):
            call.chunked()
    else:
        close(call.chunked(), wanted, 1e-5)


@pytest.mark.parametrize("case", [CROSS_ENTROPY, Z_LOSS], ids=str)
def test_kin_with_a_filter(case: Head) -> None:
    """Every seventh class likely, the others hardly."""
    call = unit(make(case, 123, 1000, 33))
    with torch.no_grad():
        call.hidden[0][:, 0], call.weight[0][:, 0] = 4.0, -5.0
        call.weight[0][::7, 0] = 0.0
        call.rows[0].div_(7, rounding_mode="trunc").mul_(7)
    exact, call = call.to(torch.float64), replace(call, filter_threshold=2**-12)
    with by_a_sweep(), kept() as shares:
        found = call.chunked()
        close(call.gradients(found), exact.gradients(exact.dense()), 4e-3)
    assert len(shares) == 1
    assert 0.05 < shares[0].item() < 0.5
    with by_a_sweep(), kept() as shares:
        without = replace(call, filter_threshold=0.0)
        close(without.gradients(without.chunked()), exact.gradients(exact.dense()), 1e-5)
    assert not shares


def test_autocast() -> None:
    call = unit(make(CROSS_ENTROPY, 37, 123, 7))
    exact = call.to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16), by_a_sweep():
        found, eager = call.chunked(), call.dense()
    assert [f.dtype for f in found] == [e.dtype for e in eager]
    close(found, exact.dense(), 8e-3)
    with by_a_sweep():
        gradients = call.gradients(found)
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    close(gradients, exact.gradients(exact.dense()), 1.6e-2)


def test_a_frozen_operand_and_a_second_backward_pass() -> None:
    call = make(Z_LOSS, 37, 123, 7)
    call.weight[0].requires_grad_(False)
    exact = call.to(torch.float64)
    with by_a_sweep():
        loss = call.loss(call.chunked())
        twice = [torch.autograd.grad(loss, call.leaves, retain_graph=True) for _ in range(2)]
    for gradients in twice:
        close(gradients, exact.gradients(exact.dense()), 1e-5)


def test_a_second_derivative() -> None:
    call = make(CROSS_ENTROPY, 5, 23, 7)
    exact, found = call.to(torch.float64), []
    for each, results in ((call, call.chunked()), (exact, exact.dense())):
        first = torch.autograd.grad(each.loss(results), each.leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), each.leaves))
    close(*found, 1e-5)


@pytest.mark.parametrize("recording", [True, False])
def test_results_are_memory_of_their_own(recording: bool) -> None:
    case = head(
        "a logit twice",
        "a = aten.gather.default(x, 1, index); b = aten.squeeze.dim(a, 1); "
        "c = aten.logsumexp.default(x, [1])",
        "[a, b, a, c], []",
        flags=(True,) * 4,
        rows=("index",),
    )
    with torch.set_grad_enabled(recording), by_a_sweep():
        found = make(case, 5, 123, 7).chunked()
    assert len({f.untyped_storage().data_ptr() for f in found}) == len(found)


def test_gradients_of_a_bfloat16_weight_are_summed_in_float32() -> None:
    """The slopes of 2048 rows are each far below the rounding of their sum."""
    call = make(CROSS_ENTROPY, 2048, 3, 2).to(torch.bfloat16)
    with torch.no_grad():
        call.hidden[0].fill_(1.0)
        call.weight[0].zero_()
    call.rows[0].zero_()
    with by_a_sweep():
        (found,) = torch.autograd.grad(call.chunked()[0], call.weight)
    slope = torch.tensor([-2 / 3, 1 / 3, 1 / 3], dtype=torch.float64) * 2048
    close([found], [slope[:, None].expand(3, 2)], 4e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    compiled = torch.compile(
        lambda *t: replace(base, hidden=[t[0]], weight=[t[1]], rows=[t[2]]).chunked()[0],
        backend="aot_eager",
        dynamic=dynamic,
        fullgraph=True,
    )
    for n in (5, 9):
        base = make(CROSS_ENTROPY, n, 123, 7)
        exact = base.to(torch.float64)
        with by_a_sweep():
            loss = compiled(base.hidden[0], base.weight[0], base.rows[0])
            gradients = base.gradients([loss])
            with torch.no_grad():
                close([compiled(base.hidden[0], base.weight[0], base.rows[0])], [loss], 1e-6)
        close([loss], exact.dense(), 1e-5)
        close(gradients, exact.gradients(exact.dense()), 1e-5)
