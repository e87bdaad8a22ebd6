"""A small ResNet with batch norm on CIFAR-10, SGD with momentum, watched by one line.

The curvature is that of the network in evaluation mode: batch norm uses its running statistics, and
nothing of the report goes into them. The step is made for another loss, with the statistics of each
batch: a sharpness above the threshold need not mean that the training is unstable. That of the
training loss is `watch(..., mode="train")` over a list of batches.

    python examples/resnet_cifar10.py --data cifar10.npz   # x_train (N, 32, 32, 3) uint8, y_train
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import thalweg
from thalweg.measure import Watcher
from with_and_without import compare


def cifar10(file: Path | None, images: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) from -1 to 1 and labels (N,); random ones without a file."""
    if file is None:
        return torch.rand(images, 3, 32, 32) * 2 - 1, torch.arange(images) % 10
    with np.load(file) as arrays:
        pixels, labels = arrays["x_train"][:images], arrays["y_train"][:images]
    return torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels).long()


def layer(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(layer(channels, out, stride), nn.ReLU(), layer(out, out))
        self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


def resnet(width: int) -> nn.Sequential:
    blocks = [Block(width * 2**i, width * 2 ** (i + 1), stride=2) for i in range(3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, 10)]
    return nn.Sequential(layer(3, width), nn.ReLU(), *blocks, *head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="an npz file; random images without")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--width", type=int, default=8)
    run = parser.parse_args()
    torch.manual_seed(0)
    data, loss = cifar10(run.data, run.images), nn.CrossEntropyLoss()

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        watcher = None
        if watched:
            watcher = thalweg.watch(model, loss, data, optimizer, samples=64, k=1, every=run.every)
        for _ in range(run.steps):
            batch = torch.randint(0, len(data[0]), (128,))
            optimizer.zero_grad()
            loss(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
        return watcher

    compare(resnet(run.width), train)


if __name__ == "__main__":
    main()
