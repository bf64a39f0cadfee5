"""ONNX files: names, dynamic axes, comparison before writing, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.emit import onnx_drafts
from graphopt.emit import onnx_runtime as emit_onnx_runtime
from graphopt.errors import ExportError, VerificationError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, mask):
        hidden = nn.functional.gelu(self.first(x)) * mask.unsqueeze(-1)
        return {"logits": self.second(hidden), "hidden": hidden}


def compiled(**options):
    inputs = {"x": torch.randn(3, 5, 8), "mask": torch.ones(3, 5)}
    axes = {name: {0: "batch", 1: "seq"} for name in inputs}
    return graphopt.compile(
        Net().eval(), example_kwargs=inputs, dynamic_shapes=axes, measure=False, **options
    )


def test_names_and_axes_are_kept_and_outputs_agree(tmp_path):
    module = compiled()
    result = graphopt.export_onnx(module, tmp_path / "net.onnx")
    assert result.inputs == ("x", "mask")
    assert result.outputs == ("logits", "hidden")
    assert 0 <= result.error < 2e-5
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    x, mask = torch.randn(7, 2, 8), torch.randint(2, (7, 2)).float()
    found = session.run(["logits"], {"x": x.numpy(), "mask": mask.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), module(x=x, mask=mask)["logits"])
    assert "graphopt" in {p.key for p in onnx.load(tmp_path / "net.onnx").metadata_props}


def test_a_wrong_file_is_never_put_in_place(tmp_path, monkeypatch):
    """A translation that is off by a factor is caught by running the file."""
    import onnx_ir

    original = onnx_drafts.translate

    def wrong(*arguments, **options):
        made = original(*arguments, **options)
        for value in made.model.graph.initializers.values():
            array = value.const_value.numpy()
            if array.dtype.kind == "f" and array.ndim == 2:
                value.const_value = onnx_ir.tensor(array * 1.01, name=value.name)
        return made

    monkeypatch.setattr(onnx_drafts, "translate", wrong)
    with pytest.raises(VerificationError, match="relative error"):
        graphopt.export_onnx(compiled(), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_drafts, "EXTERNAL_ABOVE", 100)
    graphopt.export_onnx(compiled(), tmp_path / "net.onnx")
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["net.onnx", "net.onnx.data"]
    runtime.InferenceSession(str(tmp_path / "net.onnx"))


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ExportError, match="cannot export a Linear"):
        graphopt.export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx")
    trained = graphopt.compile(nn.Linear(2, 2), example_inputs=(torch.randn(3, 2),))
    with pytest.raises(ExportError, match="training mode"):
        graphopt.export_onnx(trained, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_operator_without_translation_is_named(tmp_path):
    module = graphopt.compile(Unknown().eval(), example_inputs=(torch.randn(3),))
    with pytest.raises(ExportError, match="bessel_j0"):
        graphopt.export_onnx(module, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Module):
    def forward(self, x, mask):
        seen = mask[:, None, None, :].bool()
        x = x.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen).squeeze(1)


def masked_inputs():
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {"x": torch.randn(3, 5, 8), "mask": mask}


def test_rows_with_nothing_to_attend_to_are_told(tmp_path):
    """torch gives zeros there, ONNX Runtime the mean."""
    axes = {name: {0: "batch", 1: "seq"} for name in ("x", "mask")}
    module = graphopt.compile(
        Masked().eval(), example_kwargs=masked_inputs(), dynamic_shapes=axes, measure=False
    )
    result = graphopt.export_onnx(module, tmp_path / "m.onnx")
    assert [n for n in result.notes if "rows of mask that are all zero" in n]
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    given = masked_inputs()
    given["mask"][2] = 0
    found = torch.from_numpy(session.run(None, {k: v.numpy() for k, v in given.items()})[0])
    expected = module(**given)
    torch.testing.assert_close(found[:2], expected[:2])
    assert not torch.allclose(found[2], expected[2])


def test_what_differs_elsewhere_too_is_still_refused(tmp_path, monkeypatch):
    axes = {name: {0: "batch", 1: "seq"} for name in ("x", "mask")}
    module = graphopt.compile(
        Masked().eval(), example_kwargs=masked_inputs(), dynamic_shapes=axes, measure=False
    )
    once = emit_onnx_runtime._compare_once

    def off_at_one(program, session, values, *names):
        if values[0].shape[1] == 1:
            raise VerificationError("off")
        return once(program, session, values, *names)

    monkeypatch.setattr(emit_onnx_runtime, "_compare_once", off_at_one)
    with pytest.raises(VerificationError, match="off"):
        graphopt.export_onnx(module, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] == 1 else x * 2


def test_conditions_that_the_file_cannot_check_are_told(tmp_path):
    module = graphopt.compile(
        Branches().eval(),
        example_inputs=(torch.randn(3, 4),),
        dynamic_shapes=({0: "batch"},),
        measure=False,
    )
    result = graphopt.export_onnx(module, tmp_path / "m.onnx")
    told = [n for n in result.notes if "the file cannot" in n]
    assert len(told) == len(module.program.assumptions) == 1
    assert "at least 2" in told[0]


class Biased(nn.Module):
    """Attention with a bias whose result is reshaped without a copy, as in T5."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        q, k, v = (
            t.reshape(x.shape[0], x.shape[1], -1, 8).transpose(1, 2)
            for t in self.enter(x).split(32, -1)
        )
        bias = self.bias.expand(x.shape[0], 4, x.shape[1], x.shape[1])
        made = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.leave(made.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1).contiguous())


def test_attention_that_is_reshaped_without_a_copy(tmp_path):
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    module = graphopt.compile(
        Biased().eval(),
        example_inputs=(torch.randn(2, 5, 32),),
        dynamic_shapes=(axes,),
        measure=False,
    )
    assert graphopt.export_onnx(module, tmp_path / "net.onnx", measure=False).error < 2e-5


class Windows(nn.Module):
    """Heads that are put together as windows at once, as in Swin."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        rows = x.shape[0]
        parts = (layer(x).view(rows, 16, 2, 8) for layer in (self.query, self.key, self.value))
        heads = [part.transpose(1, 2) for part in parts]
        made = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        return self.out(made.reshape(rows, 4, 4, 16)).transpose(1, 2)


def test_heads_may_become_windows(tmp_path):
    """onnxscript would give attention's output four axes, which ONNX Runtime refuses."""
    module = graphopt.compile(
        Windows().eval(),
        example_inputs=(torch.randn(2, 16, 16),),
        dynamic_shapes={"x": {0: "batch"}},
        measure=False,
    )
    result = graphopt.export_onnx(module, tmp_path / "windows.onnx", measure=False)
    assert result.error < 1e-5
