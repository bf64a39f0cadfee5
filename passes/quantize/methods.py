"""Names of methods, and which go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from graphopt.kernels.quantized.learned_scales import can_learn
from graphopt.kernels.quantized.scheme import Scheme

ROUNDING = ("rtn", "hqq", "gptq")
"""How codes of a weight are chosen: one of these."""

SCALING = ("awq", "smoothquant")
"""Factors that are moved between layers before: one of these, or none."""

BESIDE = ("outliers", "lowrank")
"""What stands beside codes and makes good what they lose: any of these."""

ROTATING = ("rotate",)
"""Bases of features that are turned before that, exactly: outliers become a little of all."""

TUNING = ("learned", "adaround", "flexround")
"""What makes codes better after they were chosen, block by block: one of these, or none."""

PROPAGATING = ("propagate",)
"""What later weights make good of what earlier ones lost, before they are rounded."""

TWEAKING = ("norms",)
"""What makes norms of a block good for what its weights lost."""

CALIBRATED = frozenset({"gptq", *SCALING, *TUNING, *PROPAGATING, *TWEAKING})
"""Methods that learn from calibration inputs."""

METHODS = (*ROUNDING, *SCALING, *BESIDE, *ROTATING, *TUNING, *PROPAGATING, *TWEAKING)


class Methods(NamedTuple):
    """What a pass does to a weight, in order."""

    rounding: str
    scaling: str | None = None
    beside: tuple[str, ...] = ()
    rotates: bool = False
    tuning: str | None = None
    propagates: bool = False
    tweaks: bool = False

    @property
    def calibrated(self) -> tuple[str, ...]:
        propagating = "propagate" if self.propagates else None
        tweaking = "norms" if self.tweaks else None
        names = (self.scaling, self.rounding, propagating, self.tuning, tweaking)
        return tuple(n for n in names if n in CALIBRATED)

    @property
    def learns_codes(self) -> bool:
        """Whether tuning changes codes: those of GPTQ are left as they are by ``learned``."""
        return self.tuning is not None and (self.tuning != "learned" or self.rounding != "gptq")

    @property
    def by_blocks(self) -> bool:
        """Whether anything is learned from what blocks give."""
        return self.tuning is not None or self.tweaks

    @property
    def weighs(self) -> bool:
        """Whether anything of this looks at second moments of inputs."""
        moments = self.rounding == "gptq" or self.scaling == "awq"
        return moments or bool(self.beside) or self.by_blocks


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
    beside = tuple(name for name in BESIDE if name in names)
    tuning = _one(names, TUNING, "learn")
    if tuning and beside:
        raise ValueError(f"{tuning} learns codes alone: take it, or {' and '.join(beside)}")
    propagates = "propagate" in names
    usual = "gptq" if tuning == "learned" or propagates else "rtn"
    rounding = _one(names, ROUNDING, "round weights") or usual
    if propagates and rounding != "gptq":
        raise ValueError(f"propagate moves weights before gptq rounds them: leave {rounding} out")
    scaling = _one(names, SCALING, "scale channels")
    rotates, tweaks = "rotate" in names, "norms" in names
    return Methods(rounding, scaling, beside, rotates, tuning, propagates, tweaks)


def learning_refusal(chosen: Methods, scheme: Scheme) -> str | None:
    """Why nothing could be learned, and what to do."""
    if chosen.tuning is None or chosen.learns_codes or can_learn(scheme):
        return None
    return (
        f"behind gptq, learned moves scales, and those of {scheme.dtype} are too coarse for it: "
        "method='gptq' alone, or 'rtn+learned', which learns codes"
    )


def _one(names: Sequence[str], kind: Sequence[str], what: str) -> str | None:
    chosen = [name for name in names if name in kind]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} both {what}: take one of them")
    return chosen[0] if chosen else None
