"""A Transformer encoder that classifies sequences of token ids.

Written out rather than taken from `nn.TransformerEncoder`, whose fast path and nested tensors have
no second derivative. Attention goes through `scaled_dot_product_attention`; second derivatives need
its MATH backend, which the objective chooses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from thalweg.problems.data.vocabulary import PADDING
from thalweg.problems.models.layers import activation_layer


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens (n, length, width); visible (n, 1, 1, length), true where attention may look."""
        n, length, width = tokens.shape
        parts = self.query_key_value(tokens).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout
        )
        return self.output(mixed.transpose(1, 2).reshape(n, length, width))


class _EncoderLayer(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        *,
        activation: str,
        norm_first: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = _SelfAttention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward),
            activation_layer(activation),
            _dropout_layer(dropout),
            nn.Linear(feed_forward, width),
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = _dropout_layer(dropout)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        if self.norm_first:
            normed = self.attention_norm(tokens)
            tokens = tokens + self.dropout(self.attention(normed, visible))
            return tokens + self.dropout(self.feed_forward(self.feed_forward_norm(tokens)))
        tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens, visible)))
        return self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))


class TokenClassifier(nn.Module):
    """From token ids (n, length) int64 to outputs (n, outputs); see `Transformer`."""

    def __init__(
        self,
        length: int,
        vocabulary: int,
        outputs: int,
        *,
        layers: int,
        width: int,
        heads: int,
        feed_forward: int,
        activation: str,
        norm: str,
        position: str,
        pooling: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        if position == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(length, width))
        elif position == "sinusoidal":
            self.register_buffer("position", _sinusoids(length, width), persistent=False)
        else:
            self.position = None
        if pooling == "cls":
            self.front = nn.Parameter(0.02 * torch.randn(width))
        self.dropout = _dropout_layer(dropout)
        norm_first = norm == "first"
        self.layers = nn.ModuleList(
            _EncoderLayer(
                width,
                heads,
                feed_forward,
                activation=activation,
                norm_first=norm_first,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.output = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        present = ids != PADDING
        tokens = self.embedding(ids)
        if self.position is not None:
            tokens = tokens + self.position
        if self.pooling == "cls":
            front = self.front.expand(len(ids), 1, -1)
            tokens = torch.cat([front, tokens], dim=1)
            present = functional.pad(present, (1, 0), value=True)
        tokens = self.dropout(tokens)
        visible = present[:, None, None, :]
        for layer in self.layers:
            tokens = layer(tokens, visible)
        tokens = self.norm(tokens)
        if self.pooling == "cls":
            return self.output(tokens[:, 0])
        weights = present.to(tokens.dtype)
        total = (tokens * weights[:, :, None]).sum(dim=1)
        return self.output(total / weights.sum(dim=1, keepdim=True))


def _dropout_layer(dropout: float) -> nn.Module:
    """No layer where nothing is dropped, so that no deterministic objective need refuse it."""
    return nn.Dropout(dropout) if dropout > 0 else nn.Identity()


def _sinusoids(length: int, width: int) -> Tensor:
    """Position vectors (length, width) (Vaswani et al. 2017, section 3.5)."""
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    encoding = torch.zeros(length, width, dtype=torch.float64)
    encoding[:, 0::2] = torch.sin(positions * rates)
    encoding[:, 1::2] = torch.cos(positions * rates[: width // 2])
    return encoding.to(torch.get_default_dtype())
