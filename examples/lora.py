"""LoRA on the small GPT-2, by peft in the Trainer of Hugging Face, watched by one line.

Theta is what the optimizer trains: the adapters. The sharpness is that of the loss in them alone,
the rest of the model stays as it is.

    python examples/lora.py --data tinyshakespeare.txt
"""

import argparse
import tempfile
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hugging_face_gpt2 import Characters, gpt2
from thalweg.integrations.huggingface import CurvatureCallback
from thalweg.measure import Watcher
from with_and_without import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a text file; a built-in sentence without")
    parser.add_argument("--steps", type=int, default=301)
    parser.add_argument("--every", type=int, default=150, help="steps between reports")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=144)
    run = parser.parse_args()
    text = Characters(run.data, length=64)

    def train(model: nn.Module, watched: bool) -> Watcher | None:
        settings = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 20}
        how = {"per_device_train_batch_size": 16, "use_cpu": True, "max_steps": run.steps}
        said = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, **settings, **how, **said)
            trainer = Trainer(model=model, args=arguments, train_dataset=text)
            if watched:
                curvature = CurvatureCallback(trainer, samples=8, k=1, every=run.every)
                trainer.add_callback(curvature)
            trainer.train()
        return curvature.watcher if watched else None

    set_seed(0)
    adapters = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    compare(get_peft_model(gpt2(text, run.layers, run.width), adapters), train)


if __name__ == "__main__":
    main()
