"""``graphopt export --format optimum``: what it writes, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.cli import main

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def call(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one call."""
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        status = int(leave.code or 0)
    return (status, *capsys.readouterr())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a tokenizer of words, in a folder."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 192)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)
    return folder


def test_a_folder_in_four_bits_from_a_text(source: Path, tmp_path: Path, capsys: Any) -> None:
    from graphopt.generation import OnnxCausalLM

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{3 + i * i % 189}" for i in range(400)))
    passes = "QuantizeMatmul:bits=4,group_size=32,activations=null,method=gptq"
    options = ["--format", "optimum", "-o", out, "--pass", passes, "--calibration", text]
    status, told, err = call(capsys, "export", source, *options, "--no-measure", "--json")
    assert status == 0, err
    facts = json.loads(told)
    assert {"model.onnx", "config.json", "tokenizer.json", "genai_config.json"} <= set(
        facts["files"]
    )
    assert any("MatMulNBits" in note for note in facts["models"][0]["notes"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("w7 w8 w9", return_tensors="pt").input_ids
    made = OnnxCausalLM(out).generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape == (1, ids.shape[1] + 4)


def test_lines_say_what_was_written(source: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--format", "optimum", "-o", tmp_path / "out", "--recipe", "none"]
    status, told, err = call(capsys, "export", source, *options, "--no-measure")
    assert status == 0, err
    assert f"wrote {tmp_path / 'out'} for text-generation: config.json, genai" in told
    assert "prompts and tokens behind them: relative error" in told


REFUSED = [
    (["--opset", "99"], "cannot write operator set 99"),
    (["--inputs", "input_ids:int64[2,4]"], "leave it out"),
    (["--train"], "leave --train out"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_options_that_do_not_fit(
    source: Path, tmp_path: Path, capsys: Any, options: list[str], told: str
) -> None:
    command = ["export", source, "--format", "optimum", "-o", tmp_path / "out", "--recipe", "none"]
    status, _, err = call(capsys, *command, *options)
    assert status == 1 and told in err
    assert not list(tmp_path.iterdir())


def test_files_that_lie_there_stay(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    status, _, err = call(capsys, "export", source, "--format", "optimum", "-o", tmp_path)
    assert status == 1 and "files already" in err
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_state_space_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    out = tmp_path / "out"
    command = ["export", tmp_path / "mamba", "--format", "optimum", "-o", out]
    status, _, err = call(capsys, *command)
    assert status == 1 and "keeps a state" in err and "--format onnx" in err
    assert not out.exists()


def test_a_file_without_a_config_is_refused(tmp_path: Path, capsys: Any) -> None:
    program = torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "m.pt2")
    command = ["export", tmp_path / "m.pt2", "--format", "optimum", "-o", tmp_path / "out"]
    status, _, err = call(capsys, *command)
    assert status == 1 and "no Hugging Face config" in err
