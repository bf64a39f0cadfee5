"""Row summaries of large products, a chunk of rows at a time: the products are never held whole.

For products ``P_i = hidden_i @ weight_i.T`` with ``hidden_i (N, D_i)`` and ``weight_i (V_i, D_i)``
and a body ``f`` (see `body`), ``graphopt::chunked_rows`` gives ``f(P_1, ..., rows, whole)``: values
per row, concatenated, and sums over rows, accumulated. Tensors in ``rows`` have N rows and are cut
with the products; those in ``whole`` are not.

Memory beyond the results is that of one chunk, ``chunk x V`` numbers, and of what the body computes
from a piece of it, where eager mode holds ``N x V`` a few times over. Slopes take the memory of the
products. What the cross entropy and its kin compute from a product is one softmax in its place, see
`fusing`. Work: one product forward; backward computes it again and takes two more.
Where the one result with a gradient is a sum, its gradients are taken in the forward pass, for a
cotangent of one, which spares computing it again: three products of ``2 N D V`` FLOPs are the
bound. (Not in float16, whose range needs the cotangent first.)

With ``filter_threshold`` slopes that round to nothing are left out of the products that make
gradients of them, see `thinning`; 0, the default, leaves nothing out.

On a GPU, what is of the kin and no more runs by Triton kernels that hold no chunk, see `dispatch`.

A second derivative goes through the products as eager mode has them, in its memory; so do
``torch.func`` and forward-mode differentiation. ``vmap`` over the operator is refused by torch.
"""

from __future__ import annotations

from graphopt.kernels.chunked_rows.autograd import chunked_rows
from graphopt.kernels.chunked_rows.body import Body, read
from graphopt.kernels.chunked_rows.parsing import filled, parse
from graphopt.kernels.chunked_rows.pieces import rows_of_chunk
from graphopt.kernels.chunked_rows.spelling import spell
from graphopt.kernels.chunked_rows.vocabulary import allowed

__all__ = ["Body", "allowed", "chunked_rows", "filled", "parse", "read", "rows_of_chunk", "spell"]
