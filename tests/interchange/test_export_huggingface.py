"""Folders written from optimized models: what is in them, who reads them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from checkpoints import IDS, error, gptq_folder, linears, llama, logits
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import graphopt
from graphopt.cli import main
from graphopt.errors import ExportError, GraphoptError
from graphopt.interchange.declared import declared
from graphopt.interchange.recover import Product
from graphopt.interchange.written import written
from graphopt.kernels.quantized import Scheme, quantize
from graphopt.loading import load_model
from graphopt.passes import QuantizeMatmul
from graphopt.presets import resolve
from graphopt.rewrite import arguments

CALL = {"input_ids": IDS, "use_cache": False}
W4 = {"bits": 4, "group_size": 32, "activations": None}


def compiled(model: Any, *before: Any, call: Any = CALL, **options: Any) -> Any:
    passes = [*before, QuantizeMatmul(**options)]
    return graphopt.compile(model, example_kwargs=call, passes=passes, measure=False)


def held(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config["quantization_config"]


CASES = [
    ("compressed-tensors", {}, "int-quantized"),
    ("compressed-tensors", W4, "pack-quantized"),
    ("compressed-tensors", {"dtype": "fp8"}, "float-quantized"),
    ("gptq", W4, "gptq"),
    ("gptq", {"bits": 8, "activations": None}, "gptq"),
]


@pytest.mark.parametrize(("form", "options", "kind"), CASES)
def test_a_quantized_model_goes_out_and_comes_back(
    form: str, options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = llama()
    fast = compiled(model, **options)
    result = graphopt.export_huggingface(fast, tmp_path / "out", model, format=form)
    assert result.layers == 14 and result.error is not None and result.error < 2e-3
    tensors, config = held(tmp_path / "out")
    assert config["quant_method"] == form
    assert kind in (config.get("format"), config.get("checkpoint_format"))
    assert "lm_head.weight" in tensors and "model.norm.weight" in tensors
    loaded: Any = load_model(tmp_path / "out").module
    assert loaded.lm_head.weight.dtype == torch.float32
    assert error(logits(loaded), logits(fast)) < 2e-3
    for name in linears(model):
        found, wanted = loaded.get_submodule(name).weight, f"{name}.weight_codes"
        assert torch.equal(
            found.codes.view(torch.uint8), fast.program.state[wanted].view(torch.uint8)
        )


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_merged_and_folded_weights_are_taken_apart(form: str, tmp_path: Path) -> None:
    """Preset exact: q, k, v merged, gate and up merged, norms folded into them."""
    model = llama()
    fast = compiled(model, *resolve("exact"), **W4)
    rules = {applied.rule for applied in fast.report.applied}
    assert {"MergeSiblings", "QuantizeLinear"} <= rules
    folded = "model.layers.0.input_layernorm.weight" not in fast.program.state
    result = graphopt.export_huggingface(fast, tmp_path / "out", model, format=form)
    assert result.layers == 14 and result.error is not None and result.error < 1e-3
    tensors, _ = held(tmp_path / "out")
    neutral = torch.ones(64)
    assert folded == torch.equal(tensors["model.layers.0.input_layernorm.weight"], neutral)
    assert folded  # the preset folds them


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_norms_that_were_changed_go_out_too(form: str, tmp_path: Path) -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    texts = [{**CALL, "input_ids": IDS.flip(0)}, CALL]
    step = QuantizeMatmul(method="rtn+norms", **{**W4, "bits": 8})
    fast = graphopt.compile(
        model, example_kwargs=CALL, calibration=texts, passes=["Canonicalize", step], measure=False
    )
    changed = [n for n in fast.program.state if "norm" in n and "folded" in n]
    assert changed, fast.report.missed
    result = graphopt.export_huggingface(fast, tmp_path / "out", model, format=form)
    assert result.error is not None and result.error < 1e-3
    tensors, _ = held(tmp_path / "out")
    name = changed[0].removesuffix("_folded")
    assert torch.equal(tensors[name], fast.program.state[changed[0]])
    assert not torch.equal(tensors[name], model.state_dict()[name])


def test_an_encoder_with_layer_norms(tmp_path: Path) -> None:
    """Scales and shifts of layer norms are folded into weights and biases, streams centred."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    fast = compiled(model, *resolve("exact"), call=call)
    result = graphopt.export_huggingface(fast, tmp_path / "out", model)
    assert result.layers >= 12 and result.error is not None and result.error < 0.02


