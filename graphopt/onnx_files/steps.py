"""What a pass on an ONNX file is, and what it says of what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.onnx_files.feeds import Feeds
from graphopt.report.model import MissedRewrite
from graphopt.report.quantized import QuantizedLayer

Allowed = Callable[[str], bool]
"""Whether a rewrite may be made, by its key: verification takes those out that fail."""


@dataclass(frozen=True)
class Change:
    """One rewrite that was made.

    Attributes:
        key: what `Allowed` is asked about; rewrites of one key are made or left together.
        rule: what was done, in a few words.
        removed, added: names of nodes and initializers.
        bitwise: whether it cannot change a bit.
        error, bound: relative RMS error of what it computes on what it reads, where that was
            measured by itself, and what is allowed of it.
        assumes: what holds where the rewrite computes the same, in a sentence; empty where it does
            everywhere.
    """

    key: str
    rule: str
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    bitwise: bool = False
    error: float | None = None
    bound: float = 0.0
    assumes: str = ""


@dataclass
class Outcome:
    """What a pass did to a model, and what it left alone.

    Attributes:
        allowed: relative RMS error of outputs that lossy rewrites come to.
        notes: what else there is to tell.
        layers: weights in few bits.
        model: what takes the model's place; None where it was changed itself.
    """

    changes: list[Change] = field(default_factory=list)
    missed: list[MissedRewrite] = field(default_factory=list)
    allowed: float = 0.0
    notes: list[str] = field(default_factory=list)
    layers: list[QuantizedLayer] = field(default_factory=list)
    model: Any = None


@dataclass(frozen=True)
class Surroundings:
    """What passes may look at besides the model.

    Attributes:
        original: the model as it was read.
        feeds: inputs that it is run on.
        external: whether weights lie beside the file.
        measure: choose between forms by their time.
        progress: takes the name of what begins.
    """

    original: Any
    feeds: Feeds
    external: bool = False
    measure: bool = True
    progress: Callable[[str], None] = lambda _text: None


@dataclass(frozen=True)
class OnnxPass:
    """A step on an ``onnx_ir`` model, which `apply` changes in place."""

    timed = False
    """Whether it is kept only where the model is not slower with it."""
    lossy = False

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:
        raise NotImplementedError(f"{self.name} does nothing")

    def alternative(self, _model: Any) -> Any | None:
        """Another form of what the pass made of a model, tried where that is slower than before."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__

    def options(self) -> Mapping[str, Any]:
        """Fields, as a recipe would spell them."""
        return dataclasses.asdict(self)

    def missed(
        self, rule: str, reason: str, node: str = "", *, stage: str = "check", option: str = ""
    ) -> MissedRewrite:
        return MissedRewrite(self.name, rule, reason, node or None, None, option or None, stage)


def label(node: Any) -> str:
    """A node's name; where it has none, what it computes."""
    if node.name:
        return str(node.name)
    first = next((v.name for v in node.outputs if v.name), "")
    return f"{node.op_type}({first})"
