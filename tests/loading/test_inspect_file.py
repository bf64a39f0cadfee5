"""`inspect_file` describes every kind of file, hostile ones too, and runs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hostile_files import Payload, rewritten, saved

from graphopt.errors import LoadError
from graphopt.loading import inspect_file


def test_program(clean_pt2: Path) -> None:
    facts = inspect_file(clean_pt2)
    assert facts.kind == "pt2" and not facts.findings
    assert [(v.name, v.dtype) for v in facts.inputs] == [("x", "float32"), ("scale_by", "float32")]
    batch, width = facts.inputs[0].shape
    assert isinstance(batch, str) and batch.startswith("s") and width == 4
    assert facts.outputs[0].shape == (batch, 4)
    assert facts.operators["aten.linear.default"] == 1 and facts.operators["aten.mul.Tensor"] == 2
    assert {t.name: (t.shape, t.bytes) for t in facts.tensors} == {
        "layer.weight": ((4, 4), 64),
        "layer.bias": ((4,), 16),
        "shift": ((4,), 16),
    }
    assert facts.metadata["torch version"].startswith("2.")
    assert facts.graphopt == {"format": 1}


def test_program_with_a_branch_counts_operators_inside(tmp_path: Path) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Branch(), (torch.ones(2),)), path)
    operators = inspect_file(path).operators
    assert operators["aten.sin.default"] == operators["aten.cos.default"] == 1
    assert operators["higher_order.cond"] == 1


def test_inspection_deserializes_nothing(clean_pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("inspection must not build the program")

    monkeypatch.setattr(torch.export, "load", never)
    monkeypatch.setattr(torch.jit, "load", never)
    assert inspect_file(clean_pt2).operators


def test_facts_are_plain_data(clean_pt2: Path) -> None:
    data = inspect_file(clean_pt2).to_dict()
    again = json.loads(json.dumps(data))
    assert again["kind"] == "pt2" and again["tensors"][0]["dtype"] == "float32"


def test_lines_are_short_and_printable(tmp_path: Path, marker: Path) -> None:
    state = {f"layer{i}\x1b[31m": torch.ones(1) for i in range(100)}
    path = tmp_path / "m.pt"
    path.write_bytes(saved(state | {"evil": Payload(marker)}))
    facts = inspect_file(path)
    lines = facts.lines()
    assert len(facts.tensors) == 100 and len(lines) < 110
    assert all(line.isprintable() for line in lines)
    assert "    ... and 60 more" in lines
    assert any("would import and may run" in line for line in lines)
    assert not marker.exists()


def test_pickled_module_is_described_without_its_class(tmp_path: Path) -> None:
    """Also where the class is not installed here."""
    path = tmp_path / "m.pt"
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(model, path)
    hidden = rewritten(
        path,
        tmp_path / "gone.pt",
        lambda c: c.update({"data.pkl": c["data.pkl"].replace(b"container", b"containeR")}),
    )
    facts = inspect_file(hidden)
    assert "torch.nn.modules.containeR.Sequential" in facts.unsafe_globals
    assert {(t.name, t.shape) for t in facts.tensors} == {
        ("_modules.0._parameters.weight", (3, 2)),
        ("_modules.0._parameters.bias", (3,)),
    }


def test_any_pickle_can_be_looked_at(tmp_path: Path, marker: Path) -> None:
    """Objects that are called, filled and keyed like others; none of them is made."""
    import collections
    import enum

    class Bag(list):
        pass

    colour = enum.Enum("Colour", "RED", module="nobody.knows")
    for name, kind in (("Bag", Bag), ("Colour", colour)):
        kind.__module__, kind.__qualname__ = __name__, name
        globals()[name] = kind
    counts = collections.defaultdict(list, {"a": [torch.ones(2)]})
    value = {"bag": Bag([torch.ones(3), Payload(marker)]), "colour": colour.RED, "counts": counts}
    path = tmp_path / "m.pt"
    path.write_bytes(saved(value | {(1, 2): torch.ones(4)}))
    facts = inspect_file(path)
    assert {t.shape for t in facts.tensors} == {(2,), (3,), (4,)}
    assert f"{__name__}.Bag" in facts.unsafe_globals and not facts.findings
    assert not marker.exists()


def test_damaged_part_is_named_and_the_rest_is_shown(clean_pt2: Path, tmp_path: Path) -> None:
    def edit(contents: dict[str, bytes]) -> None:
        contents["models/model.json"] = b"{"

    facts = inspect_file(rewritten(clean_pt2, tmp_path / "m.pt2", edit))
    assert len(facts.tensors) == 3 and facts.members
    assert any("program model" in finding.where for finding in facts.findings)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        inspect_file(tmp_path / "absent.pt")


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000), "b": torch.ones(10, dtype=torch.float16)}
    path = tmp_path / "m.pt"
    torch.save(state, path)
    facts = inspect_file(path)
    assert facts.bytes == path.stat().st_size and facts.tensor_bytes == 4020
    assert facts.lines()[0] == f"{path}: checkpoint, {facts.bytes / 1024:.1f} KiB"
