"""Folders of an encoder and a decoder: their names, what holds them, and the text they make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import huggingface
from torch import Tensor

from graphopt.emit import onnx_folder
from graphopt.emit.onnx_folder import export_onnx_folder, plan_folder
from graphopt.emit.onnx_seq2seq import hold_seq2seq
from graphopt.errors import CaptureError, ExportError, GraphoptError, LoadError, VerificationError
from graphopt.huggingface_seq2seq import DECODER, ENCODER, WITH_PAST

onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from graphopt.generation import (  # noqa: E402
    OnnxCausalLM,
    OnnxSeq2SeqLM,
    OnnxSpeechSeq2Seq,
    load_onnx,
)

FILES = [ENCODER, DECODER, WITH_PAST]
FAMILIES = ("t5", "bart", "marian", "whisper", "mt5", "mbart", "pegasus", "blenderbot", "plbart")
OPTIONS = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}


def bart() -> Any:
    """Weights so large that texts do not repeat themselves."""
    torch.manual_seed(0)
    sides = ("encoder", "decoder")
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        **{f"{side}_layers": 1 for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
        **{f"{side}_ffn_dim": 32 for side in sides},
        max_position_embeddings=64,
        init_std=0.3,
        forced_eos_token_id=None,
        decoder_start_token_id=1,
    )
    return transformers.BartForConditionalGeneration(config).eval()


def batch(rows: int = 3) -> dict[str, Tensor]:
    """Sources of seven tokens, the last of them padded."""
    ids = torch.randint(4, 64, (rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any, list[Any]]]:
    """A folder, its model, what the export told, and what it held the files to."""
    folder, model, held = tmp_path_factory.mktemp("made") / "bart", bart(), []

    def hold(*args: Any) -> float:
        held.extend(args[1:4])
        return hold_seq2seq(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_folder, "hold_seq2seq", hold)
        result = export_onnx_folder(model, folder, passes=[], measure=False)
    yield folder, model, result, held


def shapes(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    session = onnxruntime.InferenceSession(str(path))
    return (
        {entry.name: entry.shape for entry in session.get_inputs()},
        {entry.name: entry.shape for entry in session.get_outputs()},
    )


def test_files_and_tensors_have_the_names_that_others_read(made: Any) -> None:
    folder, _, result, _ = made
    own, other = ["decoder.key", "decoder.value"], ["encoder.key", "encoder.value"]
    taken, given = shapes(folder / ENCODER)
    assert list(taken) == ["input_ids", "attention_mask"]
    assert given == {"last_hidden_state": ["batch", "source", 32]}
    taken, given = shapes(folder / DECODER)
    assert list(taken) == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    assert list(given) == ["logits", *(f"present.0.{kind}" for kind in own + other)]
    assert given["logits"] == ["batch", "tokens", 64]
    taken, given = shapes(folder / WITH_PAST)
    cache = [f"past_key_values.0.{kind}" for kind in own + other]
    assert list(taken) == ["input_ids", "encoder_attention_mask", *cache]
    assert taken[cache[0]] == ["batch", 4, "past", 8]
    assert taken[cache[2]] == ["batch", 4, "source", 8]
    assert list(given) == ["logits", *(f"present.0.{kind}" for kind in own)]
    assert result.task == "text2text-generation" and result.walked < 1e-5
    assert set(result.files) == {*FILES, "config.json", "generation_config.json"}
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_lines_say_which_file_they_are_of(made: Any) -> None:
    told = made[2].lines()
    assert told[1].startswith(f"{ENCODER}: inputs: input_ids, attention_mask; outputs: last_hidden")
    assert any(line.startswith(f"{WITH_PAST}: largest relative error") for line in told)
    assert [Path(model["path"]).name for model in made[2].to_dict()["models"]] == FILES


def test_files_are_held_to_their_programs_and_programs_to_the_model(made: Any) -> None:
    folder, model, _, (parts, right, captured) = made
    assert hold_seq2seq(folder, parts, right, captured, model) < 1e-5
    for index in range(len(parts)):
        wrong = right[index].copy()
        wrong.state = {name: 1.1 * tensor for name, tensor in wrong.state.items()}
        mixed = [*right[:index], wrong, *right[index + 1 :]]
        with pytest.raises(VerificationError, match="the file gives other logits"):
            hold_seq2seq(folder, parts, mixed, captured, model)
        with pytest.raises(VerificationError, match="captured program gives other logits"):
            hold_seq2seq(folder, parts, right, mixed, model)


def same(model: Any, file: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    """What both generate, which must be one text."""
    found = []
    for able in (model, file):
        torch.manual_seed(1)
        found.append(able.generate(**given, **{**OPTIONS, **options}))
    assert torch.equal(*found)
    return found[0]


def test_text_is_that_of_the_model(made: Any) -> None:
    file = load_onnx(made[0])
    assert type(file) is OnnxSeq2SeqLM
    text = same(made[1], file, batch(), do_sample=False)
    assert text.shape == (3, 13) and len(text.unique()) > 5
    sampled = same(made[1], file, batch(), do_sample=True, temperature=0.9, top_k=20)
    assert not torch.equal(text, sampled)
    same(made[1], file, batch(), num_beams=3)
    same(made[1], file, batch(), do_sample=False, use_cache=False, max_new_tokens=4)
    first = torch.tensor([[1, 7, 9]]).repeat(3, 1)
    text = same(made[1], file, batch(), do_sample=False, decoder_input_ids=first)
    assert torch.equal(text[:, :3], first)


def test_the_cache_goes_on(made: Any) -> None:
    """Behind the first tokens the encoder's states are not read again."""
    file, given = OnnxSeq2SeqLM(made[0], threads=1), batch()
    states = file.encoder(**given)
    ids = torch.tensor([[1, 7, 9, 11]]).repeat(3, 1)
    rest = {"encoder_outputs": states, "attention_mask": given["attention_mask"]}
    first = file(decoder_input_ids=ids[:, :2], **rest)
    cache = first.to_tuple()[1]
    held = cache.cross_attention_cache.layers[0].keys
    states.last_hidden_state.zero_()
    second = file(decoder_input_ids=ids[:, 2:], past_key_values=cache, **rest)
    assert cache.get_seq_length() == 4
    assert cache.cross_attention_cache.layers[0].keys.data_ptr() == held.data_ptr()
    with torch.no_grad():
        wanted = made[1](**given, decoder_input_ids=ids).logits
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    plain = file(**given, decoder_input_ids=ids, return_dict=False, use_cache=False)
    assert isinstance(plain, tuple) and len(plain) == 2


