"""Regions of a model in ONNX Runtime: what they give, and what a call of them refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from ort_modules import DYNAMIC, compiled, in_regions
from torch import Tensor, nn

import graphopt
from graphopt.emit.ort import lowering
from graphopt.emit.ort.call import OrtRegion
from graphopt.errors import GraphoptError, VerificationError
from graphopt.verify.timing import Pace

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    """Two linear layers on ``(batch, length, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm, self.leave = nn.Linear(8, 400), nn.LayerNorm(400), nn.Linear(400, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.gelu(self.norm(self.enter(x)))).softmax(-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[OrtRegion]:
    """The regions that ran in ONNX Runtime, in order."""
    seen: list[OrtRegion] = []
    run = OrtRegion._run

    def counted(self: OrtRegion, values: Any) -> Any:
        seen.append(self)
        return run(self, values)

    monkeypatch.setattr(OrtRegion, "_run", counted)
    return seen


def test_a_whole_model_is_one_region_at_any_size(calls: list[OrtRegion]) -> None:
    model = Net()
    fast = compiled(model, torch.randn(2, 4, 8), dynamic_shapes=DYNAMIC)
    assert len(in_regions(fast)) == 1
    for shape in ((2, 4, 8), (5, 3, 8), (1, 1, 8)):
        x = torch.randn(shape)
        calls.clear()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        assert len(calls) == 1


def test_inputs_that_are_not_contiguous() -> None:
    model = Net()
    fast = compiled(model, torch.randn(2, 4, 8), dynamic_shapes=DYNAMIC)
    x = torch.randn(8, 3, 6).permute(1, 2, 0)[:, ::2]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_threads_do_not_disturb_each_other() -> None:
    model = Net()
    fast = compiled(model, torch.randn(2, 4, 8), dynamic_shapes=DYNAMIC)
    inputs = [torch.randn(1 + i % 5, 4 + i, 8) for i in range(16)]
    wanted = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(start, start + 40):
                at = i % len(inputs)
                if not torch.allclose(fast(inputs[at]), wanted[at], atol=1e-5):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_are_refused_in_words() -> None:
    fast = compiled(Net(), torch.randn(2, 4, 8))
    x = torch.randn(2, 4, 8, requires_grad=True)
    with pytest.raises(GraphoptError, match="computes no gradients") as caught:
        fast(x)
    assert "no_grad" in str(caught.value) and "target='torch'" in str(caught.value)
    with torch.no_grad():
        assert not fast(x).requires_grad
    with torch.inference_mode():
        fast(x)
    assert not fast(x.detach()).requires_grad


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(GraphoptError, match="training mode"):
        graphopt.compile(
            Net().train(), example_inputs=(torch.randn(2, 4, 8),), target="onnxruntime"
        )


def test_without_example_inputs_it_is_refused() -> None:
    with pytest.raises(GraphoptError, match="needs example_inputs"):
        graphopt.compile(Net(), target="onnxruntime")


def test_a_written_weight_is_refused_at_the_next_call() -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, passes=[])
    with torch.no_grad():
        model.enter.weight.mul_(2)
    with pytest.raises(GraphoptError, match=r"enter\.weight was written"):
        fast(x)


def test_a_session_reads_the_memory_of_torch_itself() -> None:
    """Seen by a write that the module would refuse: what ONNX Runtime computes follows it."""
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, passes=[])
    (region,) = in_regions(fast)
    values = [*fast._arguments([x])]
    given = [values[fast._graph.targets.index(name)] for _, name in region.layout.weights]
    (before,) = region._run([x, *given])
    with torch.no_grad():
        for tensor in (model.enter.weight, model.enter.bias, model.leave.weight):
            tensor.normal_()
        (after,) = region._run([x, *given])
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("write", ["load_state_dict", "data"])
def test_so_is_one_that_is_loaded_or_replaced(write: str) -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, passes=[])
    if write == "data":
        model.leave.bias.data = torch.zeros(3)
    else:
        fast.load_state_dict(Net().state_dict())
    with pytest.raises(GraphoptError, match="compile the model again"):
        fast(x)


def test_state_dict_has_the_names_and_tensors_of_the_original() -> None:
    model = Net()
    fast = compiled(model, torch.randn(2, 4, 8), passes=[])
    state = fast.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].data_ptr() == tensor.data_ptr()


def test_a_deep_copy_is_independent() -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, passes=[])
    wanted, twin = fast(x), copy.deepcopy(fast)
    (own,) = in_regions(twin)
    assert own.session is not in_regions(fast)[0].session
    weight = twin.get_parameter("enter.weight")
    assert any(w.data_ptr() == weight.data_ptr() for w in own.model.weights.values())
    with torch.no_grad():
        model.enter.weight.zero_()
    torch.testing.assert_close(twin(x), wanted)
    with pytest.raises(GraphoptError, match="was written"):
        copy.deepcopy(fast)


