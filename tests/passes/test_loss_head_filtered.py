"""Loss heads with filtered gradients: declared, held to a bound, and exact where it is not met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.backend import Backend
from graphopt.cli.app import cli
from graphopt.kernels import filtering
from graphopt.kernels.chunked_rows import thinning
from graphopt.passes import FuseLossHead
from graphopt.recipe import Options
from graphopt.report.explain import explain_lines
from graphopt.report.model import Report

CLASSES, WIDTH, ROWS = 1000, 16, 150
BOUND = filtering.THRESHOLD**0.5
CAVEAT = "gradients approximate: slopes below 2^-12 of the row's largest are left out"
PASSES = ["Canonicalize", FuseLossHead(filter_gradients=True)]


class Head(nn.Module):
    """Every tenth class is likely, the others hardly.

    Args:
        gap: between the logits of the two.
    """

    def __init__(self, gap: float = 20.0) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.w = nn.Parameter(torch.randn(CLASSES, WIDTH))
        with torch.no_grad():
            self.w[:, 0] = -gap
            self.w[::10, 0] = 0.0

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        h = self.trunk(h) / WIDTH**0.5
        h = torch.cat([torch.ones_like(h[..., :1]), h[..., 1:]], -1)
        return F.cross_entropy(F.linear(h, self.w), t)


class Pairs(nn.Module):
    """Rows and columns both take part (Radford et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        x = 30 * F.normalize(self.left(h), dim=1) @ F.normalize(self.right(other), dim=1).T
        places = torch.arange(len(x))
        return (F.cross_entropy(x, places) + F.cross_entropy(x.T, places)) / 2


def inputs(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(0, CLASSES // 10, (rows,)) * 10


def compiled(model: nn.Module, *args: Any, **options: Any) -> Any:
    options = {"passes": PASSES, "measure": False} | options
    return graphopt.compile(model, example_inputs=args, **options)


def rules(report: Report) -> list[str]:
    return [a.rule for a in report.applied if "RowSummaries" in a.rule]


def gradients(model: nn.Module, call: Any, *args: Any) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(call(*args), wanted))


def shares_of(run: Any) -> list[float]:
    with filtering.kept() as shares:
        run()
    return [s.item() for s in shares]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))


def test_peaked_logits() -> None:
    model, args = Head().train(), inputs()
    fast = compiled(model, *args)
    assert rules(fast.report) == ["FuseFilteredRowSummaries"]
    assert fast.report.verified
    assert torch.equal(
        fast(*args), compiled(model, *args, passes=["Canonicalize", FuseLossHead()])(*args)
    )
    (share,) = shares_of(lambda: gradients(model, fast, *args))
    assert share < 0.12
    found, wanted = (gradients(model, call, *args) for call in (fast, model))
    assert 1e-7 < worst(found, wanted) < BOUND


