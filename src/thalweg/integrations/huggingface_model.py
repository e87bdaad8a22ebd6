"""A causal language model that was saved by transformers, with a text, as a loss.

Nothing is downloaded and no code of the folder is run: weights are read from safetensors alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput, invalid, require_extra
from thalweg.limits import read_bytes
from thalweg.loss.objective import Objective


class NextToken(nn.Module):
    """Logits of all tokens but the last, from tokens (n, length)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n (length - 1), vocabulary)."""
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1)


def next_token_loss(output: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return nn.functional.cross_entropy(output, tokens[:, 1:].flatten())


def saved_language_model(
    folder: Path, text: Path, *, samples: int, context: int, device: str = "cpu"
) -> Objective:
    """The loss of a saved causal language model over some sequences of a text, evenly drawn.

    Tokens are those of the tokenizer in the folder, or bytes where there is none.

    Args:
        folder: as `save_pretrained` writes it, with `config.json` and `model.safetensors`.
        text: a file in UTF-8.
        samples: sequences.
        context: tokens in each.
        device: where the model goes.

    Raises:
        InvalidInput: no such model or text; a model of another kind, whose weights leave some of a
            causal language model to chance; a context below 2 or beyond the model's positions; a
            text that is too short, or has tokens that the model does not know.
        MissingExtra: transformers is not installed.
    """
    require_extra("huggingface", "transformers")
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if context < 2:
        raise invalid("context", context, "an integer >= 2: the loss is that of the next token")
    if not (folder / "config.json").is_file():
        raise invalid("model", str(folder), "a folder with config.json and model.safetensors")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        AutoConfig.from_pretrained(folder, **settings)
        given: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(f"model: {folder} is no causal language model: {reason}") from error
    model, loaded = given
    if missing := sorted(loaded["missing_keys"]):
        # transformers draws them at random: a head that another kind of model does not have.
        few = ", ".join(missing[:3])
        raise InvalidInput(f"model: {folder} is no causal language model: it has no weights {few}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        raise invalid("context", context, f"at most the model's {longest} positions")
    tokens = _tokens(folder, text, model.config.vocab_size)
    count = len(tokens) // context
    if count < samples:
        hint = f"the text has {len(tokens):,} tokens"
        raise invalid("samples", samples, f"at most {count} sequences of {context} tokens", hint)
    sequences = tokens[: count * context].view(count, context)[:: count // samples][:samples]
    sequences = sequences.to(device)
    net = NextToken(model).to(device).eval()
    return Objective(net, next_token_loss, (sequences, sequences), mode="eval")


def _tokens(folder: Path, text: Path, vocabulary: int) -> Tensor:
    from transformers import AutoTokenizer

    data = read_bytes(text, "text_bytes")
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokens = torch.tensor(tokenizer(data.decode("utf-8"))["input_ids"], device="cpu")
    else:
        tokens = torch.tensor(list(data), device="cpu")
    if len(tokens) and int(tokens.max()) >= vocabulary:
        hint = "a tokenizer in the folder, or a text in ASCII"
        raise invalid("tokens", int(tokens.max()), f"below the vocabulary's {vocabulary}", hint)
    return tokens
