"""What a run did, as data: the report behind the terminal, JSON and HTML views.

The schema is versioned: `SCHEMA` grows when a field changes meaning or goes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, overload

from graphopt.errors import LoadError
from graphopt.report.partition import Partition
from graphopt.report.quantized import Quantization
from graphopt.report.serial import build, finite, plain

SCHEMA = 1


@dataclass(frozen=True)
class Certificate:
    """Proof kept for one applied rewrite, or for the whole program.

    Attributes:
        nodes: names of the nodes that were replaced.
        inputs_hash: SHA-256 over shapes, dtypes and values of the verification inputs.
        error: RMS error against float64, relative to the reference's RMS.
        max_error: largest error, relative to the reference's RMS.
        original_error: the same RMS error of what stood there before.
        bound: what ``error`` had to stay under; 0 demands equal bits.
        gradient_error, gradient_bound: likewise for vector-Jacobian products, where they exist.
        gradient_share: how much of the products that make gradients a filter kept, on the first
            inputs; ``None`` without a filter.
        runs: sets of inputs it was measured on (captured values, fresh values, unseen sizes).
    """

    rule: str
    version: int
    numeric: str
    nodes: tuple[str, ...]
    source: str | None
    inputs_hash: str
    error: float
    max_error: float
    original_error: float
    bound: float
    gradient_error: float | None = None
    gradient_bound: float | None = None
    runs: int = 0
    notes: tuple[str, ...] = ()
    gradient_share: float | None = None


@dataclass(frozen=True)
class Applied:
    """A rewrite that was kept. ``speedup`` is old over new time of the piece, where measured."""

    pass_name: str
    rule: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    source: str | None
    certificate: Certificate
    speedup: float | None = None


@dataclass(frozen=True)
class MissedRewrite:
    """A candidate that was left alone.

    ``stage`` says where it ended: ``match`` (looked alike), ``check`` (refused), ``verify`` (rolled
    back), ``profit`` (slower here). ``weights`` names those that it would have stored otherwise.
    """

    pass_name: str
    rule: str
    reason: str
    node: str | None = None
    source: str | None = None
    option: str | None = None
    stage: str = "check"
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassSummary:
    """Counts and cost of one pass: matched = kept + slower + rolled back."""

    name: str
    options: dict[str, Any]
    matched: int
    kept: int
    slower: int
    rolled_back: int
    nodes_before: int
    nodes_after: int
    seconds: float
    verify_seconds: float
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class Trade:
    """A set of formats that a search for bits looked at: what it takes, and what it costs.

    Attributes:
        bytes: of the whole model's stored tensors.
        loss: estimated, in the units of the search's sensitivities.
        quality: measured by the user's callable; None where it was not asked.
        chosen: whether the model was made with it.
    """

    bytes: int
    loss: float
    quality: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class NodeView:
    """One node of a graph as the HTML report shows it.

    Attributes:
        op: operator, or what a placeholder stands for (``parameter``, ``buffer``, ``constant``,
            ``input``), or ``output``.
        inputs: names of the nodes it reads.
        shape: dtype and sizes, ``f32[2, s1, 384]``.
        module: path of the module it belongs to, ``encoder.layer.0``; empty for the model itself.
        literals: its arguments that are not nodes, ``dim=-1``.
        target: for state, the qualified name of its tensor.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: str
    module: str
    source: str | None
    rewritten_by: tuple[str, ...] = ()
    literals: str = ""
    target: str | None = None


@dataclass
class Report:
    """Everything `explain` and `optimize` can tell about one model."""

    model: str
    applied: list[Applied] = field(default_factory=list)
    missed: list[MissedRewrite] = field(default_factory=list)
    passes: list[PassSummary] = field(default_factory=list)
    whole: list[Certificate] = field(default_factory=list)
    verified: bool = False
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recipe: list[dict[str, Any]] = field(default_factory=list)
    trades: list[Trade] = field(default_factory=list)
    quantization: Quantization | None = None
    partition: Partition | None = None
    graph_before: list[NodeView] = field(default_factory=list)
    graph_after: list[NodeView] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def certificates(self) -> list[Certificate]:
        """Certificates of every kept rewrite, then those of the whole program."""
        return [a.certificate for a in self.applied] + self.whole

    @property
    def losses(self) -> list[Certificate]:
        """Certificates of kept rewrites that approximate."""
        return [a.certificate for a in self.applied if a.certificate.numeric == "lossy"]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it: dicts, lists, strings, and numbers that are finite.

        NaN and infinities are ``None``, with a note. `json_schema` describes the whole.
        """
        return finite(plain(self))

    @overload
    def to_json(self, path: None = None) -> str: ...

    @overload
    def to_json(self, path: str | Path) -> Path: ...

    def to_json(self, path: str | Path | None = None) -> str | Path:
        """The report as strict JSON text, or the file at ``path`` that it was written to.

        It holds what `to_dict` gives.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        return text if path is None else _written(path, text)

    @overload
    def to_html(self, path: None = None) -> str: ...

    @overload
    def to_html(self, path: str | Path) -> Path: ...

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """The report as one self-contained HTML page, or the file at ``path`` it was written to."""
        from graphopt.report.html import render_html

        text = render_html(self)
        return text if path is None else _written(path, text)

    def print(self, verbose: bool = False) -> None:
        """Show the report in the terminal."""
        from graphopt.report.terminal import print_report

        print_report(self, verbose=verbose)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Rebuild a report that `to_dict` or `to_json` wrote; unknown fields are left out.

        Raises:
            LoadError: written with a newer schema, or not a report.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int):
            raise LoadError("this is not a graphopt report: it has no schema number")
        if schema > SCHEMA:
            raise LoadError(
                f"the report has schema {schema}; this graphopt reads up to {SCHEMA}",
                fix="read it with the graphopt that wrote it, or upgrade this one",
            )
        return build(cls, data)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuild a report from JSON text.

        Raises:
            LoadError: not JSON, written with a newer schema, or not a report.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"this is not a graphopt report: {error}") from error
        return cls.from_dict(data)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `Report.to_json` writes."""
    text = resources.files("graphopt.report").joinpath("schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _written(path: str | Path, text: str) -> Path:
    from graphopt.files import atomic_path

    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return Path(path)
