"""The data of an objective: a fixed, ordered set of samples that can be read in chunks.

A loss over data is a function of the parameters alone only if the data is the same at every call.
So whatever the user has (tensors, a `Dataset`, a `DataLoader`, batches) becomes `Samples`: a number
of samples, and batches of any subset of them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from thalweg.errors import InvalidInput, invalid

Batch = Any
"""A tuple (inputs..., target) or a dict of tensors whose first dimension counts samples."""


class Samples(Protocol):
    """A fixed, ordered set of samples."""

    def __len__(self) -> int:
        """The number of samples N."""
        ...

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        """Yield (batch, number of samples in it), at most `size` samples each.

        Args:
            indices: which samples, int64 (n,), in this order; None for all.
            size: the largest batch; None for no limit.
        """
        ...


class TensorSamples:
    """Samples held as a tuple, list or dict of tensors with a common first dimension."""

    def __init__(self, tensors: Batch) -> None:
        self.tensors = tensors
        sizes = {_first_dimension(t) for t in tree_leaves(tensors) if isinstance(t, Tensor)}
        if len(sizes) != 1:
            raise invalid("data", f"tensors of {sorted(sizes)} samples", "one number of samples")
        self._size = sizes.pop()
        if self._size == 0:
            raise InvalidInput("data: it holds no sample; give at least one")

    def __len__(self) -> int:
        return self._size

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        total = self._size if indices is None else len(indices)
        for begin, end in _ranges(total, size):
            chosen = slice(begin, end) if indices is None else indices[begin:end]
            yield tree_map(_select(chosen), self.tensors), end - begin


class DatasetSamples:
    """Samples read from a map-style `Dataset` when they are needed."""

    def __init__(self, dataset: Dataset, collate: Callable[[list], Batch] = default_collate):
        if isinstance(dataset, IterableDataset):
            raise InvalidInput(
                "data: an IterableDataset has no fixed order; give a list of its batches"
            )
        self.dataset: Any = dataset
        self.collate = collate
        if len(self) == 0:
            raise InvalidInput("data: the data set is empty; give at least one sample")
        if not _same(self.dataset[0], self.dataset[0]):
            raise InvalidInput(
                "data: reading sample 0 twice gives two values (random augmentation?); curvature"
                " needs a fixed loss: give the data set without augmentation"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        order = range(len(self)) if indices is None else indices.tolist()
        for begin, end in _ranges(len(order), size):
            yield self.collate([self.dataset[i] for i in order[begin:end]]), end - begin


class BatchSamples:
    """Samples in batches that cannot be joined, such as texts padded to different lengths."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = [TensorSamples(batch) for batch in batches]
        self.starts = [0]
        for batch in self.batches:
            self.starts.append(self.starts[-1] + len(batch))

    def __len__(self) -> int:
        return self.starts[-1]

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        for batch, start in zip(self.batches, self.starts, strict=False):
            if indices is None:
                yield from batch.chunks(None, size)
                continue
            inside = indices[(indices >= start) & (indices < start + len(batch))] - start
            if len(inside):
                yield from batch.chunks(inside, size)


def as_samples(data: object) -> Samples:
    """Turn what the user has into `Samples`.

    Args:
        data: a tuple `(inputs..., target)` or dict of tensors; a map-style `Dataset`; a
            `DataLoader` (its data set is read in order, so shuffling does not matter); or an
            iterable of batches.

    Raises:
        InvalidInput: empty data, unequal numbers of samples, random augmentation, or no order.
    """
    if isinstance(data, (TensorSamples, DatasetSamples, BatchSamples)):
        return data
    if isinstance(data, DataLoader):
        return DatasetSamples(data.dataset, data.collate_fn)
    if isinstance(data, Dataset):
        return DatasetSamples(data)
    if isinstance(data, Mapping) or (
        isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    ):
        return TensorSamples(data)
    if isinstance(data, Iterable):
        return _from_batches(list(data))
    raise invalid(
        "data", type(data).__name__, "tensors (inputs, target), a Dataset, or a list of batches"
    )


def _from_batches(batches: list[Batch]) -> Samples:
    if not batches:
        raise InvalidInput("data: the list of batches is empty; give at least one batch")
    shapes = [[t.shape[1:] for t in tree_leaves(b) if isinstance(t, Tensor)] for b in batches]
    if all(s == shapes[0] for s in shapes):
        # Joined, any subset is one indexing operation instead of one for each batch.
        return TensorSamples(tree_map(lambda *parts: torch.cat(parts), *batches))
    return BatchSamples(batches)


def _ranges(total: int, size: int | None) -> Iterator[tuple[int, int]]:
    size = total if size is None else size
    for begin in range(0, total, max(size, 1)):
        yield begin, min(begin + size, total)


def _select(chosen: slice | Tensor) -> Callable[[Any], Any]:
    def select(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[chosen if isinstance(chosen, slice) else chosen.to(leaf.device)]

    return select


def _first_dimension(tensor: Tensor) -> int:
    if tensor.dim() == 0:
        raise invalid("data", "a tensor without dimensions", "a first dimension of samples")
    return tensor.shape[0]


def _same(first: Any, second: Any) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a.nan_to_num(), b.nan_to_num())
        try:
            return bool(a == b)
        except (ValueError, RuntimeError):
            return True

    return all(map(equal, tree_leaves(first), tree_leaves(second)))
