"""Small real models and their exported graphs, shared by the tests of the analyses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

VOCABULARY, WIDTH, HEADS = 61, 32, 4
TEXT = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": HEADS}


def capture(model: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> ExportedProgram:
    """The model as a functional program with composites kept and parameters lifted."""
    model.eval()
    exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    return exported.run_decompositions({})


def inputs_of(exported: ExportedProgram, *user: Tensor) -> list[Tensor]:
    """Values for the placeholders of the program, ``user`` for those of the user's inputs."""
    held = {**exported.state_dict, **exported.constants}
    given = iter(user)
    spec = exported.graph_signature.input_specs
    return [held[s.target] if s.target in held else next(given) for s in spec]


def graph_of(exported: ExportedProgram) -> GraphModule:
    """A module of its own around a copy of the program's graph."""
    source = exported.graph_module
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(source.graph, {}))
    return GraphModule(source, copy)


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % VOCABULARY


def bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **TEXT)
    return transformers.BertModel(config)


def gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_head=HEADS, n_layer=layers, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama(layers: int, **changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        use_cache=False,
        **{**TEXT, **changes},
    )
    return transformers.LlamaForCausalLM(config)


def vit(layers: int) -> nn.Module:
    config = transformers.ViTConfig(num_hidden_layers=layers, image_size=16, patch_size=8, **TEXT)
    return transformers.ViTModel(config)


def t5(layers: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=layers,
        num_heads=HEADS,
        use_cache=False,
    )
    return transformers.T5Model(config)


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is strided where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == width_in else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        same = width == width_in
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of residual blocks, ``depth`` in each, the width doubled from stage to stage."""

    def __init__(self, depth: int, widths: tuple[int, ...] = (4, 8, 16)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        blocks = [Residual(b if i else a, b) for a, b in pairs for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet(depth: int) -> nn.Module:
    model = ResNet(depth)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@cache
def exported(build: Callable[..., nn.Module], layers: int = 2, *, dynamic: bool = False) -> Any:
    """The program of one of the models above on its standard input, and that input.

    Shared between tests: change only what ``graph_of`` makes of it.
    """
    torch.manual_seed(0)
    model = build(layers)
    if build in (vit, resnet):
        image = torch.rand(2, 3, 16, 16)
        return capture(model, image), (image,)
    given = {"input_ids": ids()}
    if build is t5:
        given["decoder_input_ids"] = ids(2, 5)
    free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in given} if dynamic else None
    return capture(model, dynamic=free, **given), tuple(given.values())
