"""Streams and heads that can be rotated, and look-alikes that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.rewrite import Example

WIDTH, HEADS, WORDS = 12, 2, 29


class Norm(nn.Module):
    """An RMS norm as it is written in many models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(WIDTH)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


class Block(nn.Module):
    """Attention with grouped heads, and a gated MLP."""

    def __init__(self, norm: Callable[[], nn.Module] = Norm, merged: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(2))
        size = WIDTH // HEADS
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, size)
        self.v, self.o = nn.Linear(WIDTH, size), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * size) if merged else None
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, False)

    def attend(self, x: Tensor) -> Tensor:
        size = WIDTH // HEADS
        if self.qkv is not None:
            q, k, v = self.qkv(x).split((WIDTH, size, size), -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.expand(-1, HEADS, -1, -1) for t in (k, v))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(made.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Text(nn.Module):
    """Embeddings, blocks, a last norm and a head; ``change`` sees each block's output."""

    def __init__(
        self,
        block: Callable[[], nn.Module] = Block,
        norm: Callable[[], nn.Module] = Norm,
        change: Callable[[Tensor], Tensor] | None = None,
        blocks: int = 2,
        **variant: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.norm, self.head = norm(), nn.Linear(WIDTH, WORDS, bias=False)
        self.change, self.variant = change, variant
        if variant.get("tied"):
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids)
        if self.variant.get("scaled"):
            x = x * WIDTH**0.5
        for block in self.blocks:
            x = block(x) if self.change is None else self.change(block(x))
        out = self.head(self.norm(x)[:, -2:])
        if self.variant.get("aside"):
            out = out + self.tokens.weight.sum()
        return (out, x) if self.variant.get("returned") else out


class Image(nn.Module):
    """Patches by convolution, a class token, positions; the last norm is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList(Block(layer_norm) for _ in range(2))
        self.norm = layer_norm()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), patches), 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Bare(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-6, elementwise_affine=False)


class PostNorm(Block):
    """The norm is behind the sum: what it gives is the residual."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attend(x))
        return self.norms[1](x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Attention(Block):
    """A block whose values are changed before or after attention."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def attend(self, x: Tensor) -> Tensor:
        v = self.change(self, self.v(x)).unsqueeze(1)
        weights = torch.softmax(self.q(x) @ self.q(x).transpose(1, 2), -1)[:, None]
        made = weights @ v.expand(-1, HEADS, -1, -1)
        return self.o(made.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Any:
        return self.attend(x)


AXES = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", min=3)},)


def _text(name: str, *args: Any, **options: Any) -> Example:
    """A model of these arguments; options are those of `Example`, or the model's."""
    own = {k: v for k, v in options.items() if k not in Example.__dataclass_fields__}
    rest = {k: v for k, v in options.items() if k not in own}
    return Example(
        name, lambda: Text(*args, **own), lambda: (torch.randint(WORDS, (2, 6)),), **rest
    )


def _heads(name: str, change: Callable[[Any, Tensor], Tensor], **options: Any) -> Example:
    return Example(name, lambda: Attention(change), lambda: (torch.randn(2, 5, WIDTH),), **options)


def streams() -> Iterator[Example]:
    yield _text("decoder")
    yield _text("decoder, dynamic", dynamic_shapes=AXES)
    yield _text("layer norms", lambda: Block(layer_norm), layer_norm)
    yield _text("scaled embedding", scaled=True)
    yield _text("merged", lambda: Block(merged=True))
    yield _text("tied, no scales", lambda: Block(Bare), Bare, tied=True)
    yield _text("tied", tied=True, blocks=4)
    yield _text("returned", returned=True)
    yield _text("embedding read aside", aside=True, blocks=4)
    yield _text("rows are scaled", change=lambda x: x * x.new_ones(x.shape[:2])[..., None])
    yield Example("image", Image, lambda: (torch.randn(2, 3, 8, 8),))
    half = lambda: (torch.randint(WORDS, (2, 6)),)  # noqa: E731
    yield Example("bfloat16", lambda: Text().bfloat16(), half)


def stuck_streams() -> Iterator[Example]:
    yield _text("trains", training=True, reason="trains")
    yield _text("activated", change=torch.relu, reason="reads the stream, and no rotation")
    yield _text("features are scaled", change=lambda x: x * torch.arange(WIDTH), reason="reads the")
    yield _text("shifted", change=lambda x: x + 0.5, reason="reads the stream")
    yield _text("channels are cut", change=lambda x: F.pad(x[..., 2:], (2, 0)), reason="reads the")
    yield _text("post-norm", PostNorm, reason="rms_norm) reads the stream")
    yield _text("layer norms, post-norm", lambda: PostNorm(layer_norm), reason="layer_norm")
    yield _text("one weight for all", lambda: _shared_block(), reason="reads the stream")


def _shared_block() -> nn.Module:
    """Every product that writes the stream has a weight that another reads it with."""
    block = Block()
    block.o.weight = block.q.weight
    block.up.weight = block.gate.weight
    block.down = nn.Linear(2 * WIDTH, WIDTH, False)
    block.v.weight = block.k.weight
    return block


def heads() -> Iterator[Example]:
    yield _text("decoder", count=2)
    yield _text("decoder, dynamic", count=2, dynamic_shapes=AXES)
    yield _text("merged", lambda: Block(merged=True), count=2)
    yield _heads("written out", lambda _m, v: v)
    yield _heads("a number", lambda _m, v: v * 0.5)
    yield Example(
        "bfloat16", lambda: Text().bfloat16(), lambda: (torch.randint(WORDS, (2, 6)),), count=2
    )


def stuck_heads() -> Iterator[Example]:
    yield _text("trains", training=True)
    yield _heads("activated", lambda _m, v: v.relu())
    yield _heads("channels are scaled", lambda _m, v: v * torch.arange(6))
    yield _heads("a channel is read", lambda _m, v: v + v[..., :1], reason="several channels")
    yield _heads("the weight is tied", lambda m, v: v + 0 * m.v(v.repeat(1, 1, 2).sin()))
    yield _heads("residual", lambda _m, v: v + 0.5)
