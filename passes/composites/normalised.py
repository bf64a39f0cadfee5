"""Values divided by the root of their own mean square."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.passes.composites.expressions import (
    CASTS,
    is_call,
    is_tensor,
    number,
    same_value,
    scaled,
    upward,
)
from graphopt.program import Program, val
from graphopt.rewrite import Refusal, arguments

aten = torch.ops.aten

DEVIATIONS = (aten.std.dim, aten.std.correction, aten.linalg_vector_norm.default)
ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar, *DEVIATIONS)
VARIANCES = (aten.var.dim, aten.var.correction)


@dataclass(frozen=True)
class Normalised:
    """``node = x / sqrt(mean(x^2) + eps)``, or of ``x - mean(x)`` where ``centred``.

    Attributes:
        axes: how many trailing axes are normalised over.
        nodes: all operator nodes, ``node`` first.
    """

    node: fx.Node
    x: fx.Node
    eps: float
    axes: int
    centred: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Moment:
    """``mean((x - centre)^2)`` over ``dims``; ``centre`` 0 or the mean; ``x`` as it was squared."""

    x: fx.Node
    dims: tuple[int, ...]
    variance: bool
    nodes: tuple[fx.Node, ...]


def by_variance(root: fx.Node) -> bool:
    """Whether a root is taken of a variance, rather than of a mean of squares."""
    kinds = (*VARIANCES, aten.std.dim, aten.std.correction, aten.var_mean.correction)
    return any(is_call(n, *kinds) for n in upward(root, 3))


def read_normalised(program: Program, root: fx.Node) -> Normalised | Refusal | None:
    """Read upwards and downwards from a root; ``None`` where it is no norm at all."""
    if root.target in DEVIATIONS:
        return _deviation(program, root)
    if root.target is aten.pow.Tensor_Scalar and number(program, root.args[1]) not in (0.5, -0.5):
        return None
    inside, eps, nodes = _epsilon(program, root.args[0])
    moment = _moment(program, inside)
    if moment is None:
        return None
    if isinstance(moment, Refusal):
        return moment
    divided = _divided(program, root)
    if divided is None:
        return None
    if isinstance(divided, Refusal):
        return divided
    node, numerator, between = divided
    inner = (*between, root, *nodes, *moment.nodes)
    return _assemble(node, numerator, moment, eps, inner)


def _assemble(
    node: fx.Node, numerator: fx.Node, moment: _Moment, eps: float, inner: tuple[fx.Node, ...]
) -> Normalised | Refusal:
    """Check that the numerator is what was measured; take casts around the whole into it."""
    centre = _centred(numerator, moment.dims)
    if moment.variance:
        if centre is None or not same_value(centre[0], moment.x):
            return Refusal("the numerator is not the deviation from the mean", node)
        inner = (*inner, numerator, *centre[1])
        x, centred = moment.x, True
    elif not same_value(numerator, moment.x):
        return Refusal("another tensor is normalised than is measured", node)
    elif centre is not None:
        squared = _centred(moment.x, moment.dims)
        inner = (*inner, numerator, *centre[1], moment.x, *(squared[1] if squared else ()))
        x, centred = centre[0], True
    else:
        x, centred = moment.x, False
    rank = val(x).dim()
    wanted = tuple(range(rank - len(moment.dims), rank))
    if tuple(sorted(d % rank for d in moment.dims)) != wanted:
        reason = f"the mean is over axes {list(moment.dims)}: norms run over the last ones"
        return Refusal(reason, node)
    if not val(x).dtype.is_floating_point:
        return Refusal("a norm of integers", node)
    return _with_casts(Normalised(node, x, eps, len(wanted), centred, (node, *inner)))


def _with_casts(found: Normalised) -> Normalised:
    """Widen to ``cast(norm(cast(x)))``, where the outer cast goes back to the dtype of ``x``."""
    users = list(found.node.users)
    if not is_call(found.x, *CASTS) or len(users) != 1 or not is_call(users[0], *CASTS):
        return found
    source, after = found.x.args[0], users[0]
    inner, outer = val(source).dtype, val(found.x).dtype
    fits = inner == val(after).dtype and inner.is_floating_point and inner.itemsize < outer.itemsize
    if not fits or after.args[0] is not found.node:
        return found
    nodes = (after, *found.nodes, found.x)
    return Normalised(after, source, found.eps, found.axes, found.centred, nodes)


def _epsilon(program: Program, node: Any) -> tuple[Any, float, tuple[fx.Node, ...]]:
    """``value, eps, nodes`` of ``value + eps``; zero where nothing is added."""
    if is_call(node, aten.add.Tensor) and arguments(node)["alpha"] == 1:
        for value, other in (node.args[:2], node.args[1::-1]):
            if (eps := number(program, other)) is not None:
                return value, eps, (node,)
    return node, 0.0, ()


def _moment(program: Program, node: Any) -> _Moment | Refusal | None:
    if is_call(node, *VARIANCES):
        return _variance(node, (node,))
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.var_mean.correction):
        return _variance(node.args[0], (node, node.args[0])) if node.args[1] == 0 else None
    if not is_call(node, aten.mean.dim):
        return None
    given = arguments(node)
    squared = _square(program, given["self"])
    if squared is None or not given["keepdim"] or given["dtype"] is not None or not given["dim"]:
        return None
    return _Moment(squared, tuple(given["dim"]), False, (node, given["self"]))


def _variance(node: fx.Node, nodes: tuple[fx.Node, ...]) -> _Moment | Refusal | None:
    given = arguments(node)
    if not given["keepdim"] or not given["dim"]:
        return None
    if _correction(given) != 0:
        return Refusal("the variance is the unbiased one: layer_norm divides by n", node)
    return _Moment(given["self"], tuple(given["dim"]), True, nodes)


def _correction(given: dict[str, Any]) -> Any:
    if "unbiased" in given:
        return int(given["unbiased"])
    return 1 if given["correction"] is None else given["correction"]


def _square(program: Program, node: Any) -> fx.Node | None:
    if is_call(node, aten.pow.Tensor_Scalar) and number(program, node.args[1]) == 2.0:
        return node.args[0]
    if is_call(node, aten.square.default):
        return node.args[0]
    same = is_call(node, aten.mul.Tensor) and same_value(*node.args[:2])
    return node.args[0] if same and is_tensor(node.args[0]) else None


def _centred(node: Any, dims: tuple[int, ...]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """``x`` and the nodes of the mean, where the node is ``x - mean(x)`` over ``dims``."""
    if not is_call(node, aten.sub.Tensor) or arguments(node)["alpha"] != 1:
        return None
    x, mean = node.args[:2]
    nodes: tuple[fx.Node, ...] = (mean,) if isinstance(mean, fx.Node) else ()
    if is_call(mean, operator.getitem) and is_call(mean.args[0], aten.var_mean.correction):
        given = arguments(mean.args[0])
        nodes, plain = (mean, mean.args[0]), mean.args[1] == 1
    elif is_call(mean, aten.mean.dim):
        given, plain = arguments(mean), arguments(mean)["dtype"] is None
    else:
        return None
    rank = val(x).dim()
    same = {d % rank for d in given["dim"] or ()} == {d % rank for d in dims}
    fits = plain and same and given["keepdim"] and same_value(given["self"], x)
    return (x, nodes) if fits else None


def _divided(
    program: Program, root: fx.Node
) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | Refusal | None:
    """``node, numerator, nodes between`` of the value that the root divides."""
    inverse = root.target is aten.rsqrt.default or (
        root.target is aten.pow.Tensor_Scalar and number(program, root.args[1]) == -0.5
    )
    between: tuple[fx.Node, ...] = ()
    current = root
    if not inverse:
        for user in current.users:
            if is_call(user, aten.div.Tensor) and user.args[1] is current and _tensor(user, 0):
                return user, user.args[0], between
        step = _inverted(program, current)
        if step is None:
            return None
        current, between = step, (step,)
    for user in current.users:
        place = int(bool(user.args) and user.args[0] is current)
        if is_call(user, aten.mul.Tensor) and _tensor(user, place):
            return user, user.args[place], between
    return None


def _tensor(user: fx.Node, place: int) -> bool:
    return is_tensor(user.args[place]) and user.kwargs.get("rounding_mode") is None


def _inverted(program: Program, node: fx.Node) -> fx.Node | None:
    """The user that is ``1 / node``."""
    for user in node.users:
        if is_call(user, aten.reciprocal.default):
            return user
        if is_call(user, aten.div.Tensor) and number(program, user.args[0]) == 1.0:
            return user
    return None


def _deviation(program: Program, root: fx.Node) -> Refusal | None:
    """A standard deviation or a norm that divides: its epsilon, if any, stands outside the root."""
    current = root
    outside = False
    for _ in range(3):
        for user in current.users:
            if is_call(user, aten.div.Tensor) and user.args[1] is current and _measured(user, root):
                if outside:
                    return Refusal("eps is added outside the root", current)
                return Refusal("the deviation is not the root of a biased variance plus eps", root)
        step = next((u for u in current.users if _shifts(program, u) or scaled(program, u)), None)
        if step is None:
            return None
        outside |= _shifts(program, step)
        current = step
    return None


def _measured(quotient: fx.Node, root: fx.Node) -> bool:
    """Whether what is divided stems from what the deviation was taken of."""
    source = root.args[0]
    level = {quotient.args[0]}
    for _ in range(4):
        if source in level:
            return True
        level = {a for n in level if isinstance(n, fx.Node) for a in n.all_input_nodes}
    return False


def _shifts(program: Program, node: fx.Node) -> bool:
    added = is_call(node, aten.add.Tensor)
    return added and any(number(program, a) is not None for a in node.args[:2])
