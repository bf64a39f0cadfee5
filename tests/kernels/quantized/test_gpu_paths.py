"""When paths for GPUs are used: tried first, left out with a reason, timed where that can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from quantized_cases import SCHEMES, name
from torch import Tensor

from graphopt.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    choice,
    chosen,
    definition,
    embedding,
    experts,
    gpu,
    gpu_timing,
    linear,
    paths,
    quantize,
    trials,
)
from graphopt.kernels.quantized.cases import Case

CPU = torch.device("cpu")
FOUR = Case(Scheme(4, group_size=32), "plain", "none", torch.bfloat16, "cuda", 64, 96)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(paths, "_found", {})
    trials.is_right.cache_clear()
    trials._has_triton.cache_clear()
    yield
    trials.is_right.cache_clear()
    trials._has_triton.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as what is taken goes, there is a GPU, and kernels are right on it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu, "is_right", lambda *_: True)


def right(_: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return definition.weight_only(x, weight, bias)


def off_by_one_percent(_: str, x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    return definition.weight_only(x, weight, None) * 1.01 + bias


def without_bias(_: str, x: Tensor, weight: QuantizedWeight, __: Tensor) -> Tensor:
    return definition.weight_only(x, weight, None)


def last_row_left_out(_: str, x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    made = definition.weight_only(x, weight, bias)
    made[64:] = torch.nan
    return made


def broken(*_: Any) -> Tensor:
    raise RuntimeError("")


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("dtype", trials.LIMITS, ids=str)
def test_what_is_right_passes_its_trial(scheme: Scheme, dtype: torch.dtype) -> None:
    case = FOUR._replace(scheme=scheme, dtype=dtype)
    assert trials.failure("definition", right, case, CPU) is None
    if scheme.dtype in ("int", "fp8"):
        run = lambda _, x, weight, bias: definition.dynamic(x, weight, bias)  # noqa: E731
        assert trials.failure("dynamic", run, case._replace(activations="dynamic"), CPU) is None


@pytest.mark.parametrize("dtype", trials.LIMITS, ids=str)
@pytest.mark.parametrize(
    ("run", "says"),
    [
        (off_by_one_percent, "off by 0.0(098|1|11) for 3 rows"),
        (without_bias, "for 3 rows"),
        (last_row_left_out, "off by nan for 70 rows"),
        (broken, "RuntimeError"),
    ],
)
def test_what_is_wrong_is_left_out_and_said_once(
    run: Callable[..., Tensor], says: str, dtype: torch.dtype
) -> None:
    case = FOUR._replace(dtype=dtype)
    with pytest.warns(UserWarning, match=says):
        assert not trials.is_right("fast", run, case, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trials.is_right("fast", run, case, CPU)


def test_random_numbers_of_the_caller_stay() -> None:
    state = torch.get_rng_state()
    assert trials.failure("definition", right, FOUR, CPU) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_without_triton_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "find_spec", lambda _: None)
    with pytest.warns(UserWarning, match="pip install triton") as said:
        for path in ("weight_only", "dequantized"):
            assert not trials.is_right(path, right, FOUR, CPU)
    assert len(said) == 1


@pytest.mark.usefixtures("hopper")
def test_what_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(scheme: Scheme, how: str = "none", **given: Any) -> list[str]:
        case = FOUR._replace(scheme=scheme, activations=how, **given)
        monkeypatch.setattr(paths, "_found", {})
        return [path.name for path in paths.paths_for(case)]

    weights = ["definition", "weight_only", "dequantized"]
    eight = Scheme(8, "fp8")
    assert names(FOUR.scheme) == names(Scheme(4, "nvfp4")) == names(eight) == weights
    assert names(FOUR.scheme, dtype=torch.float64) == ["definition"]
    assert names(Scheme(4), inputs=90) == ["definition"]
    assert names(Scheme(), "dynamic") == ["dynamic", "dynamic_rows", "by_int_mm"]
    assert names(eight, "dynamic") == ["dynamic", "dynamic_rows", "by_scaled_mm"]
    assert names(eight, "dynamic", dtype=torch.float16) == ["dynamic", "dynamic_rows"]
    assert names(eight, "dynamic", outputs=72) == ["dynamic", "dynamic_rows"]
    assert names(FOUR.scheme, "dynamic") == ["dynamic", "dynamic_rows"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert names(eight) == names(Scheme(4, "nvfp4")) == ["definition"]
    assert names(FOUR.scheme) == names(Scheme(4, "mxfp4")) == weights
    monkeypatch.setattr(gpu, "is_right", lambda name, *_: name == "dequantized")
    assert names(FOUR.scheme) == ["definition", "dequantized"]


def test_nothing_is_taken_on_a_cpu() -> None:
    found = paths.paths_for(FOUR._replace(device="cpu"))
    assert [path.name for path in found] == ["definition"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """Shapes of those whose GPU was the current one, each time that paths were looked for."""
    asked: list[tuple[int, ...] | None] = []
    current: list[tuple[int, ...] | None] = [None]
    look = paths.paths_for

    @contextmanager
    def on(tensor: Tensor) -> Iterator[None]:
        current.append(tuple(tensor.shape))
        yield
        current.pop()

    def paths_for(case: Case) -> list[paths.Path]:
        asked.append(current[-1])
        return look(case)

    monkeypatch.setattr(gpu, "on", on)
    for module in (paths, choice):
        monkeypatch.setattr(module, "paths_for", paths_for)
    return asked


@pytest.mark.parametrize("offsets", [None, torch.tensor([2, 6])], ids=["batched", "grouped"])
def test_experts_run_on_the_gpu_of_their_rows(
    offsets: Tensor | None, asked: list[tuple[int, ...] | None]
) -> None:
    x, weight = torch.randn(6, 96, requires_grad=True), quantize(torch.randn(64, 96), FOUR.scheme)
    made = experts(x, weight, 2, offsets)
    assert asked == [(6, 96)] * 2
    made.sum().backward()
    assert asked[2:] == [(6, 32)] * 2


def test_products_and_lookups_run_on_the_gpu_of_their_input(
    asked: list[tuple[int, ...] | None],
) -> None:
    x, weight = torch.randn(6, 96, requires_grad=True), quantize(torch.randn(64, 96), FOUR.scheme)
    linear(x, weight).sum().backward()
    embedding(torch.tensor([3, 1]), weight)
    assert asked == [(6, 96), (6, 64), (2,)]


@pytest.mark.usefixtures("hopper")
def test_calls_on_a_gpu_are_timed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantize(torch.randn(64, 96), FOUR.scheme), torch.randn(5, 96).bfloat16()
    monkeypatch.setattr(choice, "quartiles", None)
    monkeypatch.setattr(choice, "_able", lambda can, *_: can)
    monkeypatch.setattr(choice, "device_quartiles", lambda runs: [3.0, 1.0, 2.0][: len(runs)])
    assert choice.choose(FOUR, x, weight).name == "weight_only"
    assert [kind[1] for kind in chosen()] == [8]


@pytest.mark.usefixtures("hopper")
def test_what_fails_for_some_sizes_is_left_out_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, x: Tensor, *_: Any) -> Tensor:
        if len(x) == 1 and name == "weight_only":
            raise RuntimeError("out of shared memory")
        return x

    weight, x = quantize(torch.randn(64, 96), FOUR.scheme), torch.randn(5, 96).bfloat16()
    fast = partial(run, "weight_only"), partial(run, "dequantized")
    plain = [*paths.paths_for(FOUR)]
    plain[1:] = [path._replace(run=r) for path, r in zip(plain[1:], fast, strict=True)]
    monkeypatch.setitem(paths._found, FOUR, plain)
    monkeypatch.setattr(choice, "device_quartiles", lambda runs: [3.0, 1.0, 2.0][: len(runs)])
    with pytest.warns(UserWarning, match="1 rows .*'weight_only': RuntimeError: out of shared"):
        assert choice.choose(FOUR, x[:1], weight).name == "dequantized"
    assert choice.choose(FOUR, x, weight).name == "weight_only"


@pytest.mark.usefixtures("hopper")
def test_what_a_cuda_graph_captures_was_chosen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantize(torch.randn(64, 96), FOUR.scheme), torch.randn(5, 96).bfloat16()
    monkeypatch.setattr(choice, "_able", lambda can, *_: can)
    monkeypatch.setattr(choice, "device_quartiles", lambda runs: [3.0, 1.0, 2.0][: len(runs)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gpu, "is_right", None)  # would launch
    with pytest.warns(UserWarning, match="5 rows .* Run the model once"):
        assert choice.choose(FOUR, x, weight).name == "definition"
    assert paths._found == {} == choice._chosen
    monkeypatch.setattr(gpu, "is_right", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    choice.choose(FOUR, x, weight)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice.choose(FOUR, x, weight).name == "weight_only"
    with pytest.warns(UserWarning, match="100 rows"):
        assert choice.choose(FOUR, x.repeat(20, 1), weight).name == "definition"
    with choice.using("dequantized"):
        assert choice.choose(FOUR, x.repeat(20, 1), weight).name == "dequantized"


def test_slow_runs_are_timed_once_and_others_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    seconds = {"slow": 9.0, "good": 1.0, "best": 0.9}

    def timed(run: Callable[[], object], _: None) -> float:
        run()
        return seconds[seen[-1]]

    monkeypatch.setattr(gpu_timing, "beside", lambda: None)
    monkeypatch.setattr(gpu_timing, "device_seconds", timed)
    runs = [lambda n=n: seen.append(n) for n in seconds]
    assert gpu_timing.device_quartiles(runs) == list(seconds.values())
    assert seen[:6] == 2 * list(seconds)
    assert seen[6:] == 6 * ["good", "best"]
