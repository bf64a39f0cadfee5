"""Stages of QuantizeMatmul: passes that are applied and verified each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.rewrite import Pass


@dataclass(frozen=True)
class Stage(Pass):
    """Goes by the name and the options of the pass that it is a stage of.

    Attributes:
        given: that pass.
    """

    given: Pass

    @property
    def name(self) -> str:
        return self.given.name

    def options(self) -> dict[str, Any]:
        return self.given.options()
