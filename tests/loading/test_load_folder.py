"""Hugging Face folders load, or say what is missing; nothing of a folder is run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hostile_files import Payload, saved

from graphopt.errors import LoadError
from graphopt.loading import inspect_file, load_model


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
