"""``graphopt::chunked_rows`` by a sweep of the Triton kernels: when, and that it is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreting import run_interpreted

from graphopt.kernels.chunked_rows import dispatch


@pytest.mark.parametrize("group", ["kin", "not kin"])
def test_under_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    run_interpreted(Path(__file__).with_name("dispatch_cases.py"), group)


def test_chunks_on_a_cpu() -> None:
    assert not dispatch.by_triton(torch.empty(1))


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("shared", [227, 99, None])
def test_devices(
    has_gpu: bool, has_triton: bool, shared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton has to be there, and the memory that tiles take."""
    given = {} if shared is None else {"shared_memory_per_block_optin": shared * 1024}
    spec = object() if has_triton else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**given))
    able = dispatch._is_able.__wrapped__(torch.device("cuda"))
    assert able == (has_gpu and has_triton and shared == 227)