def test_a_quantized_head_and_a_config_without_a_dtype(tmp_path: Path) -> None:
    model = llama()
    model.config.dtype = None
    graphopt.export_huggingface(compiled(model, head=True, **W4), tmp_path / "a", model)
    again: Any = load_model(tmp_path / "a").module
    assert type(again.lm_head) is type(again.model.layers[0].mlp.up_proj)
    _, config = held(tmp_path / "a")
    assert config["ignore"] == [] and config["config_groups"]["group_0"]["targets"] == ["Linear"]
    facts = json.loads((tmp_path / "a" / "config.json").read_text())
    assert facts["dtype"] == "float32"  # else readers take that of the scales


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_mixed_schemes_are_read_as_they_were_written(form: str) -> None:
    model = llama()
    layers = linears(model)
    schemes = [Scheme(8) if "q_proj" in n else Scheme(4, group_size=32) for n in layers]
    products = {
        name: Product(quantize(layer.weight.detach(), scheme), "none", None)
        for (name, layer), scheme in zip(layers.items(), schemes, strict=True)
    }
    del products["model.layers.0.mlp.up_proj"]
    said = declared(written(products, model, form).config, "config.json")
    for name in [*layers, "lm_head"]:
        layout: Any = said.layout(name)
        if name not in products:
            assert layout is None
        else:
            scheme = products[name].weight.scheme
            assert (layout.bits, layout.group_size) == (scheme.bits, scheme.group_size)


def test_conv1d_of_gpt2_is_written_as_gptq_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    fast = compiled(model, "Canonicalize", **W4)
    with pytest.raises(ExportError, match="Conv1D") as caught:
        graphopt.export_huggingface(fast, tmp_path / "out", model)
    assert caught.value.fix == "write it as gptq"
    result = graphopt.export_huggingface(fast, tmp_path / "out", model, format="gptq")
    assert result.layers == 4
    assert error(logits(load_model(tmp_path / "out").module), logits(fast)) < 1e-3


def test_a_folder_with_an_order_of_inputs_goes_through(tmp_path: Path) -> None:
    gptq_folder(tmp_path / "in", order=True)
    model: Any = load_model(tmp_path / "in").module
    fast = graphopt.compile(model, example_kwargs=CALL, passes="none", measure=False)
    with pytest.raises(ExportError, match=r"integers|order of inputs"):
        graphopt.export_huggingface(fast, tmp_path / "out", model)
    graphopt.export_huggingface(fast, tmp_path / "out", model, format="gptq")
    before, _ = held(tmp_path / "in")
    after, config = held(tmp_path / "out")
    assert config["desc_act"] and before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


REFUSED = [
    ("gptq", {}, "weights alone", "write it as compressed-tensors"),
    ("compressed-tensors", {**W4, "dtype": "nf4"}, "no nf4", "QuantizeMatmul with dtype int"),
    ("compressed-tensors", {**W4, "symmetric": False}, "zero points", "symmetric=True"),
]


@pytest.mark.parametrize(("form", "options", "what", "fix"), REFUSED)
def test_schemes_that_a_format_cannot_hold(
    form: str, options: dict[str, Any], what: str, fix: str, tmp_path: Path
) -> None:
    model = llama()
    with pytest.raises(ExportError, match=what) as caught:
        graphopt.export_huggingface(compiled(model, **options), tmp_path / "o", model, format=form)
    assert fix in str(caught.value.fix)
    assert not list(tmp_path.iterdir())


