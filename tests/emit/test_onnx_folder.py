"""Folders around an ONNX file: a language model with its cache, encoders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.emit import onnx_folder
from graphopt.emit.onnx_decoding import hold_decoder
from graphopt.emit.onnx_folder import export_onnx_folder, plan_folder
from graphopt.errors import CaptureError, ExportError, VerificationError
from graphopt.huggingface_decoding import decoding, refuse_other_caches
from graphopt.optimize import capture_model

onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def llama(seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    given = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.2, **sizes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given)).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder, model = tmp_path_factory.mktemp("made") / "llama", llama()
    model.generation_config.use_cache = False  # as in training
    return folder, model, export_onnx_folder(model, folder, measure=False)


def test_a_language_model_has_the_names_that_others_read(made: tuple[Path, Any, Any]) -> None:
    folder, _, result = made
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    cache = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    assert list(shapes) == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert [e.name for e in session.get_outputs()] == ["logits", *(f"present.{n}" for n in cache)]
    assert shapes["input_ids"] == ["batch", "tokens"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert result.task == "text-generation" and result.walked < 1e-5
    assert "none is in the folder" in "\n".join(result.lines())
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert result.to_dict()["models"][0]["path"].endswith("model.onnx")
    assert json.loads((folder / "generation_config.json").read_text())["use_cache"] is True


def test_onnxruntime_genai_is_told_the_same(made: tuple[Path, Any, Any]) -> None:
    told = json.loads((made[0] / "genai_config.json").read_text())
    decoder = told["model"]["decoder"]
    assert told["model"]["type"] == "llama" and told["model"]["vocab_size"] == 192
    assert told["model"]["context_length"] == told["search"]["max_length"] == 128
    assert told["model"]["eos_token_id"] == told["model"]["pad_token_id"] == 2
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
    assert [decoder[size] for size in sizes] == [2, 4, 2, 16]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert told["search"]["past_present_share_buffer"] is False


def test_a_file_is_held_to_its_program_and_the_program_to_the_model(
    made: tuple[Path, Any, Any],
) -> None:
    folder, model, _ = made
    decoder, other = decoding(model), llama(1)
    program, _ = capture_model(model, (), decoder.inputs.kwargs, decoder.inputs.dynamic)
    wrong, _ = capture_model(other, (), decoder.inputs.kwargs, decoder.inputs.dynamic)
    file = folder / "model.onnx"
    assert hold_decoder(file, decoder, program, program, model) < 1e-5
    with pytest.raises(VerificationError, match="the file gives other logits"):
        hold_decoder(file, decoder, wrong, program, model)
    with pytest.raises(VerificationError, match="captured program gives other logits"):
        hold_decoder(file, decoder, program, wrong, model)


def test_nothing_is_left_where_the_file_is_wrong(tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(*_args: Any) -> float:
        raise VerificationError("the file gives other logits")

    monkeypatch.setattr(onnx_folder, "hold_decoder", wrong)
    with pytest.raises(VerificationError):
        export_onnx_folder(llama(num_hidden_layers=1), tmp_path / "out", passes=[], measure=False)
    assert not list(tmp_path.iterdir())


def test_files_that_lie_there_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="files already") as error:
        export_onnx_folder(llama(), tmp_path)
    assert error.value.where == str(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_an_encoder_keeps_the_names_of_transformers(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    result = export_onnx_folder(model, tmp_path / "out", measure=False)
    assert result.task == "text-classification" and result.walked is None
    assert result.file.outputs == ("logits",)
    assert set(result.file.inputs) >= {"input_ids", "attention_mask"}
    assert result.files == ("config.json", "model.onnx")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert read.architectures == ["BertForSequenceClassification"] and len(read.id2label) == 3


def test_sentence_transformers_finds_its_modules(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(source)
    for folder in (source / "1_Pooling", secret):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (source / "1_Pooling" / "code.py").write_text("")
    paths = ["", "1_Pooling", "../secret", str(secret)]
    (source / "modules.json").write_text(json.dumps([{"path": p} for p in paths]))
    result = export_onnx_folder(source, tmp_path / "out", passes=[], measure=False)
    assert result.task == "feature-extraction"
    assert result.file.outputs[0] == "last_hidden_state"
    assert set(result.files) == {
        *("1_Pooling/config.json", "config.json", "modules.json", "onnx/model.onnx")
    }


def test_images_need_no_tokenizer() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    plan = plan_folder(transformers.ViTForImageClassification(config).eval())
    assert plan.task == "image-classification" and not plan.notes
    assert list(plan.inputs.kwargs) == ["pixel_values"]


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def bidirectional() -> Any:
    return transformers.BertLMHeadModel(transformers.BertConfig(**SIZES))


def hybrid() -> Any:
    kinds = ["linear_attention", "full_attention"]
    given = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "layer_types": kinds}
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**given, num_experts=2))


@pytest.mark.parametrize(
    ("build", "kind", "told"),
    [
        (mamba, CaptureError, "keeps a state"),
        (hybrid, CaptureError, "keeps a state"),
        (bidirectional, CaptureError, "gives no keys and values"),
        (lambda: nn.Linear(2, 2), ExportError, "no Hugging Face config"),
    ],
)
def test_what_has_no_such_folder_is_refused(build: Any, kind: Any, told: str) -> None:
    with pytest.raises(kind, match=told) as error:
        plan_folder(build().eval())
    assert error.value.fix


def test_a_layer_of_another_kind_is_named() -> None:
    with pytest.raises(CaptureError, match=r"keeps a LinearAttention.*keys and values of every"):
        refuse_other_caches(hybrid())


def test_bfloat16_is_held_in_float32(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1).bfloat16()
    result = export_onnx_folder(model, tmp_path / "out", passes=[], measure=False)
    assert any("weights were bfloat16" in line for line in result.lines())
    assert model.dtype == torch.bfloat16 and result.walked is not None and result.walked < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_halves_are_in_the_cache_too(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    result = export_onnx_folder(model, tmp_path / "out", passes=[], measure=False, dtype="float16")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    kinds = {entry.type for entry in (*session.get_inputs(), *session.get_outputs())}
    assert kinds == {"tensor(int64)", "tensor(float16)"}
    assert result.walked is not None and 1e-5 < result.walked < 1e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_dtype_that_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="bfloat16"):
        export_onnx_folder(llama(), tmp_path / "out", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_names_fit_the_file(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).eval()
    module = graphopt.compile(model, example_inputs=(torch.ones(1, 2),), passes=[])
    with pytest.raises(ExportError, match="2 names for 1 inputs"):
        graphopt.export_onnx(module, tmp_path / "a.onnx", names=(("a", "b"), ("c",)))
    result = graphopt.export_onnx(module, tmp_path / "a.onnx", names=(("a.0",), ("b.0",)))
    session = onnxruntime.InferenceSession(str(result.path))
    assert [e.name for e in (*session.get_inputs(), *session.get_outputs())] == ["a.0", "b.0"]


def test_a_tokenizer_is_written_where_the_model_has_no_folder(tmp_path: Path) -> None:
    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    model = llama(num_hidden_layers=1)
    tokenizer = Tokenizer()
    result = export_onnx_folder(
        model, tmp_path / "out", passes=[], tokenizer=tokenizer, measure=False
    )
    assert "tokenizer.json" in result.files and not result.notes
