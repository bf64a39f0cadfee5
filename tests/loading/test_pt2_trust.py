"""``.pt2`` files that make ``torch.export.load`` run code are refused before torch sees them."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hostile_files import CONTENTS, Payload, rewritten, saved
from pt2_attacks import MODEL, REASONS, RUNS_IN_TORCH, Attack, program_of_another_name

from graphopt.errors import LoadError
from graphopt.loading import inspect_file, load_model, scan_archive


@pytest.fixture
def attacked(request: pytest.FixtureRequest, clean_pt2: Path, tmp_path: Path, marker: Path) -> Path:
    return rewritten(clean_pt2, tmp_path / "evil.pt2", lambda c: request.param(c, marker))


def named(value: Attack | str) -> str:
    return "" if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("attacked", "reason"), REASONS.items(), indirect=["attacked"], ids=named)
def test_refused_and_not_run(
    attacked: Path, reason: str, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(attacked.parent)
    with pytest.raises(LoadError) as refusal:
        load_model(attacked)
    assert str(attacked) in str(refusal.value)
    with pytest.raises(LoadError):
        scan_archive(attacked)
    with pytest.raises(LoadError):
        load_model(attacked, trust_pickle=True)
    facts = inspect_file(attacked)
    assert any(reason in finding.what for finding in facts.findings), facts.findings
    assert facts.members
    assert not marker.exists()
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize("attacked", RUNS_IN_TORCH, indirect=True, ids=named)
def test_the_attack_is_real(
    attacked: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the scan torch does run it: otherwise the test above would prove nothing."""
    monkeypatch.syspath_prepend(attacked.parent)
    with caplog.at_level(logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = torch.export.load(attacked).module()
            loaded(torch.randn(3, 4), scale={"by": torch.ones(4)})
        except Exception as error:
            after = repr(error)
        else:
            after = "and loaded"
    sys.modules.pop("hostile_module", None)
    if not marker.exists():
        pytest.skip(f"torch {torch.__version__} does not run it any more: {after:.200}")


def test_clean_file_loads_with_its_example_inputs(clean_pt2: Path) -> None:
    loaded = load_model(clean_pt2)
    assert loaded.kind == "pt2" and loaded.exported is not None
    assert loaded.extra_files == {"graphopt.json": '{"format": 1}'}
    args, kwargs = loaded.exported.example_inputs
    expected = torch.export.load(clean_pt2).module()(*args, **kwargs)
    torch.testing.assert_close(loaded.exported.module()(*args, **kwargs), expected, rtol=0, atol=0)


def test_clean_file_of_another_name_loads(clean_pt2: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(clean_pt2.read_bytes())
    assert load_model(other).kind == "pt2"


def test_control_flow_guards_and_tied_weights_load(tmp_path: Path) -> None:
    """Everything that torch itself writes passes the scan: symbols, subgraphs, guards, aliases."""

    class Rich(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str, steps: int) -> dict:
            halves = x.reshape(x.shape[0] // 2, 2, -1)
            rows = (x > 0).nonzero()
            with torch.no_grad():
                scaled = x * x.shape[0] ** 0.5
            with torch.autocast("cpu"):
                product = x @ x.t()
            branch = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            logits = self.head(self.embed(torch.arange(3)))
            joined = torch.cat([x, y])[: x.shape[0] + y.shape[0] - 1]
            return {
                "parts": [halves, rows, scaled, product],
                "rest": (branch, logits, joined, torch.sym_max(x.shape[0], y.shape[0])),
                "at least": torch.arange(max(x.shape[0], steps)),
            }

    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}, "y": {0: torch.export.Dim.AUTO}}
    inputs = (torch.randn(4, 4), torch.randn(3, 4), "gelu", 2)
    shapes = dynamic | {"mode": None, "steps": None}
    exported = torch.export.export(Rich(), inputs, dynamic_shapes=shapes, strict=False)
    assert exported._guards_code, "the program must have guards, or they are not tested"
    path = tmp_path / "rich.pt2"
    torch.export.save(exported, path)
    loaded = load_model(path).exported
    assert loaded is not None
    expected, got = exported.module()(*inputs), loaded.module()(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    weights = loaded.state_dict
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


def test_unregistered_operator_is_named(clean_pt2: Path, tmp_path: Path) -> None:
    def edit(contents: CONTENTS) -> None:
        old, new = b"torch.ops.aten.linear.default", b"torch.ops.nobodys_library.linear.default"
        contents[MODEL] = contents[MODEL].replace(old, new)

    evil = rewritten(clean_pt2, tmp_path / "custom.pt2", edit)
    scan_archive(evil)
    with pytest.raises(LoadError, match=r"nobodys_library\.linear") as refusal:
        load_model(evil)
    assert "import the package" in (refusal.value.fix or "")


def test_program_of_another_name(clean_pt2: Path, tmp_path: Path, marker: Path) -> None:
    other = rewritten(clean_pt2, tmp_path / "m.pt2", lambda c: program_of_another_name(c, marker))
    assert inspect_file(other).operators
    with pytest.raises(LoadError, match="no program called model"):
        load_model(other)


def test_checkpoint_called_pt2_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(LoadError, match=r"called [.]pt2 but holds pickled weights"):
        load_model(path, arch="torch.nn:Identity")


def test_old_format_is_refused(tmp_path: Path, marker: Path) -> None:
    from hostile_files import write_zip

    parts = {"version": b"8.8", "serialized_exported_program.json": b"{}"}
    parts["serialized_state_dict.pt"] = saved(Payload(marker))
    path = write_zip(tmp_path / "old.pt2", parts)
    with pytest.raises(LoadError, match=r"before 2[.]8"):
        load_model(path)
    assert not marker.exists()
