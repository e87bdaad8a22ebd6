"""A block of products by differences: its gradients one after another, or in one vectorized pass.

Seconds of processor time of 10 products at a point, in one run; the ratio says how much faster one
pass for all points is. And how far the two are apart, in units of the error that they state.

    OMP_NUM_THREADS=1 python benchmarks/points_at_once.py
    python benchmarks/points_at_once.py --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from thalweg.loss.objective import Objective
from thalweg.measure.clock import now
from thalweg.operators.hessian import Hessian

BLOCK, TIMES = 10, 5
WORDS, LENGTH = 64, 32


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inner(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outer(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x))


class GPT(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WORDS))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places.weight
        return self.head(self.blocks(x)).flatten(0, 1)


def mlp() -> nn.Module:
    inner = nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh()
    return nn.Sequential(*inner, nn.Linear(100, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1),
        nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def images(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape), torch.randint(0, 10, (count,))


def sentences(count: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(0, WORDS, (count, LENGTH + 1))
    return words[:, :-1], words[:, 1:]


def token_loss(scores: Tensor, words: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, words.flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "MLP": (mlp, lambda count: images(count, 64)),
    "CNN": (cnn, lambda count: images(count, 3, 32, 32)),
    "GPT": (GPT, sentences),
}


def seconds(multiply: Callable[[], object], device: torch.device) -> float:
    """The median of several calls, of processor time on a CPU; the first one warms up."""
    clock = time.process_time if device.type == "cpu" else lambda: now(device)
    each = []
    for _ in range(TIMES + 1):
        begin = clock()
        multiply()
        each.append(clock() - begin)
    return statistics.median(each[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    print("| model | P | samples | one by one, ms | at once, ms | times as fast | apart |")
    print("|---|---|---|---|---|---|---|")
    for name, (build, draw) in CASES.items():
        for count in (8, 32, 128, 512):
            torch.manual_seed(0)
            model = build().to(device)
            data = tuple(part.to(device) for part in draw(count))
            loss = token_loss if name == "GPT" else nn.CrossEntropyLoss()
            found, took = [], []
            for up_to in (0, 10**6):
                objective = Objective(
                    model, loss, data, product="difference", vectorize_up_to=up_to, chunk_size=None
                )
                hessian = Hessian(objective)
                block = torch.randn(
                    objective.num_parameters, BLOCK, generator=torch.Generator().manual_seed(1)
                ).to(device)
                found.append(hessian.product_with_error(block))
                at = objective.linearize()
                at.multiply(block.T)
                took.append(seconds(lambda at=at, block=block: at.multiply(block.T), device))
            (one, error), (other, _) = found
            assert error is not None
            apart = float(((one - other).norm(dim=0) / error.to(device)).max())
            print(
                f"| {name} | {len(one):,} | {count} | {1e3 * took[0]:.1f} | {1e3 * took[1]:.1f}"
                f" | {took[0] / took[1]:.1f} | {apart:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
