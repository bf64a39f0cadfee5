"""These tests are about ONNX files: without the extra `onnx` there is nothing to test."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

import graphopt

if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def fused(tmp_path):
    """Optimizes spelled attention, with `FuseAttention` alone; the report and the file."""

    def run(spelled, *more, out=None, **options):
        out = spelled.layer() if out is None else out
        source = spelled.saved(tmp_path / "m.onnx", out, *more)
        target = tmp_path / "o.onnx"
        given = {"measure": False, "passes": ["FuseAttention"], "strict": True} | options
        return graphopt.optimize_onnx(source, target, **given)

    return run
