"""ONNX files whose products round activations that the program reads as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_onnx_quantized import WIDTH, Product, Several
from torch import Tensor

import graphopt
from graphopt.emit import onnx as onnx_module
from graphopt.emit import onnx_runtime
from graphopt.emit.onnx_quantized import Lowering, calls_of
from graphopt.emit.onnx_quantized.alone import difference
from graphopt.errors import VerificationError
from graphopt.kernels.quantized import Scheme
from graphopt.verify.unrounded import rounded, rounds

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def _of_four_bits(x: Tensor) -> Any:
    part = Product(Scheme(4, group_size=32), "none", WIDTH, bias=True)
    return graphopt.compile(
        part.eval(), example_inputs=(x,), passes=["Canonicalize"], measure=False
    )


def test_rows_are_rounded_in_a_copy_of_a_program() -> None:
    x = torch.randn(9, WIDTH)
    plain = _of_four_bits(x).program
    twin = rounded(plain)
    assert not rounds(plain.graph) and rounds(twin.graph)
    (as_it_is,), (made,) = plain.run([x]), twin.run([x])
    assert 1e-4 < difference(made, as_it_is)[0] < 0.02
    assert rounded(twin) is twin


def test_products_that_round_most_are_named() -> None:
    """Those without which a quarter of the error is left, whatever the others are."""
    errors = {"a": 0.01, "b": 0.1, "c": 0.01, "d": 0.08, "e": 0.9}
    choices = [
        SimpleNamespace(
            error=e, call=SimpleNamespace(name=n), form=SimpleNamespace(rounds=n != "e")
        )
        for n, e in errors.items()
    ]
    lowering: Any = Lowering(None, choices)  # type: ignore[arg-type]
    assert lowering.most_rounded() == {"b", "d"}
    assert Lowering(None, choices[:1]).most_rounded() == {"a"}  # type: ignore[arg-type]


def test_only_what_rounds_most_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = [Product(Scheme(4, group_size=32), "none", WIDTH, bias=True) for _ in range(2)]
    module = graphopt.compile(
        Several(parts).eval(),
        example_inputs=(torch.randn(9, WIDTH),),
        passes=["Canonicalize"],
        measure=False,
    )
    real, seen = onnx_module.compare_with_runtime, []

    def first_fails(*given: Any, **options: Any) -> Any:
        seen.append(given)
        if len(seen) == 1:
            raise VerificationError("off")
        return real(*given, **options)

    monkeypatch.setattr(onnx_module, "compare_with_runtime", first_fails)
    name = calls_of(module.program)[next(iter(calls_of(module.program)))].name
    monkeypatch.setattr(Lowering, "most_rounded", lambda _self: frozenset({name}))
    result = graphopt.export_onnx(module, tmp_path / "q.onnx", measure=False)
    assert len(seen) == 2 and result.notes[-1].startswith(f"`{name}`: activations are not rounded")
    levels = sorted(
        a.i
        for n in onnx.load(result.path).graph.node
        for a in n.attribute
        if a.name == "accuracy_level"
    )
    assert len(levels) == 2 and levels[0] != 4 and levels[1] == 4


def test_a_file_that_rounds_activations_is_held_to_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Errors on the captured inputs may be smaller than those on others."""
    module = _of_four_bits(torch.randn(9, WIDTH))
    monkeypatch.setattr(Lowering, "tolerance", 1e-4)
    result = graphopt.export_onnx(module, tmp_path / "q.onnx", measure=False)
    assert any("accuracy 4" in note for note in result.notes)
    monkeypatch.setattr(onnx_runtime, "rounded", lambda program: program)
    exact = graphopt.export_onnx(module, tmp_path / "again.onnx", measure=False)
    assert exact.error < 1e-5 < result.error
    assert "are not rounded" in exact.notes[-1] and "allowed 1e-04" in exact.notes[-1]
    assert not any("accuracy 4" in note for note in exact.notes)
