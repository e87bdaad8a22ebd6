"""A small vision transformer of Hugging Face in a loop of your own, watched by one line.

The model returns its loss itself, so `watch` is given None for it and batches as dicts.

    python examples/vit.py --data cifar10.npz   # x_train (N, 32, 32, 3) uint8, y_train
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import thalweg
from resnet_cifar10 import cifar10
from thalweg.measure import Watcher
from with_and_without import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="an npz file; random images without")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=301)
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    run = parser.parse_args()
    torch.manual_seed(0)
    images, labels = cifar10(run.data, run.images)
    data = {"pixel_values": images, "labels": labels}

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        torch.manual_seed(0)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        watcher = None
        if watched:
            watcher = thalweg.watch(model, None, data, optimizer, samples=64, k=1, every=run.every)
        for _ in range(run.steps):
            rows = torch.randint(0, len(images), (64,))
            optimizer.zero_grad()
            model(**{name: values[rows] for name, values in data.items()}).loss.backward()
            optimizer.step()
        return watcher

    width, patches = run.width, {"image_size": 32, "patch_size": 8, "num_labels": 10}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    network = ViTConfig(num_hidden_layers=run.layers, **sizes, **patches)
    compare(ViTForImageClassification(network), train)


if __name__ == "__main__":
    main()
