"""Small models and quantized folders, their bits laid out by loops as the formats describe them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, GROUP = 64, 96, 32
IDS = torch.arange(14).reshape(2, 7)


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Two layers with norms that are not neutral."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, "dtype": "float32", **options},
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes as one number, lowest bits first, cut into signed words of 32 bits."""
    whole = 0
    for place, code in enumerate(codes):
        whole |= code << (bits * place)
    words = -(-len(codes) * bits // 32)
    cut = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(words)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in cut]


def packed(rows: Tensor, bits: int) -> Tensor:
    """Rows of codes from 0 as int32 words."""
    return torch.tensor([stream(row, bits) for row in rows.tolist()], dtype=torch.int32)


def random_layer(shape: tuple[int, int], bits: int, group: int, seed: int) -> tuple[Tensor, ...]:
    """Codes from 0 ``(N, K)``, float16 scales ``(N, G)``, zeros from 1 ``(N, G)``."""
    draw = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    codes = torch.randint(0, 1 << bits, shape, generator=draw)
    groups = (outputs, inputs // group)
    scales = (torch.rand(groups, generator=draw) * 0.02 + 0.01).half()
    return codes, scales, torch.randint(1, 1 << bits, groups, generator=draw)


def numbers(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """What a layer stands for, in float32; ``groups`` says which one each input is in."""
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers but the head."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def gptq_layer(
    shape: tuple[int, int], bits: int, group: int, seed: int, less_one: bool, order: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer in the GPTQ layout, and the numbers that it stands for."""
    codes, scales, zeros = random_layer(shape, bits, group, seed)
    index = torch.arange(shape[1]) // group
    if order:
        index = index[torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))]
    stored = {
        "qweight": packed(codes, bits).t().contiguous(),
        "qzeros": packed((zeros - int(less_one)).t(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": index.to(torch.int32),
    }
    return stored, numbers(codes, scales, zeros, index)


def gptq_folder(
    folder: Path, code_bits: int = 4, form: str = "gptq", order: bool = False, **changes: Any
) -> LlamaForCausalLM:
    """Write a GPTQ folder; returns the float model of the same numbers."""
    model = llama()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for seed, (name, layer) in enumerate(linears(model).items()):
        shape = (layer.out_features, layer.in_features)
        stored, wanted = gptq_layer(shape, code_bits, GROUP, seed, form == "gptq", order)
        layer.weight.data = wanted
        del state[f"{name}.weight"]
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
    config = {"quant_method": "gptq", "bits": code_bits, "group_size": GROUP, "desc_act": order}
    write(folder, model, state, config | {"checkpoint_format": form, **changes})
    return model


def write(folder: Path, model: Any, state: dict[str, Tensor], config: Any) -> None:
    """A Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    facts = model.config.to_dict() | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(facts))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
