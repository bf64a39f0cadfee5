"""Strides after a rewrite: a replacement may lie differently in memory than what it replaces.

Views downstream are re-checked on fake tensors. A ``view`` that no longer exists becomes a
``reshape`` (equal values, a copy where needed); strides of model outputs never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.errors import IllegalRewriteError
from graphopt.program import operator_name, val
from graphopt.rewrite.builder import Builder, infer

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)


def restride(replaced: Mapping[fx.Node, Any], build: Builder) -> dict[fx.Node, Any]:
    """New fake values of downstream nodes whose strides change with the replacement.

    Raises:
        IllegalRewriteError: an output of the model would change its strides, or a node downstream
            does not work on the new ones.
    """
    values = {old: val(new) for old, new in replaced.items() if not same_layout(val(old), val(new))}
    updates: dict[fx.Node, Any] = {}
    queue = list(values)
    while queue:
        for user in list(queue.pop(0).users):
            if user.op == "output":
                raise IllegalRewriteError("the strides of an output of the model would change")
            fake = _again(user, {**values, **updates}, build)
            if not same_layout(updates.get(user, val(user)), fake):
                updates[user] = fake
                queue.append(user)
    return updates


def _again(node: fx.Node, known: Mapping[fx.Node, Any], build: Builder) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known.get(n, val(n)))
    try:
        return infer(build.fake_mode, node.target, args, kwargs)
    except IllegalRewriteError as error:
        if node.target not in _VIEWS:
            name = operator_name(node.target)
            raise IllegalRewriteError(
                f"`{node.name}` ({name}) needs the original strides"
            ) from error
    node.target = aten.reshape.default
    return infer(build.fake_mode, node.target, args, kwargs)


def same_layout(old: Any, new: Any) -> bool:
    """Whether two fake values have the same strides (values that are not tensors: always)."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return all(same_layout(a, b) for a, b in zip(old, new, strict=True))
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return True
    if old.layout is not torch.strided or new.layout is not torch.strided:
        return old.layout is new.layout
    rows = zip(old.stride(), new.stride(), old.shape, strict=True)
    return all(statically_known_true(a == b) or statically_known_true(n == 1) for a, b, n in rows)
