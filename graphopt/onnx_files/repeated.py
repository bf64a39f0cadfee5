"""The same computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.onnx_files.guard import guarded
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label


@dataclass(frozen=True)
class EliminateCommonSubexpressions(OnnxPass):
    """Nodes with the same inputs and attributes are one; not those that draw random numbers."""

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        from onnx_ir.passes.common import CommonSubexpressionEliminationPass

        if not allowed("repeated"):
            return Outcome()
        before = {id(node): label(node) for node in model.graph}
        with guarded(model):
            CommonSubexpressionEliminationPass()(model)
        left = {id(node) for node in model.graph}
        removed = tuple(name for key, name in before.items() if key not in left)
        if not removed:
            return Outcome()
        change = Change("repeated", "compute once", removed, bitwise=True)
        return Outcome([change])
