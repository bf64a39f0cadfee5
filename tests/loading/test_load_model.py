"""Checkpoints load into an architecture of the user, or say what does not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from graphopt.errors import LoadError
from graphopt.loading import LoadedModel, inspect_file, load_model
from graphopt.loading.tensors import named_tensors

SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = torch.nn.Linear(3, width)
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.first(x))

def wide():
    return Net(8)

def broken():
    raise RuntimeError("no such dataset")

def needs(width):
    return Net(width)

def text():
    return "a model"

class Zoo:
    small = Net
"""


@pytest.fixture
def arch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the user's own architectures."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "users_nets.py").write_text(SOURCE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return folder


def reference() -> torch.nn.Module:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 4)
            self.norm = torch.nn.BatchNorm1d(4)

    return Net()


def state() -> dict[str, torch.Tensor]:
    return reference().state_dict()


def load(value: object, folder: Path, arch: str = "users_nets:Net") -> LoadedModel:
    path = folder / "m.pt"
    torch.save(value, path)
    return load_model(path, arch=arch)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state().items()}


NESTS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "plain": (state, []),
    "state_dict": (lambda: {"state_dict": state(), "epoch": 3}, ["'state_dict', beside epoch"]),
    "model": (lambda: {"model": state(), "ema": state()}, ["'model', beside ema"]),
    "deep": (lambda: {"state_dict": {"model": state()}}, ["'state_dict'", "'model'"]),
    "parallel": (lambda: prefixed("module."), ["'module.' (DataParallel)"]),
    "compiled": (lambda: prefixed("_orig_mod."), ["'_orig_mod.' (torch.compile)"]),
    "both": (lambda: prefixed("_orig_mod.module."), ["torch.compile", "DataParallel"]),
    "half parallel": (
        lambda: {k: v.half() for k, v in prefixed("module.").items() if "num_" not in k},
        ["DataParallel", "converted weights from float16 to float32"],
    ),
    "half": (
        lambda: {k: v.half() if v.is_floating_point() else v for k, v in state().items()},
        ["converted weights from float16 to float32"],
    ),
}


@pytest.mark.parametrize(("make", "notes"), NESTS.values(), ids=list(NESTS))
def test_state_dict_is_found_and_loaded(
    make: Callable[[], object], notes: list[str], arch_folder: Path
) -> None:
    torch.manual_seed(1)
    value = make()
    loaded = load(value, arch_folder)
    assert loaded.kind == "state_dict" and loaded.module is not None
    assert not loaded.module.training
    assert len(loaded.notes) == len(notes)
    assert all(expected in note for expected, note in zip(notes, loaded.notes, strict=True))
    weight = next(iter(_tensors(value)))
    torch.testing.assert_close(loaded.module.first.weight, weight.float(), rtol=0, atol=0)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for child in value.values() for tensor in _tensors(child)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_working_folder_is_left_out_of_the_path_again(arch_folder: Path) -> None:
    before = list(sys.path)
    load(state(), arch_folder)
    assert sys.path == before


def test_factory_may_be_nested(arch_folder: Path) -> None:
    assert load(state(), arch_folder, "users_nets:Zoo.small").module is not None


def test_safetensors(arch_folder: Path) -> None:
    from safetensors.torch import save_file

    path = arch_folder / "m.safetensors"
    save_file(state(), path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="holds weights, not a model"):
        load_model(path)
    assert load_model(path, arch="users_nets:Net").kind == "state_dict"
    facts = inspect_file(path)
    assert facts.metadata == {"format": "pt"} and facts.tensor_bytes == 4 * (12 + 4 + 16) + 8


def test_batch_count_may_be_missing(arch_folder: Path) -> None:
    """As in checkpoints from before torch 0.4.1, and as load_state_dict allows."""
    old = {k: v for k, v in state().items() if "num_batches" not in k}
    assert load(old, arch_folder).module is not None