def test_a_pickle_runs_in_onnxruntime_again(calls: list[OrtRegion]) -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    fast = pickle.loads(pickle.dumps(compiled(model, x)))
    calls.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


def test_a_saved_module_is_loaded_for_onnxruntime(tmp_path: Any, calls: list[OrtRegion]) -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    graphopt.save(compiled(model, x), tmp_path / "net.pt2")
    fast = graphopt.load(
        tmp_path / "net.pt2", target="onnxruntime", providers=["cpu"], measure=False
    )
    calls.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["half", "double"])
def test_other_dtypes_are_refused(change: str) -> None:
    fast = compiled(Net(), torch.randn(2, 4, 8))
    with pytest.raises(GraphoptError, match="captured in"):
        getattr(fast, change)()
    fast.to("cpu")
    fast(torch.randn(2, 4, 8))


def test_under_autocast_and_transforms_torch_runs(calls: list[OrtRegion]) -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), model(x))
    gradient = torch.func.grad(lambda v: fast(v)[..., 0].sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda v: model(v)[..., 0].sum())(x))
    assert not calls


def test_wrong_results_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtRegion._run
    monkeypatch.setattr(
        OrtRegion, "_run", lambda self, values: tuple(v * 1.01 for v in run(self, values))
    )
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, strict=False)
    assert any("is wrong" in n and "torch target was kept" in n for n in fast.report.notes)
    assert not in_regions(fast)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(VerificationError, match="in ONNX Runtime is wrong"):
        compiled(model, x)


def test_wrong_results_at_other_sizes_alone_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtRegion._run

    def wrong(self: OrtRegion, values: Any) -> Any:
        off = 1.0 if values[0].shape[0] == 2 else 1.01
        return tuple(v * off for v in run(self, values))

    monkeypatch.setattr(OrtRegion, "_run", wrong)
    with pytest.raises(VerificationError, match="is wrong"):
        compiled(Net(), torch.randn(2, 4, 8), dynamic_shapes=DYNAMIC)


@pytest.mark.parametrize("always", [True, False])
def test_failing_sessions_are_put_back(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    run = OrtRegion._run

    def failing(self: OrtRegion, values: Any) -> Any:
        if always or values[0].shape[0] != 2:
            raise RuntimeError("no such luck")
        return run(self, values)

    monkeypatch.setattr(OrtRegion, "_run", failing)
    model, x = Net(), torch.randn(2, 4, 8)
    fast = compiled(model, x, strict=False, dynamic_shapes=DYNAMIC)
    told = [p.reason for p in fast.report.partition.torch] if always else fast.report.notes
    assert any("no such luck" in text for text in told)
    assert not in_regions(fast)
    torch.testing.assert_close(fast(x), model(x))


def timed(monkeypatch: pytest.MonkeyPatch, torch_: float, shared: float, packed: float) -> None:
    """Let timings be these."""
    seconds = {"torch": torch_, "shared": shared, "packed": packed}

    def pace(old: nn.Module, new: nn.Module, _piece: Any) -> Pace:
        return Pace(*(seconds[_kind(m)] for m in (old, new)))

    monkeypatch.setattr(lowering, "_pace", pace)


def _kind(module: nn.Module) -> str:
    if not isinstance(module, OrtRegion):
        return "torch"
    return "packed" if module.settings.packed else "shared"


@pytest.mark.parametrize("shared", [1.0, 1.2])
def test_a_region_that_is_not_faster_stays_in_torch(
    monkeypatch: pytest.MonkeyPatch, shared: float
) -> None:
    timed(monkeypatch, 1.0, shared, shared)
    fast = compiled(Net(), torch.randn(2, 4, 8), measure=True)
    assert not in_regions(fast)
    (part,) = fast.report.partition.torch
    assert "not faster in ONNX Runtime" in part.reason and part.operators["aten.linear"] == 2


@pytest.mark.parametrize(("packed", "taken"), [(0.88, False), (0.7, True)])
def test_copies_of_weights_must_be_worth_their_memory(
    monkeypatch: pytest.MonkeyPatch, packed: float, taken: bool
) -> None:
    model, x = Net(), torch.randn(2, 4, 8)
    timed(monkeypatch, 2.0, 0.9, packed)
    fast = compiled(model, x, measure=True)
    assert in_regions(fast)[0].settings.packed is taken
    assert (fast.report.partition.regions[0].own_bytes > 320) is taken
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
