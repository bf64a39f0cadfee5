"""Samples of reads and writes by index, and of operators with several inputs of their own kind."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)
from axis_check import Draw, Sample, b, f, i, s

x = f(3, 4, 5)
SORTED = Draw(lambda: torch.rand(3, 6).cumsum(1))
ENDS = Draw(lambda: torch.tensor([int(torch.randint(1, 8, ())), 8], dtype=torch.int32))
SOMETIMES = Draw(lambda: (torch.rand(2) < 0.3).long())
EDGES = Draw(lambda: torch.rand(6).cumsum(0))

SAMPLES: list[Sample] = [
    s("gather", x, 1, i(4, 3, 2, 5)), s("gather", x, 0, i(3, 2, 4, 5)),
    s("gather", x, 2, i(5, 3, 3, 2)),
    s("take_along_dim", f(3, 4), i(4, 3, 2), 1), s("take_along_dim", f(3, 4), i(12, 5)),
    s("take", f(3, 4), i(12, 5)), s("index_select", x, 1, i(4, 6)),
    s("embedding", f(9, 4), i(9, 2, 3)), s("one_hot", i(5, 2, 3), 5), s("one_hot", i(50, 3)),
    s("bucketize.Tensor", f(3, 4), EDGES), s("isin.Tensor_Tensor", i(9, 3, 4), i(9, 5)),
    s("isin.Tensor_Scalar", i(3, 3, 4), 2), s("isin.Scalar_Tensor", 1, SOMETIMES),
    s("bucketize.Scalar", 0.5, EDGES), s("searchsorted.Tensor", SORTED, f(3, 5)),
    s("searchsorted.Tensor", EDGES, f(3, 5)), s("searchsorted.Scalar", EDGES, 0.5),
    s("repeat_interleave.self_Tensor", f(3, 4), i(3, 4), 1),
    s("repeat_interleave.self_Tensor", f(2, 2), i(3, 4)), s("repeat_interleave.Tensor", i(3, 4)),
    *(s(name, *args) for name in ("index.Tensor", "_unsafe_index.Tensor") for args in
      [(x, [None, i(4, 6)]), (x, [i(3, 2, 1), i(4, 6)]), (x, [i(3, 6), None, i(5, 2, 6)])]),
    s("index.Tensor", x, [b(3, 4)]), s("index.Tensor", x, [None, b(4)]),
    s("index.Tensor_hacked_twin", x, [i(3, 6)]),
    s("_unsafe_index.Tensor_hacked_twin", x, [i(3, 6)]),
    *(s(name, *args) for name in ("index_put", "_unsafe_index_put") for args in
      [(x, [None, i(4, 2)], f(3, 2, 5)), (x, [i(3, 2), i(4, 2)], f(5), True), (x, [b(3, 4)], f())]),
    s("index_put", x, [b(3, 4)], f(5)), s("index_put", f(2, 2), [b(2, 2)], f(1)),
    s("index_put", f(4, 3), [Draw(lambda: torch.tensor([True, False, True, False]))], f(2, 3),
      careful=[(1, 0)]),
    s("index_put.hacked_twin", x, [i(3, 2)], f(2, 4, 5)),
    s("_unsafe_index_put.hacked_twin", x, [i(3, 2)], f(2, 4, 5)),
    s("scatter.src", x, 1, i(4, 3, 2, 5), f(3, 2, 5)),
    s("scatter.value", x, 0, i(3, 2, 4, 3), 1.0),
    s("scatter.reduce", x, 1, i(4, 3, 4, 5), x, reduce="add"),
    s("scatter.value_reduce", x, 1, i(4, 3, 4, 5), 2.0, reduce="multiply"),
    s("scatter_add", x, 2, i(5, 3, 4, 2), f(3, 4, 3)),
    s("scatter_reduce.two", x, 1, i(4, 3, 2, 5), f(3, 2, 5), "amax"),
    s("index_add", x, 1, i(4, 2), f(3, 2, 5)), s("index_copy", x, 1, i(4, 2), f(3, 2, 5)),
    s("index_reduce", x, 1, i(4, 2), f(3, 2, 5), "amax"),
    s("index_fill.int_Scalar", x, 1, i(4, 2), 1.0),
    s("index_fill.int_Tensor", x, 1, i(4, 2), f()), s("select_scatter", x, f(3, 5), 1, 2),
    s("slice_scatter", x, f(3, 2, 5), 1, 1, 3), s("slice_scatter", x, f(3, 4, 2), 2, 0, 4, 2),
    s("masked_scatter", f(3, 4), b(3, 4), f(20)), s("masked_scatter", f(3, 4), b(3, 1), f(20)),
    s("transformers::grouped_mm_fallback", f(8, 4), f(2, 4, 8), ENDS),
    s("_grouped_mm", f(8, 4), f(2, 4, 8), ENDS),
]  # fmt: skip
