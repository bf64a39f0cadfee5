"""Results and gradients of ``graphopt::chunked_rows`` against eager mode in float64."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import (
    CROSS_ENTROPY,
    HEADS,
    PER_ROW,
    SELECTED,
    Z_LOSS,
    Call,
    Head,
    Recorder,
    assert_as_exact,
    assert_close,
    error,
    make,
)

from graphopt.kernels.chunked_rows import chunked_rows, read
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.chunked_rows.operands import Operands
from graphopt.kernels.chunked_rows.pieces import spans

SIZES = [(5, 123, 7), (123, 123, 7), (123, 4099, 7)]
PIECES = [1, 2, 5, 1000]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_results_and_gradients_are_those_of_eager_mode(
    head: Head, sizes: tuple[int, int, int], pieces: int
) -> None:
    n, v, d = sizes
    chunk_bytes = 4 * v * head.products * -(-n // pieces)
    call = make(head, n, v, d, chunk_bytes)
    exact = call.to(torch.float64)
    found, wanted = call.chunked(), exact.dense()
    assert_close(found, wanted, 1e-5)
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_weight_of_several_matrices(head: Head, pieces: int) -> None:
    """Each row of hidden has a row of results for each of them."""
    n, v, d, groups = 23, 41, 7, 3
    chunk_bytes = 4 * v * groups * head.products * -(-n // pieces)
    call = make(head, n, v, d, chunk_bytes, groups)
    exact = call.to(torch.float64)
    found, wanted = call.chunked(), exact.dense()
    assert_close(found, wanted, 1e-5)
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)


def test_matrices_of_a_weight_in_any_layout() -> None:
    call = make(PER_ROW, 23, 41, 7, 4 * 41 * 8, 3)
    turned = call.weight[0].detach().mT.contiguous().mT.requires_grad_()
    other = Call(call.head, call.hidden, [turned], call.rows, call.whole, call.chunk_bytes)
    for a, b in zip(*(c.gradients(c.chunked()) for c in (call, other)), strict=True):
        assert torch.equal(a, b)


def test_the_row_that_fails_is_counted_with_its_group() -> None:
    call = make(CROSS_ENTROPY, 23, 41, 7, 4 * 41 * 9, 3)
    call.rows[0][3 * 17 + 2] = 41
    with pytest.raises(IndexError, match="row 53: Target 41 is out of bounds"):
        call.chunked()


def test_weights_of_several_matrices_stand_beside_as_many() -> None:
    call = make(CROSS_ENTROPY, 23, 41, 7, groups=3)
    call.rows[0] = call.rows[0][:23]
    with pytest.raises(ValueError, match="23 rows, 3 for each"):
        call.chunked()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW, Z_LOSS], ids=str)
def test_narrow_dtypes_are_as_exact_as_eager_mode(head: Head, dtype: torch.dtype) -> None:
    call = make(head, 123, 123, 7, 2 * 123 * 10).to(dtype)
    exact = call.to(torch.float64)
    found, eager = call.gradients(call.chunked()), call.gradients(call.dense())
    assert [g.dtype for g in found] == [dtype] * len(found)
    assert_as_exact(found, eager, exact.gradients(exact.dense()), 4e-3)


def test_gradients_of_a_bfloat16_weight_are_summed_in_float32() -> None:
    rows, classes, features = 4096, 3, 2
    call = make(CROSS_ENTROPY, rows, classes, features, 16 * 2 * classes)
    call.hidden[0] = torch.ones(rows, features, dtype=torch.bfloat16)
    call.weight[0] = torch.zeros(classes, features, dtype=torch.bfloat16, requires_grad=True)
    call.rows[0] = torch.zeros(rows, dtype=torch.long)
    (total,) = call.chunked()
    (found,) = torch.autograd.grad(total, call.weight)
    slope = torch.tensor([-2 / 3, 1 / 3, 1 / 3], dtype=torch.float64) * rows
    assert error(found, slope[:, None].expand(classes, features)) < 4e-3


def test_float16_takes_its_cotangent_before_the_product() -> None:
    """Slopes of this head are 1e-4 and less: alone they would lose bits that 4096 of them keep."""
    call = make(CROSS_ENTROPY, 5, 4099, 7).to(torch.float16)
    exact = call.to(torch.float64)
    scale = 4096.0
    (found,), (wanted,) = call.chunked(), exact.dense()
    gradients = torch.autograd.grad(found * scale, call.leaves)
    expected = torch.autograd.grad(wanted * scale, exact.leaves)
    assert_close(gradients, expected, 2e-3)


def test_where_gradients_are_taken() -> None:
    """In the forward pass where one sum has them; not in float16, and not for values per row."""
    apart = ["chunked_rows", "chunked_rows_backward"]
    assert _called(make(CROSS_ENTROPY, 5, 9, 7)) == ["chunked_rows_with_gradients"]
    assert _called(make(SELECTED, 5, 9, 7)) == ["chunked_rows_with_gradients"]
    assert _called(make(PER_ROW, 5, 9, 7)) == apart
    assert _called(make(Z_LOSS, 5, 9, 7)) == apart
    assert _called(make(CROSS_ENTROPY, 5, 9, 7).to(torch.float16)) == apart


def _called(call: Call) -> list[str]:
    """The operators behind one forward and backward pass."""
    with Recorder() as seen:
        call.gradients(call.chunked())
    return [n.removeprefix("graphopt::") for n in seen.names if n.startswith("graphopt")]


def test_no_rows() -> None:
    for head in HEADS:
        call = make(head, 0, 123, 7)
        found, wanted = call.chunked(), call.dense()
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            assert mine.equal(theirs)
        assert all(not g.any() for g in call.gradients(found))


def test_all_rows_ignored() -> None:
    call = make(PER_ROW, 5, 123, 7, 4 * 123 * 2)
    call.rows[0].fill_(-100)
    (loss,) = call.chunked()
    assert not loss.any()
    assert all(not g.any() for g in call.gradients([loss]))


def test_dtypes_of_results() -> None:
    real = torch.float32
    made = make(Z_LOSS, 5, 123, 7, 1).chunked()
    assert [t.dtype for t in made] == [real, torch.int64, real, real, torch.int64]


def test_a_target_out_of_range_is_named_by_its_row() -> None:
    for chunk_bytes in (0, 1, 4 * 123 * 2):
        call = make(CROSS_ENTROPY, 5, 123, 7, chunk_bytes)
        call.rows[0][3] = 123
        with pytest.raises(IndexError, match=r"row 3: Target 123 is out of bounds"):
            call.chunked()
        with torch.no_grad(), pytest.raises(IndexError, match="row 3: "):
            call.chunked()
    call.rows[0].fill_(-1)
    with pytest.raises(IndexError, match="row 0: "):
        call.chunked()


def test_an_index_out_of_range_is_named_by_its_row() -> None:
    call = make(SELECTED, 5, 123, 7, 4 * 123 * 2)
    call.rows[0][4] = 200
    with pytest.raises(RuntimeError, match=r"row 4: index 200 is out of bounds"):
        call.chunked()


def test_an_error_that_no_row_is_to_blame_for_is_left_alone() -> None:
    call = make(PER_ROW, 5, 123, 7)
    call.whole[0] = torch.randn(122)
    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):
        call.chunked()


REFUSALS = {
    "rows of another number": (
        lambda c: c.rows.__setitem__(0, torch.zeros(6, dtype=torch.long)),
        r"\(6,\) stands beside hidden, which has 5 rows",
    ),
    "rows without axes": (
        lambda c: c.rows.__setitem__(0, torch.tensor(1)),
        r"\(\) stands beside hidden, which has 5 rows",
    ),
    "too few tensors": (lambda c: c.rows.clear(), "the body takes 2 tensors; there are 1"),
    "no product": (lambda c: c.hidden.clear(), "0 hidden and 1 weight tensors"),
    "three axes": (
        lambda c: c.hidden.__setitem__(0, torch.zeros(5, 1, 7)),
        "are not matrices",
    ),
    "other columns": (
        lambda c: c.hidden.__setitem__(0, torch.zeros(5, 8)),
        r"hidden \(5, 8\) and weight \(123, 7\) differ in their columns",
    ),
    "negative size": (lambda c: setattr(c, "chunk_bytes", -1), "chunk_bytes is -1"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("gradient", [True, False])
def test_operands_that_do_not_fit_are_refused(case: str, gradient: bool) -> None:
    call = make(CROSS_ENTROPY, 5, 123, 7)
    damage, message = REFUSALS[case]
    damage(call)
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=message):
        call.chunked()
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        call.chunked()


def test_results_that_are_no_summaries_are_refused() -> None:
    h, w = torch.randn(5, 7), torch.randn(9, 7)
    sliced = "def body(x):\n    a = aten.slice.Tensor(x, 0, 0, 2)\n    return [a], []"
    with pytest.raises(ValueError, match=r"`a` is \(2, 9\) for 5 rows"):
        chunked_rows([h], [w], [], [], sliced, 0, [True])
    with pytest.raises(ValueError, match=r"`x` is \(5, 9\), where a sum has no axes"):
        chunked_rows([h], [w], [], [], "def body(x):\n    return [], [x]", 0, [True])
    with pytest.raises(ValueError, match="the body gives 1 results; `differentiable` names 2"):
        chunked_rows([h], [w], [], [], sliced, 0, [True, True])


def test_results_do_not_alias_operands() -> None:
    h, w, r, s = torch.randn(5, 7), torch.randn(9, 7), torch.randn(5), torch.randn(())
    body = "def body(x, r, s):\n    return [r], [s]"
    row, total = chunked_rows([h], [w], [r], [s], body, 0, [False, False])
    assert row.equal(r)
    assert total.equal(s)
    assert row.data_ptr() != r.data_ptr()
    assert total.data_ptr() != s.data_ptr()


@pytest.mark.parametrize("count", [0, 1, 5, 123, 2048])
@pytest.mark.parametrize("chunk_bytes", [0, 1, 4 * 9 * 3, 10**9])
def test_spans_cover_all_rows_evenly(count: int, chunk_bytes: int) -> None:
    h, w = torch.empty(count, 7), torch.empty(9, 7)
    found = list(spans(Operands([h], [w], [], []), chunk_bytes))
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(count))
    lengths = [s.stop - s.start for s in found]
    most = max(1, chunk_bytes // 36) if chunk_bytes else 10**9
    assert max(lengths) <= most
    assert len(lengths) == max(1, -(-count // most)) or max(lengths[:-1]) == most


def test_more_numbers_than_an_index_of_32_bits_holds() -> None:
    """Chunks are cut by size alone: products of 2^31 numbers and more are never one tensor."""
    n, v = 2**20, 2**18
    with torch.device("meta"):
        operands = Operands([torch.empty(n, 8)], [torch.empty(v, 8)], [], [])
    found = list(spans(operands, 0))
    assert found[-1].stop == n
    assert max(s.stop - s.start for s in found) * v < 2**31


@pytest.mark.parametrize("head", [CROSS_ENTROPY, PER_ROW, Z_LOSS], ids=str)
def test_the_largest_tensor_is_a_chunk_or_a_gradient(head: Head) -> None:
    call = make(head, 256, 4099, 7)
    operands = Operands(call.hidden, call.weight, call.rows, call.whole)
    loop = Loop(read(head.body), operands, 4 * 4099 * 8)
    with Recorder() as seen, torch.no_grad():
        loop.run_with_gradients([t.requires_grad for t in call.all], head.differentiable)
    assert max(seen.sizes) == 8 * 4099


def test_a_product_is_freed_once_the_body_has_read_it() -> None:
    body = read(
        """def body(x):
    a = aten.exp.default(x)
    b = aten.sum.default(a)
    return [], [b]"""
    )
    tensors = [torch.randn(5, 9)]
    watch = weakref.ref(tensors[0])

    class Watcher(Recorder):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.sizes.append(0 if watch() is None else 1)
            return func(*args, **(kwargs or {}))

    with Watcher() as seen:
        body(tensors)
    assert seen.sizes == [1, 0]


def test_the_mean_of_a_loss_of_known_value() -> None:
    n, v = 123, 4099
    h, w = torch.zeros(n, 7), torch.zeros(v, 7)
    target = torch.arange(n)
    (total,) = chunked_rows([h], [w], [target], [], CROSS_ENTROPY.body, 4 * v * 7, [True])
    assert total.item() / n == pytest.approx(F.cross_entropy(h @ w.T, target).item(), rel=1e-6)
