"""Tensors made from sizes, and sizes read off tensors: they do not depend on values."""

from __future__ import annotations

from sympy import Expr
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.analysis.axis_rules.call import Call, Carry, Outcome, rule


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
      "randint_like", "randint_like.low_dtype")  # fmt: skip
def like(call: Call) -> Outcome:
    """Shaped like its operand, and so sliced with it, whatever the values were."""
    places = call.places(call.main)
    state = Carry(places, pure=True) if len(places) == 1 else None
    return Outcome((state,), random="rand" in call.op)


@rule("zeros", "ones", "full", "empty.memory_format", "arange", "arange.start",
      "arange.start_step", "linspace", "eye", "eye.m", "rand", "randn", "randint", "randint.low",
      "randperm", "scalar_tensor", "tril_indices", "triu_indices", "new_zeros", "new_ones",
      "new_full", "new_empty")  # fmt: skip
def create(call: Call) -> Outcome:
    return Outcome((None,) * len(call.results))


@rule("sym_size.int", "sym_numel", "sym_stride.int", "sym_storage_offset")
def measure(call: Call) -> Outcome:
    """A size is free of values, unless values decided the shape (``nonzero``)."""
    shape = call.shape(call.main)
    decided = any(isinstance(s, Expr) and free_unbacked_symbols(s) for s in shape)
    state = call.state(call.main)
    return Outcome((Carry((), pure=False) if state and decided else None,))
