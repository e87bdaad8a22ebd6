"""A model that takes dict batches and returns an object with `.loss` and `.logits`.

So do the models of `transformers`, which are passed in the same way; it is not needed here. Batches
are padded to different lengths and the loss of each is a mean over its tokens, so `batch_weight`
says how many it has: only then is the mean over batches that over all tokens.

    python examples/hugging_face_style_model.py
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import thalweg

IGNORED = -100


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 12, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        future = torch.ones(2 * input_ids.shape[1:], dtype=torch.bool).triu(1)
        hidden = self.block(self.embedding(input_ids), future, attention_mask == 0)
        logits = self.head(hidden)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def main() -> None:
    torch.manual_seed(0)
    batches = [padded_batch(16, longest) for longest in (6, 9, 14)]
    model = LanguageModel()
    objective = thalweg.Objective(model, None, batches, batch_weight=predicted_tokens)
    with torch.no_grad():
        summed = sum(float(model(**b).loss) * int(predicted_tokens(b)) for b in batches)
    tokens = sum(int(predicted_tokens(batch)) for batch in batches)
    print(f"loss {objective.value():.6f}, mean over {tokens} tokens {summed / tokens:.6f}")

    for operator in (thalweg.GaussNewton, thalweg.Hessian):
        top = thalweg.top_eigenpairs(operator(objective, keep_graph=True), 4)
        values = " ".join(f"{value:.4f}" for value in top.eigenvalues.tolist())
        alignment = top.alignment(objective.gradient())
        print(f"{operator.__name__:11}  top {values}  alignment {alignment:.3f}")
    # Names of parameters pick out a block of the matrix.
    head = thalweg.Objective(
        model, None, batches, batch_weight=predicted_tokens, parameters="head.*"
    )
    sharpness = thalweg.top_eigenpairs(thalweg.Hessian(head), 1).eigenvalues[0]
    print(f"Hessian of the head alone: {head.num_parameters} parameters, top {sharpness:.4f}")


def predicted_tokens(batch: dict[str, Tensor]) -> Tensor:
    """How many labels the loss averages over: the first of a sequence is never predicted."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def padded_batch(sequences: int, longest: int) -> dict[str, Tensor]:
    """Counting modulo 12 from random starts, padded on the right to the longest sequence."""
    positions = torch.arange(longest)
    tokens = (torch.randint(12, (sequences, 1)) + positions) % 12
    mask = positions < torch.randint(3, longest + 1, (sequences, 1))
    return {
        "input_ids": tokens * mask,
        "attention_mask": mask.long(),
        "labels": torch.where(mask, tokens, IGNORED),
    }


if __name__ == "__main__":
    main()
