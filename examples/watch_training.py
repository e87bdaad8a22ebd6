"""Watch a training loop of your own: one line around it, and the training stays bit for bit.

At every 20th step a report on the console: sharpness, stability threshold, how much of the gradient
and of the update lies in the dominant subspace, effective learning rates. Under Adam the sharpness
to compare with the threshold is that in Adam's own metric. The curvature is that of the model in
evaluation mode, since dropout makes the training loss random.

    python examples/watch_training.py
"""

import torch
from torch import nn

import thalweg


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(600) % 4
    inputs = (1 + 0.3 * torch.randn(4, 20))[labels] + torch.randn(600, 20)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 4))
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)

    # k = 3: under cross-entropy of 4 classes the fourth eigenvalue does not stand clear.
    # watcher.history keeps the rows, one dict each; sinks=["csv:rows.csv"] would write them down.
    with thalweg.watch(model, loss, (inputs, labels), optimizer, every=20, k=3) as watcher:
        for _ in range(81):
            batch = torch.randint(0, len(inputs), (50,))
            optimizer.zero_grad()
            loss(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()

    last = watcher.history[-1]
    fraction = last["preconditioned_sharpness"] / last["stability_threshold"]
    print(f"{len(watcher.history)} reports; loss {watcher.history[0]['loss']:.3f}"
          f" -> {last['loss']:.3f}")  # fmt: skip
    print(f"sharpness in Adam's metric is at {fraction:.1%} of the threshold"
          f" {last['stability_threshold']:.0f}")  # fmt: skip
    print(f"{last['alignment_update'] ** 2:.1%} of the update's square is dominant")


if __name__ == "__main__":
    main()
