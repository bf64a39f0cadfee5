"""These tests are about ONNX files: without the extra `onnx` there is nothing to test."""

from __future__ import annotations

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]
