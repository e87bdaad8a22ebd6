"""What a batch may hold, brought into one form: tensors, lists of one value a sample, constants.

A batch is a tuple `(inputs..., target)` or a dict, of tensors whose first dimension counts samples.
Beside them there may be NumPy arrays and lists of numbers, which become tensors; lists of texts, of
which there is one a sample; nested tuples, lists and dicts of all these; and None, numbers and
texts by themselves, which are the same for all samples. Objects that hold tensors in attributes are
refused: nobody knows how to take some of their samples.

Example:
    >>> import torch
    >>> plain({"inputs": torch.ones(2, 3), "labels": [0, 1], "text": ["a", "b"], "mask": None})
    {'inputs': tensor([[1., 1., 1.],
            [1., 1., 1.]]), 'labels': tensor([0, 1]), 'text': ['a', 'b'], 'mask': None}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput, invalid

NUMERIC = "biufc"
"""The kinds of NumPy's dtypes that are numbers."""


class PerSample(list):
    """A list of one value a sample that are no tensors, such as texts.

    The model gets it as the list that it is; torch's trees take it for one leaf.
    """


def plain(part: Any, where: str = "data", like: Tensor | None = None) -> Any:
    """A batch in the form that the module speaks of.

    Args:
        part: the batch, or a part of it.
        where: what errors call it.
        like: a parameter, whose device numbers get that are no tensors yet, and whose dtype they
            get where they are floating-point; None leaves them on the CPU.

    Raises:
        InvalidInput: what cannot be read by samples; it names the entry.
    """
    if part is None or isinstance(part, (Tensor, str, bytes, Number, PerSample)):
        return part
    if isinstance(part, Mapping):
        return {key: plain(value, f"{where}[{key!r}]", like) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        return _sequence(part, where, like)
    if isinstance(part, (nn.Module, type)) or callable(part):
        return part
    if hasattr(part, "__array__"):
        return _array(part.__array__(), where, like)
    held = [name for name, value in _attributes(part) if isinstance(value, Tensor)]
    if held:
        kind = type(part).__name__
        raise invalid(
            where,
            f"a {kind} with tensors {', '.join(held)}",
            "tensors, tuples, lists and dicts of them",
            "give a dict of its tensors, such as vars(...), and let the model take them by name",
        )
    return part


def _sequence(part: Sequence[Any], where: str, like: Tensor | None) -> Any:
    values = list(part)
    if isinstance(part, list) and values and not any(map(_holds_numbers_of_its_own, values)):
        if all(isinstance(value, (str, bytes)) or value is None for value in values):
            return PerSample(values)
        return _numbers(values, where, like)
    found = [plain(value, f"{where}[{i}]", like) for i, value in enumerate(values)]
    if isinstance(part, tuple):
        return type(part)(*found) if hasattr(part, "_fields") else tuple(found)
    return found


def _holds_numbers_of_its_own(value: Any) -> bool:
    """Whether there is a tensor or an array in it, rather than numbers and texts alone."""
    if isinstance(value, (Tensor, Mapping, tuple)) or hasattr(value, "__dict__"):
        return True
    if hasattr(value, "__array__"):
        return getattr(value, "ndim", 1) > 0
    return isinstance(value, list) and any(map(_holds_numbers_of_its_own, value))


def _numbers(values: list[Any], where: str, like: Tensor | None) -> Tensor:
    try:
        return _as(torch.tensor(values, device="cpu"), like)
    except (ValueError, TypeError, RuntimeError) as error:
        raise invalid(
            where,
            f"a list of {type(values[0]).__name__} that makes no tensor",
            "numbers in lists of one length",
            f"pad them, or give a tensor; torch says: {str(error).splitlines()[0]}",
        ) from error


def _array(array: Any, where: str, like: Tensor | None) -> Any:
    if array.dtype.kind not in NUMERIC:
        if array.ndim == 1:
            return PerSample(array.tolist())
        hint = "give numbers, or a list of texts"
        raise invalid(where, f"an array of dtype {array.dtype}", "numbers", hint)
    if array.ndim == 0:
        return array.item()
    # A copy: an array may be read-only, or run backwards.
    return _as(torch.tensor(array.copy(), device="cpu"), like)


def _as(tensor: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _attributes(part: Any) -> Iterator[tuple[str, Any]]:
    yield from vars(part).items() if hasattr(part, "__dict__") else ()
    for name in getattr(type(part), "__slots__", ()):
        yield name, getattr(part, name, None)


def sizes(batch: Any, where: str = "data") -> dict[str, int]:
    """How many samples each tensor and list of a batch in its plain form has, by its place."""
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            hint = "a number that is the same for all samples is given by .item()"
            raise invalid(
                where, "a tensor without dimensions", "a first dimension of samples", hint
            )
        return {where: batch.shape[0]}
    if isinstance(batch, PerSample):
        return {where: len(batch)}
    found: dict[str, int] = {}
    if isinstance(batch, Mapping):
        for key, part in batch.items():
            found |= sizes(part, f"{where}[{key!r}]")
    elif isinstance(batch, (tuple, list)):
        for number, part in enumerate(batch):
            found |= sizes(part, f"{where}[{number}]")
    return found


def mapped_leaves(
    tensors: Callable[[Tensor], Any], lists: Callable[[PerSample], Any]
) -> Callable[[Any], Any]:
    """A function of the leaves of a plain batch: of tensors, of lists, and nothing of the rest."""

    def function(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tensors(leaf)
        return lists(leaf) if isinstance(leaf, PerSample) else leaf

    return function


def collate_rows(rows: Sequence[Any]) -> Any:
    """Rows of a data set that is none of torch's as one batch, in its plain form.

    Rows are dicts or tuples of tensors, arrays, numbers, texts, and lists of numbers, which are
    tensors of one dimension.

    Raises:
        InvalidInput: rows that differ in what they hold, or in its shape; it names the entry.
    """
    return _column(list(rows), "row")


def _column(values: list[Any], where: str) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        names = list(first)
        return {
            name: _column([row[name] for row in values], f"{where}[{name!r}]") for name in names
        }
    if isinstance(first, tuple):
        count = range(len(first))
        return tuple(_column([row[i] for row in values], f"{where}[{i}]") for i in count)
    if first is None and all(value is None for value in values):
        return None
    if all(isinstance(value, (str, bytes)) for value in values):
        return PerSample(values)
    try:
        return torch.stack([_row(value) for value in values])
    except (RuntimeError, TypeError, ValueError) as error:
        kinds = sorted({_kind(value) for value in values})
        raise invalid(
            where,
            " and ".join(kinds[:3]),
            "numbers or tensors of one shape in all rows",
            "pad them, drop the entry, or give a DataLoader with a collate_fn",
        ) from error


def _row(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    plain = value.__array__() if hasattr(value, "__array__") else value
    return torch.tensor(plain, device="cpu")


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} {tuple(shape)}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)


def refuse_rows(batch: Any) -> None:
    """Raise where what is to be a batch is a single sample."""
    if isinstance(batch, Mapping) and batch and all(map(_is_scalar, batch.values())):
        raise InvalidInput(
            f"data: a row with entries {', '.join(map(repr, batch))}, where a batch is to be; give"
            " a map-style Dataset of rows, or batches: tensors whose first dimension counts samples"
        )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (Number, str)) or getattr(value, "shape", None) == ()
