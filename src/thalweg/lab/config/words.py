"""What are the keys of a spec called in short, and in other programs?"""

from __future__ import annotations

from thalweg.lab.config.fields import Location, dotted

SHORT_FORMS: dict[str, str] = {
    "lr": "phases.*.optimizer.lr",
    "batch_size": "phases.*.batch_size",
    "steps": "branches.*.steps",
    "samples": "problem.samples",
    "data_dir": "problem.data.data_dir",
    "k": "subspace.k",
    "seed": "seeds",
}
"""Short forms and what they stand for; `*` is every phase, or every branch."""

KEYS_BY_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate", "learningrate", "rate", "step_size", "eta"),
    "batch_size": ("batch", "bs", "minibatch_size", "batchsize"),
    "steps": ("iterations", "iters", "max_steps", "num_steps", "n_steps"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs"),
    "optimizer": ("optim", "opt", "optimiser"),
    "weight_decay": ("wd", "l2"),
    "clip_norm": ("grad_clip", "gradient_clip", "max_grad_norm", "clip"),
    "samples": ("num_samples", "n_samples", "subset"),
    "data_dir": ("data_path", "data_folder", "datadir", "dataset_dir"),
    "hidden": ("width", "hidden_size", "hidden_sizes"),
    "data": ("dataset", "data_set"),
    "seeds": ("random_seed", "num_seeds"),
    "k": ("dimension", "rank", "top_k"),
}
"""Keys, and what they are called elsewhere; these words are not read, the messages know them."""

_KEYS = {word: key for key, words in KEYS_BY_OTHER_WORDS.items() for word in words}


def key_called(word: str) -> str:
    """The key that another program calls so; the word itself where none does."""
    plain = word.replace("-", "_").lower()
    return _KEYS.get(plain, plain)


def as_option(path: Location) -> str:
    """How a key path is written on the command line, as short as it can be.

    Example:
        >>> [as_option(("phases", 0, *key)) for key in (("optimizer", "lr"), ("steps",))]
        ['--lr', '--phases.*.steps']
    """
    every = (path[0], "*", *path[2:]) if path[:1] == ("phases",) and len(path) > 2 else path
    short = {full: word for word, full in reversed(SHORT_FORMS.items())}.get(dotted(every))
    whole = dotted(path[2:] if every != path else path)
    return f"--{short or (dotted(every) if whole in SHORT_FORMS else whole)}"
