"""One form for what can be written in many ways, and nothing of what capture leaves behind.

Every other pass matches what this one leaves: no asserts on dtypes, no copies or views that change
nothing, chains of views merged, one spelling per operation, products with weights as ``linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.passes.canonicalize import (
    asserts,
    broadcasts,
    copies,
    dims,
    gradients,
    linear,
    masks,
    spelling,
    views,
)
from graphopt.rewrite import Pass, Rule

__all__ = ["Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring the program into the form that other passes match."""

    def rules(self) -> Sequence[Rule]:
        return (
            asserts.MetadataAssert(),
            asserts.TrueAssert(),
            copies.PlainCopy(),
            copies.CopyBeforeReshape(),
            copies.WholeWrite(),
            copies.WriteOfItself(),
            copies.ReadOfWrite(),
            views.SameShape(),
            views.RowMajorRoundTrip(),
            views.ReshapeOfReshape(),
            views.PermuteForm(),
            views.PermuteOfPermute(),
            views.ExpandOfExpand(),
            views.SplitForm(),
            broadcasts.BroadcastForm(),
            views.NothingAdded(),
            gradients.InertDetach(),
            dims.DimForm(),
            spelling.ScalarOverload(),
            spelling.PlainBitwise(),
            spelling.Square(),
            spelling.Root(),
            spelling.ReversedSub(),
            spelling.TypeAs(),
            spelling.SubNumber(),
            spelling.DivPowerOfTwo(),
            spelling.TimesOne(),
            spelling.PlusNothing(),
            linear.TransposedWeight(),
            linear.PlainWeight(),
            linear.BiasAfterLinear(),
            linear.FlatLinear(),
            masks.WholeIndex(),
            masks.AndTrue(),
            masks.TrueMask(),
        )
