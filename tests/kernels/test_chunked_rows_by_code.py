"""Bodies by code of Inductor give what operators give, piece by piece."""

from __future__ import annotations

import pytest
import torch
from heads import CROSS_ENTROPY, DISTILLATION, PAIRS, PER_ROW, assert_close, make

from graphopt.kernels.chunked_rows import chunked_rows, operator
from graphopt.kernels.chunked_rows.compiled import compiled as pieces_of

CHUNK = 10
"""Rows of a chunk; the last chunks are shorter."""


def by_code(call):
    return chunked_rows(
        call.hidden, call.weight, call.rows, call.whole, call.head.body, call.chunk_bytes,
        list(call.head.differentiable), compiled=True,
    )  # fmt: skip


@pytest.fixture
def trusting(monkeypatch):
    """Code for integers too, which are classes here."""
    monkeypatch.setattr(operator, "may_name_classes", lambda _operands: False)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("head", [PER_ROW, DISTILLATION, PAIRS], ids=str)
def test_results_and_gradients_are_those_of_the_dense_head(head):
    call = make(head, 37, 123, 7, chunk_bytes=4 * 123 * CHUNK * head.products)
    exact = call.to(torch.float64)
    found, wanted = by_code(call), exact.dense()
    assert_close(found, wanted, 1e-6)
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)
    runs = pieces_of(head.body, head.products)._made
    assert 1 <= len(runs) <= 2, "code is for any number of rows"


@pytest.mark.usefixtures("trusting")
def test_gradients_are_made_in_the_forward_pass_for_one_sum():
    call = make(CROSS_ENTROPY, 37, 123, 7, chunk_bytes=4 * 123 * CHUNK)
    exact = call.to(torch.float64)
    found, wanted = by_code(call), exact.dense()
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)
    with torch.no_grad():
        assert_close(by_code(call), wanted, 1e-6)


def test_a_class_that_does_not_exist_is_an_error_and_not_the_end(monkeypatch):
    """On several threads code of Inductor would end the process."""
    monkeypatch.setattr(operator, "compiled_pieces", lambda *_: pytest.fail("code is not for it"))
    call = make(CROSS_ENTROPY, 37, 123, 7, chunk_bytes=4 * 123 * CHUNK)
    call.rows[0][23] = 123
    with pytest.raises(IndexError, match="row 23"):
        by_code(call)


@pytest.mark.usefixtures("trusting")
def test_under_autocast_code_is_its_own():
    """Tensors are the same, and what operators make of them is not."""
    call = make(PER_ROW, 12, 31, 7).to(torch.bfloat16)
    for dtype in (None, torch.bfloat16, None):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            found, wanted = by_code(call), call.chunked()
        assert [f.dtype for f in found] == [w.dtype for w in wanted]
        assert_close(found, [w.double() for w in wanted], 2e-2)