def test_what_is_no_quantized_model_is_refused(tmp_path: Path) -> None:
    model = llama()
    fast = graphopt.compile(model, example_kwargs=CALL, passes="none", measure=False)
    with pytest.raises(ExportError, match=r"no linear layer of .* is quantized"):
        graphopt.export_huggingface(fast, tmp_path / "out", model)
    with pytest.raises(ExportError, match="unknown format 'awq'"):
        graphopt.export_huggingface(fast, tmp_path / "out", model, format="awq")
    with pytest.raises(GraphoptError, match="cannot export a LlamaForCausalLM"):
        graphopt.export_huggingface(model, tmp_path / "out", model)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="has no Hugging Face folder"):
        graphopt.export_huggingface(fast, tmp_path / "out", nn.Linear(2, 2))


def test_a_folder_that_computes_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.emit import checkpoint

    right = checkpoint.written

    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        name = "model.layers.0.mlp.up_proj.weight_scale"
        made.tensors[name] = 2 * made.tensors[name]
        return made

    model = llama()
    fast = compiled(model, **W4)
    monkeypatch.setattr(checkpoint, "written", wrong)
    with pytest.raises(ExportError, match="does not compute what the module does"):
        graphopt.export_huggingface(fast, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    graphopt.export_huggingface(compiled(model, **W4), tmp_path / "out", model)
    tensors, _ = held(tmp_path / "out")
    assert "lm_head.weight" not in tensors
    again: Any = load_model(tmp_path / "out").module
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    spec = "input_ids:int64[2,seq=7]"
    steps = ["--pass", "QuantizeMatmul:bits=4,group_size=32,activations=null"]
    call = ["export", str(tmp_path / "m"), "--inputs", spec, *steps, "--no-measure"]
    main([*call, "--format", "gptq", "-o", str(tmp_path / "q")])
    assert "14 quantized layers" in capsys.readouterr().out
    assert (tmp_path / "q" / "tokenizer_config.json").exists()
    with pytest.raises(SystemExit):
        main([*call, "--format", "gptq", "-o", str(tmp_path / "q")])
    assert "there are files already" in capsys.readouterr().err
    main(["optimize", str(tmp_path / "q"), "--inputs", spec, "-o", str(tmp_path / "q.pt2")])
    report = graphopt.load(tmp_path / "q.pt2").report
    assert any("14 quantized layers read as they are stored" in note for note in report.notes)


@pytest.mark.parametrize("options", [W4, {"bits": 3, "activations": None}, {"dtype": "fp8"}])
def test_transformers_with_the_library_computes_the_same(
    options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = llama()
    fast = compiled(model, **options)
    graphopt.export_huggingface(fast, tmp_path / "out", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert error(logits(theirs), logits(fast)) < 2e-6


def test_static_activations_go_out_and_come_back(tmp_path: Path) -> None:
    model = llama()
    fast = graphopt.compile(
        model,
        example_kwargs=CALL,
        calibration=[CALL],
        passes=[QuantizeMatmul(activations="static")],
        measure=False,
    )
    graphopt.export_huggingface(fast, tmp_path / "out", model)
    tensors, facts = held(tmp_path / "out")
    group = facts["config_groups"]["group_0"]
    kind = group["input_activations"]
    assert (kind["dynamic"], kind["strategy"], kind["symmetric"]) == (False, "tensor", False)
    calls = [n for n in fast.program.graph.nodes if "quantized_linear" in str(n.target)]
    scales = {float(t) for name, t in tensors.items() if name.endswith("input_scale")}
    assert scales == {arguments(n)["input_scale"] for n in calls}
    again = load_model(tmp_path / "out").module
    assert error(logits(again), fast(**CALL)[0]) < 2e-3