MISFITS = {
    "missing": (
        lambda: {"first.weight": torch.ones(4, 3)},
        "missing in the checkpoint .*first.bias",
    ),
    "unexpected": (lambda: state() | {"last.bias": torch.ones(1)}, "unknown to .*last.bias"),
    "renamed": (lambda: prefixed("net."), r"perhaps net.first.weight is first.weight"),
    "shape": (
        lambda: state() | {"first.weight": torch.ones(8, 3)},
        r"shapes differ \(1\): first.weight \(8, 3\) for \(4, 3\)",
    ),
    "rounded": (
        lambda: state() | {"norm.num_batches_tracked": torch.tensor(1.5)},
        "types differ .*torch.float32 for torch.int64",
    ),
    "escape": (lambda: state() | {"a\x1b[2J": torch.ones(1)}, r"a\\x1b\[2J"),
}


@pytest.mark.parametrize(("make", "reason"), MISFITS.values(), ids=list(MISFITS))
def test_misfit_is_explained(make: Callable[[], dict], reason: str, arch_folder: Path) -> None:
    with pytest.raises(LoadError, match=reason) as refusal:
        load(make(), arch_folder)
    assert "--arch" in (refusal.value.fix or "")


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("users_nets", "has not the form"),
        ("users_nets:", "has not the form"),
        ("users_nets:absent", "has no attribute 'absent'"),
        ("no_such_package:Net", "No module named 'no_such_package'"),
        ("users_nets:broken", "RuntimeError: no such dataset"),
        ("users_nets:needs", "missing 1 required positional argument"),
        ("users_nets:text", "gave a builtins.str, not a torch.nn.Module"),
    ],
)
def test_architecture_that_cannot_be_built(arch: str, reason: str, arch_folder: Path) -> None:
    with pytest.raises(LoadError, match=reason):
        load(state(), arch_folder, arch)


def test_error_in_the_users_code_names_its_line(arch_folder: Path) -> None:
    with pytest.raises(LoadError) as refusal:
        load(state(), arch_folder, "users_nets:broken")
    line = SOURCE.splitlines().index('    raise RuntimeError("no such dataset")') + 1
    assert refusal.value.where == f"{arch_folder / 'users_nets.py'}:{line}"


@pytest.mark.parametrize("value", [{"epoch": 3}, [torch.ones(1)], {"a": {"b": torch.ones(1)}}, 7])
def test_no_state_dict(value: object, arch_folder: Path) -> None:
    with pytest.raises(LoadError, match="no state dict in the file"):
        load(value, arch_folder)


def test_weights_without_arch(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(state(), path)
    with pytest.raises(LoadError, match=r"keys first\.weight, first\.bias") as refusal:
        load_model(path)
    assert "--arch package.module:factory" in (refusal.value.fix or "")
    assert "in Python build the model" in (refusal.value.fix or "")


def test_trusted_module_gives_its_weights_to_arch(arch_folder: Path) -> None:
    path = arch_folder / "m.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    arch = "torch.nn:Sequential"
    with pytest.raises(LoadError, match="unknown to the architecture"):
        load_model(path, arch=arch, trust_pickle=True)


def test_import_is_light() -> None:
    code = (
        "import sys, graphopt.loading as l; "
        "print([m for m in ('transformers', 'onnx', 'onnxruntime', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_containers_that_are_shared_are_seen_once() -> None:
    """A nest of lists, each twice in the next, has two to the power of thirty paths."""
    nest: list[object] = [torch.ones(1)]
    for _ in range(30):
        nest = [nest, nest]
    nest.append(nest)
    found = islice(named_tensors({"a": nest}), 3)
    assert [name for name, _ in found] == ["a" + ".0" * 31]


def test_a_tensor_is_told_under_each_of_its_names() -> None:
    tensor = torch.ones(1)
    found = list(named_tensors({"a": tensor, "b": [tensor, tensor]}))
    assert [name for name, _ in found] == ["a", "b.0", "b.1"]
    assert all(value is tensor for _, value in found)
