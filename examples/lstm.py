"""An LSTM that reads handwritten digits row by row, trained by Adam, watched by one line.

On a GPU cuDNN's LSTM has no second derivative: reports are made with torch's own, which has one.

    python examples/lstm.py
"""

import argparse

import torch
from torch import Tensor, nn

import thalweg
from thalweg.measure import Watcher
from thalweg.problems.data.digits import Digits
from with_and_without import compare


class Reader(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        outputs, _ = self.lstm(rows)
        return self.head(outputs[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2001)
    parser.add_argument("--every", type=int, default=500, help="steps between reports")
    parser.add_argument("--width", type=int, default=64)
    run = parser.parse_args()
    digits = Digits().build()
    rows = torch.tensor(digits.train_inputs, dtype=torch.float32).squeeze(1) / 16
    data, loss = (rows, torch.tensor(digits.train_labels)), nn.CrossEntropyLoss()

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        watcher = None
        if watched:
            watcher = thalweg.watch(model, loss, data, optimizer, samples=64, k=1, every=run.every)
        for _ in range(run.steps):
            batch = torch.randint(0, len(rows), (50,))
            optimizer.zero_grad()
            loss(model(data[0][batch]), data[1][batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return watcher

    torch.manual_seed(0)
    compare(Reader(run.width), train)


if __name__ == "__main__":
    main()
