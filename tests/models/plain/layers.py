"""torch's own larger layers, and small transformers made of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """``(B, S, 8)`` through a recurrent layer to ``(B, S, 8)``, and its last state."""

    def __init__(self, kind: str, bidirectional: bool = False, layers: int = 1) -> None:
        super().__init__()
        layer = getattr(nn, kind)
        self.layer = layer(8, 6, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(12 if bidirectional else 6, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = self.layer(x)
        return self.head(out), state[0] if isinstance(state, tuple) else state


class Cell(nn.Module):
    """A cell stepped by a Python loop of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = (torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]))
        for step in range(3):
            state = self.cell(x[:, step], state)
        return state[0]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attention(x, x, x, need_weights=self.need_weights)


class Encoder(nn.Module):
    """Two ``nn.TransformerEncoderLayer``, norm first or last."""

    def __init__(self, norm_first: bool, activation: str = "gelu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, 0.1, activation, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.decoder(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)


class Block(nn.Module):
    """A pre-LN GPT block: causal attention, MLP, both added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGpt(nn.Module):
    """``(B, S)`` ids to ``(B, S, 29)`` logits; the head may be tied to the embedding."""

    def __init__(self, depth: int = 2, width: int = 16, heads: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(29, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 29, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Mlp(nn.Sequential):
    """The smallest model that still has something in it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
