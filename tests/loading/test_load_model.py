"""Models of each kind load, or say what is missing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from hostile_files import Payload, saved

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


# TorchScript


class Script(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Writing(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.ones(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Recurrent(torch.nn.Module):
    """Its TorchScript calls operators of the namespace prim, and raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        self.memory = torch.nn.LSTM(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.memory(x)[0] / x.shape[0]


@pytest.mark.parametrize("how", ["traced", "scripted"])
@pytest.mark.parametrize("kind", [Script, Recurrent])
def test_torchscript_loads(how: str, kind: type[torch.nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    x = torch.randn(2, 3)
    script = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, x)
    path = tmp_path / "m.pt"
    script.save(path)
    loaded = load_model(path)
    assert loaded.kind == "torchscript" and loaded.module is not None
    torch.testing.assert_close(loaded.module(x), model(x), rtol=0, atol=0)
    assert {t.name for t in inspect_file(path).tensors} >= {"layers.0.weight", "layers.0.bias"}


def test_torchscript_that_writes_files_on_load(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.script(Writing(str(marker))).save(path)
    assert not marker.exists()
    with pytest.raises(LoadError, match="the code calls save") as refusal:
        load_model(path)
    assert "--trust-pickle" in (refusal.value.fix or "")
    assert inspect_file(path).findings
    assert not marker.exists()
    load_model(path, trust_pickle=True)
    assert marker.exists(), "the attack was not real"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("torch.save(x, 'f')", "calls save"),
        ("torch . save (x, 'f')", "calls save"),
        ("torch.  # comment\\\nsave(x)", "calls save"),
        ("getattr(torch, 'save')(x)", "calls save"),
        ("getattr(torch, 'sa' 've')(x)", "calls save"),
        ("getattr(torch, '\\x73ave')(x)", "calls save"),
        ("torch.from_file('/etc/passwd')", "calls from_file"),
        ("ops.aten.from_file('/etc/passwd')", "calls from_file"),
        ("ops.c10d.send(x)", "reaches outside"),
        ("ops . c10d . send(x)", "reaches outside"),
        ("__torch__.torch.classes.mine.Thing()", "native object of torch.classes.mine"),
        ("'unterminated", "cannot be read"),
    ],
)
def test_torchscript_code_scan(code: str, reason: str) -> None:
    from graphopt.loading.torchscript import code_reasons

    source = f"def f(x):\n  return {code}\n"
    assert any(reason in found for found in code_reasons(source))


@pytest.mark.parametrize(
    "code",
    [
        'getattr(self, "0")',
        "torch.relu(x)",
        "ops.quantized.linear(x, self.w, 1., 0)",
        "torch.linear(x, x, None)",
        "__torch__.torch.classes.quantized.LinearPackedParamsBase",
        "self.saved + 1  # save",
    ],
)
def test_torchscript_code_that_only_computes(code: str) -> None:
    from graphopt.loading.torchscript import code_reasons

    assert not list(code_reasons(f"def f(self, x):\n  return {code}\n"))


# Hugging Face folders


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def copied(source: Path, target: Path, **config: object) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(8)[None]).logits


def test_folder_loads(bert: Path) -> None:
    loaded = load_model(bert)
    assert loaded.kind == "huggingface" and loaded.config.hidden_size == 8
    assert type(loaded.module).__name__ == "BertForMaskedLM" and not loaded.module.training
    facts = inspect_file(bert)
    assert facts.metadata["model_type"] == "bert" and facts.tensors and not facts.findings
    with pytest.raises(LoadError, match="tokenizer"):
        loaded.tokenizer()


def test_folder_with_pickled_weights_loads_weights_only(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "bin")
    loaded = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(loaded.module.state_dict(), folder / "pytorch_model.bin")
    again = load_model(folder)
    torch.testing.assert_close(logits(again.module), logits(loaded.module), rtol=0, atol=0)
    assert inspect_file(folder).metadata["weights"] == "bin"


def test_folder_with_hostile_weights(bert: Path, tmp_path: Path, marker: Path) -> None:
    folder = copied(bert, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(saved({"w": Payload(marker)}))
    with pytest.raises(LoadError, match="pathlib") as refusal:
        load_model(folder, trust_pickle=True)
    assert "save_pretrained" in (refusal.value.fix or "")
    assert any("pathlib" in name for name in inspect_file(folder).unsafe_globals)
    assert not marker.exists()


def test_folders_own_code_is_never_run(bert: Path, tmp_path: Path, marker: Path) -> None:
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    folder = copied(bert, tmp_path / "own", auto_map=auto_map, model_type="nobody_knows")
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(LoadError):
        load_model(copied(folder, tmp_path / "auto", architectures=None))
    with pytest.raises(LoadError, match="no model class 'Own'"):
        load_model(copied(folder, tmp_path / "named", architectures=["Own"]))
    known = copied(bert, tmp_path / "known", auto_map=auto_map)
    (known / "own.py").write_text((folder / "own.py").read_text())
    assert "the folder's own code was not used (auto_map)" in load_model(known).notes
    assert not marker.exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"attn_implementation": "someone/kernel"}, "download a kernel and run it"),
        ({"_attn_implementation_internal": "a/b:c"}, "download a kernel and run it"),
        ({"text_config": {"attn_implementation": {"x": "a/b"}}}, "download a kernel"),
        ({"architectures": ["__loader__"]}, "no model class"),
        ({"architectures": ["pipeline"]}, "no model class"),
    ],
)
def test_config_that_brings_code(config: dict, reason: str, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=reason):
        load_model(copied(bert, tmp_path / "evil", **config))


def test_adapter_and_index_that_lead_elsewhere(bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="holds an adapter"):
        load_model(folder)
    folder = copied(bert, tmp_path / "index")
    index = {"weight_map": {"w": "../secret.safetensors"}}
    (tmp_path / "secret.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="not a file of the folder"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"intermediate_size": 1 << 40}, "parameters, the weights have .* bytes"),
        ({"num_hidden_layers": 1 << 40}, "out of all proportion"),
    ],
)
def test_config_of_an_endless_model(config: dict, reason: str, bert: Path, tmp_path: Path) -> None:
    """transformers would fill the memory with random weights."""
    with pytest.raises(LoadError, match=reason):
        load_model(copied(bert, tmp_path / "endless", **config))


def test_missing_weights_are_not_passed_over(bert: Path, tmp_path: Path) -> None:
    """transformers draws them at random and only warns; here the notes say it."""
    from safetensors.torch import load_file, save_file

    folder = copied(bert, tmp_path / "gap")
    state = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(state) if n.endswith("intermediate.dense.weight"))
    state["nobody.needs"] = state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    notes = " ".join(load_model(folder).notes)
    assert f"drawn at random, for the files lack them: {name}" in notes
    assert "left unused: nobody.needs" in notes


def test_config_of_another_size(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers prints a report with colours; here one error names the first tensor."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = copied(bert, tmp_path / "misfit", intermediate_size=12)
    with pytest.raises(LoadError) as refusal:
        load_model(folder)
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    assert f"{name} has shape [16] in the file, and [12] by config.json" in refusal.value.what
    assert "2 more tensors" in refusal.value.what and refusal.value.fix
    assert caplog.text == ""


@pytest.mark.parametrize("damage", ["no config", "no weights", "bad config", "short weights"])
def test_incomplete_folder(damage: str, bert: Path, tmp_path: Path) -> None:
    folder = copied(bert, tmp_path / "part")
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "bad config":
        (folder / "config.json").write_text("[")
    else:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(LoadError) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)


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
