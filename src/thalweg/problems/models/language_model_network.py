"""A decoder-only Transformer: from tokens to the scores of each next token.

Query, key, value and output are separate linear maps, so that the parameters of a block can be
told by their names. Learned positions and layer norm before each sublayer, as in GPT-2 (Radford et
al. 2019). Attention goes through `scaled_dot_product_attention`; second derivatives need its MATH
backend, which the objective chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from thalweg.problems.models.layers import activation_layer

# Standard deviation of matrices at the start, that of GPT-2.
SPREAD = 0.02


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (n, length, width); each looks at itself and those before it."""
        n, length, width = tokens.shape
        query, key, value = (
            part(tokens).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(n, length, width))


class _DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: int, activation: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _CausalAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward),
            activation_layer(activation),
            nn.Linear(feed_forward, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class Decoder(nn.Module):
    """From token ids (n, length) int64, length <= context, to scores (n, length, vocabulary).

    All matrices start normal with standard deviation 0.02, those that write to the residual stream
    with 0.02 / sqrt(2 layers); biases start at 0.
    """

    def __init__(
        self,
        context: int,
        vocabulary: int,
        *,
        layers: int,
        width: int,
        heads: int,
        feed_forward: int | None,
        activation: str,
        tied_head: bool,
    ) -> None:
        super().__init__()
        inner = feed_forward or 4 * width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            _DecoderLayer(width, heads, inner, activation) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._start(layers)
        if tied_head:
            self.head.weight = self.token_embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        tokens = self.token_embedding(ids) + self.position_embedding(positions)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens))

    def _start(self, layers: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("attention.output", "feed_forward.2"))
                nn.init.normal_(
                    module.weight, std=SPREAD / (2 * layers) ** 0.5 if writes else SPREAD
                )
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
