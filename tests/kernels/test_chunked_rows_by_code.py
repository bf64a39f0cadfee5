"""Bodies by code of Inductor give what operators give, piece by piece."""

from __future__ import annotations

import pytest
import torch
from heads import CROSS_ENTROPY, DISTILLATION, PAIRS, PER_ROW, assert_close, make

from graphopt.kernels.chunked_rows import chunked_rows
from graphopt.kernels.chunked_rows.compiled import compiled as pieces_of

CHUNK = 10
"""Rows of a chunk; the last chunks are shorter."""


def by_code(call):
    return chunked_rows(
        call.hidden, call.weight, call.rows, call.whole, call.head.body, call.chunk_bytes,
        list(call.head.differentiable), compiled=True,
    )  # fmt: skip


@pytest.mark.parametrize("head", [PER_ROW, DISTILLATION, PAIRS], ids=str)
def test_results_and_gradients_are_those_of_the_dense_head(head):
    call = make(head, 37, 123, 7, chunk_bytes=4 * 123 * CHUNK * head.products)
    exact = call.to(torch.float64)
    found, wanted = by_code(call), exact.dense()
    assert_close(found, wanted, 1e-6)
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)
    runs = pieces_of(head.body, head.products)._made
    assert len(runs) <= 2, "code is for any number of rows"


def test_gradients_are_made_in_the_forward_pass_for_one_sum():
    call = make(CROSS_ENTROPY, 37, 123, 7, chunk_bytes=4 * 123 * CHUNK)
    exact = call.to(torch.float64)
    found, wanted = by_code(call), exact.dense()
    assert_close(call.gradients(found), exact.gradients(wanted), 1e-5)
    with torch.no_grad():
        assert_close(by_code(call), wanted, 1e-6)
    call.rows[0][23] = 123
    with pytest.raises(RuntimeError, match="row 23"):
        by_code(call)
