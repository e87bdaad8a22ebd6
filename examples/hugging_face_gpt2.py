"""A small GPT-2 on characters in the Trainer of Hugging Face, watched by one line.

AdamW, warm-up, cosine, clipping, accumulation of two batches, bfloat16. The report is in float32,
the precision of the parameters. `with_and_without.py` trains it twice to say what the line costs.

    python examples/hugging_face_gpt2.py --data tinyshakespeare.txt
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from thalweg.integrations.huggingface import CurvatureCallback
from thalweg.measure import Watcher
from with_and_without import compare

BUILT_IN = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60


class Characters(Dataset):
    """Sequences of a text, as the numbers of its characters."""

    def __init__(self, file: Path | None, length: int) -> None:
        text = BUILT_IN if file is None else file.read_text(encoding="utf-8")
        self.alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        self.tokens, self.length = torch.tensor([numbers[c] for c in text]), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = self.tokens[number * self.length : (number + 1) * self.length]
        return {"input_ids": tokens, "labels": tokens}


def gpt2(text: Characters, layers: int, width: int) -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_layer": layers, "n_embd": width, "n_head": 4, "n_positions": text.length}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(text.alphabet), **sizes, **ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a text file; a built-in sentence without")
    parser.add_argument("--steps", type=int, default=1001)
    parser.add_argument("--every", type=int, default=250, help="steps between reports")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=144)
    run = parser.parse_args()
    text = Characters(run.data, length=64)

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        settings = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20}
        batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        how = {"max_grad_norm": 1.0, "bf16": True, "use_cpu": True, "max_steps": run.steps}
        said = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, **settings, **batches, **how, **said)
            trainer = Trainer(model=model, args=arguments, train_dataset=text)
            if watched:
                curvature = CurvatureCallback(trainer, samples=8, k=1, every=run.every)
                trainer.add_callback(curvature)
            trainer.train()
        return curvature.watcher if watched else None

    set_seed(0)
    compare(gpt2(text, run.layers, run.width), train)


if __name__ == "__main__":
    main()
