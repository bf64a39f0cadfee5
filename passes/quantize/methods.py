"""Names of methods, and which go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROUNDING = ("rtn", "hqq", "gptq")
"""How codes of a weight are chosen: one of these."""

SCALING = ("awq", "smoothquant")
"""Factors that are moved between layers before: one of these, or none."""

BESIDE = ("outliers", "lowrank")
"""What stands beside codes and makes good what they lose: any of these."""

ROTATING = ("rotate",)
"""Bases of features that are turned before that, exactly: outliers become a little of all."""

CALIBRATED = frozenset({"gptq", *SCALING})
"""Methods that learn from calibration inputs."""

METHODS = (*ROUNDING, *SCALING, *BESIDE, *ROTATING)


class Methods(NamedTuple):
    """What a pass does to a weight, in order."""

    rounding: str
    scaling: str | None = None
    beside: tuple[str, ...] = ()
    rotates: bool = False

    @property
    def calibrated(self) -> tuple[str, ...]:
        return tuple(name for name in (self.scaling, self.rounding) if name in CALIBRATED)


def methods(given: str | Sequence[str]) -> Methods:
    """From ``"gptq"``, ``"awq+gptq"`` or a sequence of names.

    Raises:
        ValueError: a name is unknown or comes twice, or two name ways of rounding.
    """
    names = given.split("+") if isinstance(given, str) else list(given)
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is not one of {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"method {'+'.join(names)} names a method twice")
    return Methods(
        _one(names, ROUNDING, "round weights") or "rtn",
        _one(names, SCALING, "scale channels"),
        tuple(name for name in BESIDE if name in names),
        "rotate" in names,
    )


def _one(names: Sequence[str], kind: Sequence[str], what: str) -> str | None:
    chosen = [name for name in names if name in kind]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} both {what}: take one of them")
    return chosen[0] if chosen else None
