"""How much memory do the top eigenpairs of a large model take, by differences of gradients?

A GPT of some 10^8 parameters with random tokens, on one CPU: k eigenpairs of the Hessian of its
loss without any graph that outlives a gradient. Memory is the largest resident size of the process
beyond what it had before, in bytes and in vectors of P numbers; the model's own parameters count.

    python benchmarks/difference_memory.py                 # P = 10^8, k = 2: about 12 GB
    python benchmarks/difference_memory.py --layers 2 --width 64 --vocabulary 500    # seconds
"""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import thalweg
from thalweg.loss.cost import PARTS
from thalweg.measure.clock import now


class GPT(nn.Module):
    """A decoder as GPT-2's, its head tied to the embedding."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    "query_key_value": nn.Linear(width, 3 * width),
                    "mixed": nn.Linear(width, width),
                    "between": nn.LayerNorm(width),
                    "wide": nn.Linear(width, 4 * width),
                    "narrow": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.last = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, (n, vocabulary)."""
        states = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for each in self.blocks:
            block: Any = each
            parts = block["query_key_value"](block["before"](states)).chunk(3, dim=-1)
            query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            states = states + block["mixed"](mixed.transpose(1, 2).flatten(-2))
            wide = functional.gelu(block["wide"](block["between"](states)))
            states = states + block["narrow"](wide)
        return functional.linear(self.last(states), self.tokens.weight).flatten(0, 1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens."""
    return functional.cross_entropy(logits, target.flatten())


def peak() -> int:
    """The largest resident size so far, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def main() -> None:
    """Solve, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--basis-size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--product", choices=("exact", "difference"), default="difference")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = peak()
    torch.manual_seed(0)
    heads = given.heads if given.width % given.heads == 0 else 1
    model = GPT(given.width, given.layers, heads, given.vocabulary, given.length)
    # Words of a language are far from equally frequent.
    chance = 1 / torch.arange(1, given.vocabulary + 1, dtype=torch.float64)
    drawn = torch.multinomial(chance, given.sequences * (given.length + 1), replacement=True)
    tokens = drawn.reshape(given.sequences, -1)
    objective = thalweg.Objective(
        model, cross_entropy, (tokens[:, :-1], tokens[:, 1:]), product=given.product, check=False
    )
    size = objective.num_parameters
    begin = now(objective.device)
    found = thalweg.eigenpairs(
        objective, given.k, tolerance=given.tolerance, basis_size=given.basis_size
    )
    seconds = now(objective.device) - begin
    used = peak() - before
    gradients = objective.cost.parts / PARTS / given.sequences
    print(f"P = {size:,}, k = {given.k}, {given.product}, basis of {given.basis_size}")
    print(f"eigenvalues {found.eigenvalues.tolist()}")
    assert found.residuals is not None
    print(f"residuals {found.residuals.tolist()}, converged: {found.converged}")
    print(f"{found.num_matvecs:g} products, {gradients:.0f} gradients, {seconds:.0f} s, one thread")
    print(f"peak {used / 1e9:.1f} GB = {used / 4 / size:.1f} vectors of P float32")


if __name__ == "__main__":
    main()
