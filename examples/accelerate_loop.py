"""A loop of your own under Hugging Face Accelerate, watched by `thalweg.watch`.

`watch` takes the prepared model and optimizer as they are: it looks through both. A step that
Accelerate leaves out, while gradients accumulate, is not counted. The report is in the precision of
the parameters, float32, though `prepare` has put the forward pass in bfloat16. Do not call
`accelerator.unwrap_model(model, keep_fp32_wrapper=False)` for it: that ends the mixed precision of
the training itself.

    python examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import thalweg
from thalweg.measure import Watcher
from thalweg.problems.data.digits import Digits
from with_and_without import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--every", type=int, default=750, help="steps between reports")
    parser.add_argument("--width", type=int, default=200)
    run = parser.parse_args()
    digits = Digits().build()
    inputs = torch.tensor(digits.train_inputs, dtype=torch.float32).flatten(1) / 16
    data = TensorDataset(inputs, torch.tensor(digits.train_labels))
    loss = nn.CrossEntropyLoss()

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        torch.manual_seed(0)
        accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = DataLoader(data, batch_size=32, shuffle=True)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        watcher = None
        if watched:
            watcher = thalweg.watch(model, loss, data, optimizer, samples=64, k=1, every=run.every)
        for _ in range(run.epochs):
            for images, labels in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model(images), labels))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        return watcher

    torch.manual_seed(0)
    first, last = nn.Linear(64, run.width), nn.Linear(run.width, 10)
    compare(nn.Sequential(first, nn.GELU(), nn.Dropout(0.1), last), train)


if __name__ == "__main__":
    main()
