"""Small transformers whose residual stream can be centred, and some whose cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.rewrite import Example

WIDTH = 8


def _norm(bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


class Block(nn.Module):
    """``x + W2 gelu(W1 LN(x))``, with a scale per feature where asked for."""

    def __init__(self, layer_scale: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.enter = _norm(bias), nn.Linear(WIDTH, 16)
        self.leave = nn.Linear(16, WIDTH, bias=bias)
        self.scale = nn.Parameter(torch.randn(WIDTH)) if layer_scale else None

    def branch(self, x: Tensor) -> Tensor:
        written = self.leave(nn.functional.gelu(self.enter(x)))
        return written if self.scale is None else written * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class PostBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x))


class Text(nn.Module):
    """Token and position embeddings, blocks, a last norm and a head; variants by keyword."""

    def __init__(self, block: Callable[[], nn.Module] = Block, **variant: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(29, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = _norm(), nn.Linear(WIDTH, 29, bias=False)
        self.variant = variant
        if variant.get("tied"):
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
            if self.variant.get("activated"):
                x = torch.relu(x)
        if self.variant.get("shifted"):
            x = x + 0.5
        if self.variant.get("dropped"):
            x = nn.functional.dropout(x, 0.5, True)
        out = self.head(self.norm(x))
        if self.variant.get("returned"):
            return out, x
        return out + x.mean() if self.variant.get("read") else out


class Image(nn.Module):
    """Patches by convolution, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList((Block(), Block(layer_scale=True)))
        self.norm = _norm()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat((token, patches), 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0].sin()


def _ids() -> tuple[Tensor, ...]:
    return (torch.randint(29, (2, 6)),)


def _images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 8, 8),)


def examples() -> Iterator[Example]:
    yield Example("text", Text, _ids)
    yield Example("without biases", lambda: Text(lambda: Block(bias=False)), _ids)
    shapes = ({0: Dim("batch"), 1: Dim("seq", max=15)},)
    yield Example("dynamic", Text, _ids, dynamic_shapes=shapes)
    yield Example("tied embedding", lambda: Text(tied=True), _ids)
    yield Example("image", Image, _images)
    yield Example("layer scale", lambda: Text(lambda: Block(layer_scale=True)), _ids)
    yield Example("bfloat16", lambda: Image().bfloat16(), lambda: (_images()[0].bfloat16(),))


def near_misses() -> Iterator[Example]:
    yield Example("post-LN", lambda: Text(PostBlock), _ids, reason="post-LN")
    yield Example("trains", Text, _ids, training=True, reason="trains")
    yield Example("stream returned", lambda: Text(returned=True), _ids, reason="also an output")
    yield Example("stream read", lambda: Text(read=True), _ids, reason="also read by")
    yield Example("shifted", lambda: Text(shifted=True), _ids, reason="also read by")
    yield Example("activated", lambda: Text(activated=True), _ids)
    yield Example("dropped", lambda: Text(dropped=True), _ids, reason="also read by")
