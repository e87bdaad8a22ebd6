"""What does a data set hand over, and which of its samples does a problem use?

A data set's `build()` returns all its `Samples`; a problem takes the first n of them, or n balanced
over the classes, before anything is computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from thalweg.errors import InvalidInput, invalid


@dataclass(frozen=True)
class InputShape:
    """The shape of one input, and how many token ids there are where inputs are tokens.

    `shape` is (channels, height, width) for images, (features,) for vectors, (length,) for tokens;
    `vocabulary` is None unless the inputs are token ids (the largest is vocabulary - 1; 0 is
    padding, except in a data set for language models).
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def size(self) -> int:
        """How many numbers one input has."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and what is to be predicted from them, as arrays.

    Attributes:
        train_inputs: (n, *shape) numbers, images channel first; or n texts, which the data set's
            `encode` turns into token ids once the samples are chosen.
        train_labels: (n,) integers, the classes from 0; (n, length) of them where each token of a
            sample has one, as in a language model; or, for regression, (n,) or (n, m) floats.
        num_classes: how many classes there are; None for regression.
        test_inputs, test_labels: the held-out samples, None when there are none.
        scale: the largest value an input can have, by which preprocessing "unit" divides.
        vocabulary: how many token ids there are, None when inputs are numbers.
        notes: what a user should know about how the samples came about, a sentence each.
    """

    train_inputs: np.ndarray | Sequence[str]
    train_labels: np.ndarray
    num_classes: int | None
    test_inputs: np.ndarray | Sequence[str] | None = None
    test_labels: np.ndarray | None = None
    scale: float = 1.0
    vocabulary: int | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Encodes(Protocol):
    """A data set whose inputs depend on the samples chosen, as a vocabulary does."""

    def encode(self, samples: Samples) -> Samples:
        """Turn the inputs of the chosen samples into arrays."""
        ...


def choose(
    samples: Samples, name: str, number: int | None, balanced: bool, test_number: int | None
) -> Samples:
    """Keep the first `number` training samples and the first `test_number` held-out ones.

    Args:
        samples: all there are.
        name: the data set's name, for messages.
        number: training samples to keep; None keeps all.
        balanced: keep the first number / num_classes of each class, in the data set's order.
        test_number: held-out samples to keep; None keeps all, 0 none.

    Raises:
        InvalidInput: no samples, fewer than asked for, or no balanced subset of that size.
    """
    _check_samples(samples, name)
    chosen = _first(f"samples of {name}", number, len(samples.train_labels), least=1)
    if balanced:
        chosen = _balanced(samples.train_labels, samples.num_classes, name, number)
    kept = replace(
        samples,
        train_inputs=_take(samples.train_inputs, chosen),
        train_labels=samples.train_labels[chosen],
    )
    if samples.test_inputs is None or samples.test_labels is None or test_number == 0:
        if test_number:
            raise invalid(f"test_samples of {name}", test_number, "0", "it has no held-out samples")
        return replace(kept, test_inputs=None, test_labels=None)
    chosen = _first(f"test_samples of {name}", test_number, len(samples.test_labels), least=0)
    return replace(
        kept,
        test_inputs=_take(samples.test_inputs, chosen),
        test_labels=samples.test_labels[chosen],
    )


def _check_samples(samples: Samples, name: str) -> None:
    parts = [("training", samples.train_inputs, samples.train_labels)]
    if samples.test_inputs is not None and samples.test_labels is not None:
        parts.append(("held-out", samples.test_inputs, samples.test_labels))
    for what, inputs, labels in parts:
        _check_types(inputs, labels, f"data set {name}: {what}")
        if len(inputs) != len(labels):
            raise InvalidInput(
                f"data set {name}: {len(inputs)} {what} inputs and {len(labels)} labels; "
                "each input needs one label"
            )
        if samples.num_classes is not None:
            shape = np.shape(inputs) if samples.vocabulary is not None else None
            _check_labels(labels, samples.num_classes, f"{what} labels of data set {name}", shape)
    if len(samples.train_labels) == 0:
        raise InvalidInput(f"data set {name}: no training samples; at least one is needed")


def _check_types(inputs: object, labels: object, what: str) -> None:
    """A user's data set may hand over anything."""
    if not isinstance(labels, np.ndarray):
        raise InvalidInput(f"{what} labels are a {type(labels).__name__}; give a NumPy array")
    texts = isinstance(inputs, list | tuple) and all(isinstance(text, str) for text in inputs)
    if not (texts or isinstance(inputs, np.ndarray)):
        given = type(inputs).__name__
        raise InvalidInput(f"{what} inputs are a {given}; give a NumPy array, or a list of texts")
    for part, values in (("inputs", inputs), ("labels", labels)):
        if isinstance(values, np.ndarray) and not _is_finite(values):
            raise InvalidInput(
                f"{what} {part} hold NaN or infinite values; leave those samples out"
            )


def _is_finite(values: np.ndarray) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _check_labels(
    labels: np.ndarray, num_classes: int, what: str, tokens: tuple[int, ...] | None
) -> None:
    """tokens: the shape of the inputs where these are tokens, each of which may have a label."""
    one_each = labels.ndim == 1 or labels.shape == tokens
    if not one_each or labels.dtype.kind not in "iu":
        given = f"shape {labels.shape}, {labels.dtype}"
        raise invalid(what, given, "one integer a sample", "regression has num_classes=None")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise invalid(what, int(wrong[0]), f"classes 0 to {num_classes - 1}")


def _first(what: str, number: int | None, available: int, least: int) -> np.ndarray:
    if number is not None and not least <= number <= available:
        raise invalid(what, number, f"an integer from {least} to {available}")
    return np.arange(available if number is None else number)


def _balanced(
    labels: np.ndarray, num_classes: int | None, name: str, number: int | None
) -> np.ndarray:
    if num_classes is None:
        raise invalid("balanced", True, "false", f"data set {name} has no classes")
    if labels.ndim != 1:
        raise invalid("balanced", True, "false", f"data set {name} has a class for each token")
    if number is None or number % num_classes:
        allowed = f"a multiple of its {num_classes} classes where balanced = true"
        raise invalid(f"samples of {name}", number, allowed)
    each = number // num_classes
    chosen = [np.flatnonzero(labels == label)[:each] for label in range(num_classes)]
    for label, indices in enumerate(chosen):
        if len(indices) < each:
            raise invalid(
                f"samples of {name}",
                number,
                f"{each} samples of each class; class {label} has {len(indices)}",
                "ask for fewer, or set balanced = false",
            )
    return np.sort(np.concatenate(chosen))


def _take(inputs: np.ndarray | Sequence[str], indices: np.ndarray) -> np.ndarray | tuple[str, ...]:
    if isinstance(inputs, np.ndarray):
        return inputs[indices]
    return tuple(str(inputs[index]) for index in indices)