def test_flat_logits() -> None:
    model, args = Head(gap=0.0).train(), inputs()
    fast = compiled(model, *args)
    assert shares_of(lambda: gradients(model, fast, *args)) == [1.0]
    exact = compiled(model, *args, passes=["Canonicalize", FuseLossHead()])
    pairs = zip(gradients(model, fast, *args), gradients(model, exact, *args), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_report_says_so() -> None:
    model, args = Head().train(), inputs()
    fast = compiled(model, *args)
    report = fast.report
    (certificate,) = [a.certificate for a in report.applied if "Filtered" in a.rule]
    assert certificate.gradient_bound == BOUND
    assert certificate.gradient_error is not None
    assert 1e-7 < certificate.gradient_error < BOUND
    assert certificate.error < 1e-6
    assert certificate.notes == (CAVEAT,)
    assert any(CAVEAT in line for line in explain_lines(report))
    assert CAVEAT.partition("'")[0] in report.to_html()
    share = certificate.gradient_share
    assert share is not None
    assert [share] == pytest.approx(shares_of(lambda: gradients(model, fast, *args)))
    text = f"{share:.1%} of the gradient products kept"
    assert 0.05 < share < 0.12
    assert any(text in line for line in explain_lines(report))
    assert report.to_html().count(text) > 1  # beside the certificate too
    assert Report.from_json(report.to_json()).applied[-1].certificate.gradient_share == share
    explained = graphopt.explain(model, example_inputs=args, passes=PASSES)
    assert any(CAVEAT in line for line in explain_lines(explained))


def test_off_by_default() -> None:
    model, args = Head().train(), inputs()
    for passes in ("exact", ["Canonicalize", FuseLossHead()]):
        fast = compiled(model, *args, passes=passes)
        assert rules(fast.report) == ["FuseRowSummaries"]
        assert not any("approximate" in note for note in fast.report.notes)
        assert not shares_of(lambda fast=fast: gradients(model, fast, *args))


def test_where_nothing_trains_nothing_changes() -> None:
    model, args = Head().eval(), inputs()
    fast, plain = (
        compiled(model, *args, passes=["Canonicalize", FuseLossHead(filter_gradients=on)])
        for on in (True, False)
    )
    assert rules(fast.report) == ["FuseRowSummaries"]
    assert str(fast.program) == str(plain.program)


def _off(scale: float) -> Any:
    real = thinning.ThinGradients._some_classes

    def scaled(self: Any, rows: Any, kept: Tensor) -> None:
        real(self, rows, kept)
        if self.hidden is not None:
            self.hidden[rows.span] *= scale

    return scaled


def test_a_gradient_off_by_more_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the head is fused without a filter, and the report says why."""
    model, args = Head().train(), inputs()
    monkeypatch.setattr(thinning.ThinGradients, "_some_classes", _off(1.03))
    fast = compiled(model, *args)
    assert rules(fast.report) == ["FuseRowSummaries"]
    assert fast.report.verified
    (missed,) = [m for m in fast.report.missed if "Filtered" in m.rule]
    assert missed.stage == "verify"
    assert "gradients: error above the bound (relative error 0.0" in missed.reason
    assert worst(gradients(model, fast, *args), gradients(model, model, *args)) < 1e-5


def test_a_wrong_gradient_without_the_filter_is_not_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A filter allows nothing to what is no filter's doing."""
    model, args = Head().train(), inputs()
    real = thinning.FactorGradients._all_classes

    def scaled(self: Any, rows: Any) -> None:
        real(self, rows)
        if self.hidden is not None:
            self.hidden[rows.span] *= 1.0001

    monkeypatch.setattr(thinning.FactorGradients, "_all_classes", scaled)
    assert not rules(compiled(model, *args).report)


class Returning(Head):
    def forward(self, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(self.trunk(h), self.w)
        return F.cross_entropy(logits, t), logits


@pytest.mark.parametrize("option", ["lazy_logits", "drop_logits"])
def test_logits_that_are_returned(option: str) -> None:
    model, args = Returning().train(), inputs()
    step = FuseLossHead(filter_gradients=True, **{option: True})
    fast = compiled(model, *args, passes=["Canonicalize", step])
    assert rules(fast.report) == ["FuseFilteredRowSummaries"]
    loss, logits = fast(*args)
    torch.testing.assert_close(loss, model(*args)[0])
    assert (logits is None) == (option == "drop_logits")
    (refused,) = [m for m in compiled(model, *args).report.missed if "RowSummaries" in m.rule]
    assert "is an output of the model" in refused.reason


def test_a_second_backward() -> None:
    model, args = Head().train(), inputs()
    fast = compiled(model, *args)
    loss, wanted = fast(*args), gradients(model, model, *args)
    for _ in range(2):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert worst(list(found), wanted) < BOUND


def test_all_targets_ignored() -> None:
    model, args = Head().train(), inputs()
    fast = compiled(model, *args)
    given = args[0], torch.full_like(args[1], -100)
    assert shares_of(lambda: gradients(model, fast, *given)) == [0.0]
    assert all(not g.any() for g in gradients(model, fast, *given))


def test_dynamic_sizes() -> None:
    model, args = Head().train(), inputs()
    shapes = ({0: torch.export.Dim.DYNAMIC},) * 2
    fast = compiled(model, *args, dynamic_shapes=shapes)
    assert rules(fast.report) == ["FuseFilteredRowSummaries"]
    for rows in (7, 333):
        given = inputs(rows)
        (share,) = shares_of(lambda given=given: gradients(model, fast, *given))
        assert share < 0.12
        found, wanted = (gradients(model, call, *given) for call in (fast, model))
        assert worst(found, wanted) < BOUND


@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_through_dynamo(target: str, fresh_dynamo: None) -> None:
    """With an error far above that of rounding, which the whole would not be allowed."""
    model, args = Head(gap=6.5).train(), inputs()
    backend = Backend(Options(passes=PASSES, target=target, measure=False, strict=True))
    fast = torch.compile(model, backend=backend)
    fast(*args)
    (share,) = shares_of(lambda: gradients(model, fast, *args))
    assert share < 0.12
    found, wanted = (gradients(model, call, *args) for call in (fast, model))
    assert BOUND / 10 < worst(found, wanted) < BOUND
    (report,) = backend.reports
    assert rules(report) == ["FuseFilteredRowSummaries"]
    assert not any("was kept" in note for note in report.notes)


def test_inductor_is_checked_without_the_filter(fresh_dynamo: None) -> None:
    model, args = Head(gap=6.5).train(), inputs()
    fast = compiled(model, *args, target="inductor", strict=True)
    found, wanted = (gradients(model, call, *args) for call in (fast, model))
    assert BOUND / 10 < worst(found, wanted) < BOUND


def test_without_gradients_through_dynamo(fresh_dynamo: None) -> None:
    model, args = Head().train().requires_grad_(False), inputs()
    backend = Backend(Options(passes=PASSES, measure=False))
    torch.compile(model, backend=backend)(*args)
    assert rules(backend.reports[0]) == ["FuseRowSummaries"]


def test_a_contrastive_loss() -> None:
    model, args = Pairs().train(), (torch.randn(600, WIDTH), torch.randn(600, WIDTH))
    fast = compiled(model, *args)
    assert fast.report.verified
    assert "FuseFilteredRowSummaries" in rules(fast.report)
    found, wanted = (gradients(model, call, *args) for call in (fast, model))
    assert worst(found, wanted) < BOUND


@pytest.mark.parametrize("frozen", ["trunk", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    model, args = Head().train(), inputs()
    model.trunk.requires_grad_(frozen == "head")
    model.w.requires_grad_(frozen == "trunk")
    fast = compiled(model, *args)
    (share,) = shares_of(lambda: gradients(model, fast, *args))
    assert share < 0.12
    assert worst(gradients(model, fast, *args), gradients(model, model, *args)) < BOUND


def test_a_file_keeps_the_filter(tmp_path: Any) -> None:
    model, args = Head().train(), inputs()
    fast = compiled(model, *args)
    loaded = graphopt.load(graphopt.save(fast, tmp_path / "head.pt2"))
    assert torch.equal(loaded(*args), fast(*args))
    (share,) = shares_of(lambda: loaded(*args).backward())
    assert share < 0.12


def test_an_onnx_file_has_no_backward_pass(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model, args = Head().eval(), inputs()
    result = graphopt.export_onnx(compiled(model, *args), tmp_path / "head.onnx")
    assert result.error is not None
    assert result.error < 1e-5


def test_on_the_command_line(tmp_path: Any) -> None:
    torch.save(Head().state_dict(), tmp_path / "head.pt")
    given = ["optimize", str(tmp_path / "head.pt"), "--arch", f"{__name__}:Head", "--train"]
    given += ["--inputs", f"h:float32[{ROWS},{WIDTH}],t:int64[{ROWS}]"]
    given += ["--pass", "Canonicalize", "--pass", "FuseLossHead:filter_gradients=true"]
    given += ["--no-measure", "-o", str(tmp_path / "report.json")]
    ran = CliRunner().invoke(cli, given)
    assert ran.exit_code == 0, ran.output
    assert "FuseFilteredRowSummaries" in (tmp_path / "report.json").read_text()
    assert CAVEAT in " ".join(ran.output.split())
