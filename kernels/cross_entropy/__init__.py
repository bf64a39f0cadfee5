"""The cross-entropy kin from one sweep over the logits, which are never held whole.

For ``hidden (N, D)``, ``weight (V, D)`` and ``target (N,)``, ``graphopt::cross_entropy_rows`` gives
per row the log-sum-exp, the target's logit and, where asked for, the sum of the logits, their
entropy and their argmax; any loss is made of them. Rows whose target is ``ignore_index`` have 0 as
its logit. Results are float32, whatever the operands.

`reference` is the definition and runs everywhere; on a GPU, Triton kernels run, loaded then.
Forward is one product of ``2 N V D`` FLOPs and backward three, or two where hidden or weight is
frozen; see `launch` for what is moved and held. Memory is that of the gradients, 32 MiB and
``4 N D`` bytes. A second derivative goes through the logits as eager mode has them.
"""

from __future__ import annotations

from graphopt.kernels.cross_entropy.autograd import cross_entropy_rows

__all__ = ["cross_entropy_rows"]
