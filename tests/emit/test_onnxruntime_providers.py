"""Execution providers by name: what is taken, and what is refused with what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import graphopt
from graphopt.emit.ort import sessions
from graphopt.emit.ort.call import OrtRegion
from graphopt.emit.ort.providers import SHORT, memory_of, resolve_providers
from graphopt.errors import ExportError, GraphoptError, MissingDependencyError, RecipeError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_full_and_short_names(name: str) -> None:
    assert resolve_providers([name, "cpu"]) == ("CPUExecutionProvider",)


def test_one_name_need_not_be_in_a_list() -> None:
    assert resolve_providers("cpu") == ("CPUExecutionProvider",)


def test_short_names_stand_for_providers_that_onnxruntime_knows() -> None:
    assert set(SHORT.values()) <= set(onnxruntime.get_all_providers())


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("cpuu", "cpu"),
        ("openvin", "openvino"),
        ("CPUExecutionProvidr", "CPUExecutionProvider"),
        ("directx", "directml"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(given: str, near: str) -> None:
    with pytest.raises(RecipeError, match="unknown execution provider") as caught:
        resolve_providers([given])
    assert f"did you mean {near!r}" in str(caught.value)


def test_a_name_like_no_other_is_an_error_with_all_of_them() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_providers(["xyzzy"])
    assert all(name in str(caught.value) for name in ("cpu", "cuda", "coreml", "qnn"))


def test_none_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no execution provider is named"):
        resolve_providers([])


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("cuda", "onnxruntime-gpu"),
        ("tensorrt", "onnxruntime-gpu"),
        ("openvino", "onnxruntime-openvino"),
        ("directml", "onnxruntime-directml"),
        ("coreml", "onnxruntime (on macOS)"),
        ("qnn", "onnxruntime-qnn"),
    ],
)
def test_one_that_is_not_installed_is_an_error_with_the_package(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError) as caught:
        resolve_providers([name, "cpu"])
    said = str(caught.value)
    assert SHORT[name] in said and f"install {package}" in said
    assert "available here: CPUExecutionProvider" in said


def test_compile_refuses_before_it_captures() -> None:
    with pytest.raises(RecipeError, match="did you mean 'cuda'"):
        graphopt.compile(
            nn.Linear(2, 2), example_inputs=("no tensor",), target="onnxruntime", providers=["cda"]
        )


@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_providers_have_no_meaning_for_other_targets(target: str) -> None:
    with pytest.raises(GraphoptError, match="providers have no meaning"):
        graphopt.compile(nn.Linear(2, 2), target=target, providers=["cpu"])


def test_a_provider_that_takes_no_node_leaves_all_to_torch_and_says_so() -> None:
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider that takes no nodes")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    options = {"example_inputs": (x,), "target": "onnxruntime", "measure": False}
    fast = graphopt.compile(model, providers=["azure"], **options)
    assert not [m for m in fast.modules() if isinstance(m, OrtRegion)]
    (part,) = fast.report.partition.torch
    assert re.search("would run it on the CPU|fallback to CPU EP has been explicit", part.reason)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    both = graphopt.compile(model, providers=["azure", "cpu"], **options)
    (region,) = both.report.partition.regions
    assert not region.assigned or list(region.assigned) == ["CPUExecutionProvider"]


def test_values_on_another_device_stay_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    fast = graphopt.compile(
        nn.Linear(4, 4).eval(),
        example_inputs=(torch.randn(2, 4),),
        target="onnxruntime",
        providers=["cuda"],
        measure=False,
    )
    (part,) = fast.report.partition.torch
    assert "is on cpu, and the execution provider reads memory of cuda:0" in part.reason


def _run(provider: str, operator: str) -> sessions._Run:
    return sessions._Run(f"{provider}ExecutionProvider", operator)


def test_computations_of_sizes_may_be_left_to_the_cpu() -> None:
    sessions._refuse_cpu([_run("CUDA", "Gemm"), _run("CPU", "Shape"), _run("CPU", "Concat")])


@pytest.mark.parametrize("operator", ["Gemm", "Softmax", "Add"])
def test_what_computes_may_not(operator: str) -> None:
    runs = [_run("CPU", operator)] + [_run("CUDA", "Gemm")] * (operator != "Add")
    with pytest.raises(ExportError, match=f"on the CPU(.|\n)*operator {operator}"):
        sessions._refuse_cpu(runs)


def test_a_gpu_is_that_of_the_tensors_and_no_less_exact_than_torch() -> None:
    cuda = "CUDAExecutionProvider"
    settings = sessions.Settings((cuda, "CPUExecutionProvider"), torch.device("cuda", 1))
    exact = {"device_id": "1", "use_tf32": "0"}
    assert sessions._with_options(settings) == [(cuda, exact), "CPUExecutionProvider"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert sessions._with_options(settings)[0] == (cuda, {"device_id": "1", "use_tf32": "1"})
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("names", "place", "memory"),
    [
        (["CPUExecutionProvider"], "cuda:1", "cpu"),
        (["CUDAExecutionProvider"], "cuda:1", "cuda:1"),
        (["CPUExecutionProvider", "TensorrtExecutionProvider"], "cuda", "cuda:0"),
        (["CUDAExecutionProvider"], "cpu", "cuda:0"),
    ],
)
def test_the_memory_that_providers_read(names: list[str], place: str, memory: str) -> None:
    assert memory_of(names, torch.device(place)) == torch.device(memory)
