"""Index tensors that count: ``arange(n)``, and its views, read a dim of size ``n`` in order."""

from __future__ import annotations

from torch.fx import Node

from graphopt.analysis.axis_rules.call import RULES, Call, Carry, State, name_of
from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.pointwise import elementwise
from graphopt.analysis.axis_rules.sizes import Size

_ARANGE = {"aten::arange.default", "aten::arange.start", "aten::arange.start_step"}
_VIEWS = {
    f"aten::{name}"
    for name in (
        "unsqueeze.default", "view.default", "reshape.default", "_unsafe_view.default",
        "expand.default", "alias.default", "clone.default", "_to_copy.default", "to.dtype",
        "to.device", "to.dtype_layout", "squeeze.dim", "permute.default", "transpose.int",
        "lift_fresh_copy.default", "detach.default", "contiguous.default",
    )
}  # fmt: skip


def identity_dim(call: Call, node: Node, extent: Size) -> int | None:
    """The dim along which an index tensor counts ``0 .. extent - 1``; ``None`` if it does not."""
    chain: list[Node] = []
    while name_of(node.target) in _VIEWS or _adds_zero(node):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if name_of(node.target) not in _ARANGE or not _from_zero(call.beside(node), extent):
        return None
    state: State = Carry((Placement((Leg(0, extent),)),), pure=True)
    for view in reversed(chain):
        function = RULES.get(name_of(view.target) or "", elementwise)
        outcome = function(call.beside(view, {view.args[0]: state}))
        (state,) = outcome.states
    (place,) = state.places if state else (Placement(),)
    leg = place.legs[0] if len(place.legs) == 1 else None
    return leg.dim if leg and leg.whole and leg.size == extent else None


def _adds_zero(node: Node) -> bool:
    """``arange(n) + 0``, as masks are built with an offset into a cache."""
    return name_of(node.target) == "aten::add.Tensor" and node.args[1:] == (0,) and not node.kwargs


def _from_zero(arange: Call, extent: Size) -> bool:
    start, step = arange.get("start", default=0), arange.get("step", default=1)
    return start == 0 and step == 1 and arange.results[0] == (extent,)
