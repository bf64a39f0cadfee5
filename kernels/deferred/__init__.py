"""Large products that are computed when somebody reads them, and not before.

``graphopt::deferred(hidden, weight, rows, whole, body)`` stands for ``f(P_1, ..., rows, whole)``
with ``P_i = hidden_i @ weight_i.T`` and a body ``f`` (see `graphopt.kernels.chunked_rows`) that
gives one matrix ``(N, V)``. A call takes no time and no memory but that of ``hidden``: it gives a
`DeferredTensor` that knows its shape, dtype, device and history, and so do views of it.

The first operator that reads a number computes it, once, under the autocast of the call. Rows that
are cut out first (``logits[:, -1]``) are computed alone. Gradients flow to the operands as those of
the ordinary operators do. Where a call is traced (`torch.export`, Inductor, ``torch.func``, forward
mode), and for operands that are subclasses of tensors, it is the ordinary operators.

What it is computed from must not change before it is read; that it did is an error.
"""

from __future__ import annotations

from graphopt.kernels.deferred.operator import deferred
from graphopt.kernels.deferred.tensor import VIEWS, DeferredTensor

__all__ = ["VIEWS", "DeferredTensor", "deferred"]