def test_what_files_cannot_do_is_refused(made: Any) -> None:
    file, given = OnnxSeq2SeqLM(made[0]), batch()
    ids = torch.tensor([[1, 7]]).repeat(3, 1)
    with pytest.raises(GraphoptError, match="no tokens were given to decode"):
        file(**given)
    with pytest.raises(GraphoptError, match="reads input_ids, and none was given"):
        file(decoder_input_ids=ids)
    with pytest.raises(GraphoptError, match="nothing for output_attentions"):
        file.generate(**given, output_attentions=True, return_dict_in_generate=True)
    hidden = torch.tensor([[0, 1]]).repeat(3, 1)
    with pytest.raises(GraphoptError, match="decoder_attention_mask hides some"):
        file(**given, decoder_input_ids=ids, decoder_attention_mask=hidden)
    with pytest.raises(GraphoptError, match="cannot be the cache of an encoder and a decoder"):
        file(**given, decoder_input_ids=ids, cache=transformers.DynamicCache())
    cache = file(**given, decoder_input_ids=ids).to_tuple()[1]
    one = {k: v[:1] for k, v in given.items()}
    with pytest.raises(GraphoptError, match=r"of 3 rows.*input 1 rows"):
        file(**one, decoder_input_ids=ids[:1], cache=cache)
    with pytest.raises(GraphoptError, match="cannot be the cache of an ONNX file"):
        file.generate(**given, max_new_tokens=3, cache_implementation="static", eos_token_id=None)


def test_folders_that_do_not_decode_are_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no encoder_model\.onnx"):
        OnnxSeq2SeqLM(tmp_path)
    with pytest.raises(LoadError, match=r"no model\.onnx"):
        OnnxCausalLM(made[0])
    with pytest.raises(LoadError, match="reads input_ids, not input_features"):
        OnnxSpeechSeq2Seq(made[0])
    shutil.copytree(made[0], tmp_path / "other")
    shutil.copy(made[0] / ENCODER, tmp_path / "other" / WITH_PAST)
    with pytest.raises(LoadError, match="is none for tokens behind a cache"):
        load_onnx(tmp_path / "other")


def headless() -> Any:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return transformers.T5Model(transformers.T5Config(**sizes, num_heads=4))


def speech() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.Speech2TextConfig(**sizes, **heads, input_feat_per_channel=8)
    return transformers.Speech2TextForConditionalGeneration(config)


def images() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    decoder = transformers.BertConfig(**sizes, vocab_size=64)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(both)


@pytest.mark.parametrize(
    ("build", "kind", "told"),
    [
        (headless, ExportError, "generates no text"),
        (speech, CaptureError, "reads sounds with a mask"),
        (images, CaptureError, "reads pixel_values"),
    ],
)
def test_what_has_no_such_files_is_refused(build: Any, kind: type[Any], told: str) -> None:
    with pytest.raises(kind, match=told) as error:
        plan_folder(build().eval())
    assert error.value.fix


def test_calibration_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="inputs of their own"):
        export_onnx_folder(bart(), tmp_path / "out", calibration=[batch()])
    assert not list(tmp_path.iterdir())


def source(name: str) -> dict[str, Tensor]:
    given = huggingface.ENTRIES[name].inputs(batch=3)
    return {k: v for k, v in given.items() if not k.startswith("decoder") and k != "use_cache"}


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_every_family(name: str, tmp_path: Path) -> None:
    model = huggingface.ENTRIES[name].build()
    export_onnx_folder(model, tmp_path / "out", measure=False)
    file = load_onnx(tmp_path / "out")
    assert isinstance(file, OnnxSpeechSeq2Seq) == (name == "whisper")
    same(model, file, source(name), do_sample=False)
    same(model, file, source(name), num_beams=3)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_halves_are_in_the_cache_too(name: str, tmp_path: Path) -> None:
    model = huggingface.ENTRIES[name].build()
    export_onnx_folder(model, tmp_path / "out", measure=False, dtype="float16", passes=[])
    file: Any = load_onnx(tmp_path / "out")
    given, ids = source(name), torch.tensor([[1, 7, 9]]).repeat(3, 1)
    assert file.dtype is torch.float16 and file.encoder(**given)[0].dtype is torch.float16
    assert file.config.dtype is torch.float16
    first = file(**given, decoder_input_ids=ids[:, :2])
    cache = first.to_tuple()[1]
    assert cache.self_attention_cache.layers[0].keys.dtype is torch.float16
    rest = file(**given, decoder_input_ids=ids[:, 2:], cache=cache)
    with torch.no_grad():
        wanted = model(**given, decoder_input_ids=ids).logits
    found = torch.cat([first.logits, rest.logits], 1)
    error = (found.float() - wanted).norm() / wanted.norm()
    assert 1e-5 < float(error) < 1e-2
