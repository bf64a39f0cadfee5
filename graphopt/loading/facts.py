"""What `graphopt inspect` knows of a file, as data and as lines of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.loading.archive import Member
from graphopt.loading.findings import Finding, printable

Shape = tuple[int | str, ...]
_SHOWN = 40


@dataclass(frozen=True)
class TensorFacts:
    """A stored tensor; ``bytes`` is what its elements take, None where its type has no size."""

    name: str
    dtype: str
    shape: Shape
    bytes: int | None


@dataclass(frozen=True)
class ValueFacts:
    """An input or output of a program; symbolic sizes are texts."""

    name: str
    dtype: str
    shape: Shape


@dataclass
class FileFacts:
    """The contents of a model file, found without running or building any of it.

    Attributes:
        path: the file or folder.
        kind: what :func:`graphopt.loading.sniff.sniff` returns.
        bytes: size on disk, of all files of a folder.
        members: files in an archive or folder.
        tensors: stored tensors.
        globals: classes and functions that a pickle names.
        unsafe_globals: those that torch's weights-only reader refuses.
        inputs: inputs of a program.
        outputs: outputs of a program.
        operators: how often a program calls each operator.
        metadata: versions, producers and other texts.
        graphopt: what graphopt wrote beside the program (``graphopt.json``).
        findings: why the file would be refused.
    """

    path: str
    kind: str
    bytes: int
    members: tuple[Member, ...] = ()
    tensors: tuple[TensorFacts, ...] = ()
    globals: tuple[str, ...] = ()
    unsafe_globals: tuple[str, ...] = ()
    inputs: tuple[ValueFacts, ...] = ()
    outputs: tuple[ValueFacts, ...] = ()
    operators: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    graphopt: Any = None
    findings: tuple[Finding, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all stored tensors, counting shared ones each time they are named."""
        return sum(t.bytes or 0 for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The facts as lines of text, long lists cut; control characters are spelled out."""
        text = [f"{self.path}: {self.kind}, {size_text(self.bytes)}"]
        text += [f"  {key}: {value}" for key, value in sorted(self.metadata.items())]
        text += _section("refused because", list(map(_finding, self.findings)))
        text += _section("inputs", [_value(v) for v in self.inputs])
        text += _section("outputs", [_value(v) for v in self.outputs])
        counts = sorted(self.operators.items(), key=lambda item: (-item[1], item[0]))
        text += _section("operators", [f"{count:6d}  {name}" for name, count in counts])
        text += _section(
            "tensors", [_tensor(t) for t in self.tensors], size_text(self.tensor_bytes)
        )
        text += _section("the pickle would import and may run", list(self.unsafe_globals))
        text += _section("members", [f"{size_text(m.size):>12}  {m.name}" for m in self.members])
        if self.graphopt is not None:
            text.append("  optimized by graphopt: graphopt.json is there")
        return [printable(line) for line in text]


def _section(title: str, items: list[str], note: str = "") -> list[str]:
    if not items:
        return []
    head = f"  {title} ({len(items)}{', ' + note if note else ''}):"
    rest = [f"    ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [head, *(f"    {item}" for item in items[:_SHOWN]), *rest]


def _finding(found: Finding) -> str:
    return f"{found.what}  [{found.where}]" + (f"; try: {found.fix}" if found.fix else "")


def _value(value: ValueFacts) -> str:
    return f"{value.name}: {value.dtype}[{', '.join(map(str, value.shape))}]"


def _tensor(tensor: TensorFacts) -> str:
    size = "" if tensor.bytes is None else f"  {size_text(tensor.bytes)}"
    return f"{tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]{size}"


def size_text(count: int) -> str:
    """Bytes for people: ``1.5 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
