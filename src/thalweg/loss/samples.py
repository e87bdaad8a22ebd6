"""The data of an objective: a fixed, ordered set of samples that can be read in chunks.

A loss over data is a function of the parameters alone only if the data is the same at every call.
So whatever the user has (tensors, a `Dataset`, a `DataLoader`, batches) becomes `Samples`: a number
of samples, and batches of any subset of them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from thalweg.errors import InvalidInput, invalid

Batch = Any
"""A tuple (inputs..., target) or a dict of tensors whose first dimension counts samples."""

# An augmentation that acts on half the samples escapes with probability 2^-8.
SAMPLES_READ_TWICE = 8


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
        # torch takes a mapping class it does not know, such as a tokenizer's, for one value.
        self.tensors = dict(tensors) if isinstance(tensors, Mapping) else tensors
        tensors = self.tensors
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
                "data: an IterableDataset has no fixed order; give a list of its batches, or take"
                " the first n of a DataLoader over it by Objective.from_batches"
            )
        self.dataset: Any = dataset
        self.collate = collate
        if not hasattr(dataset, "__len__"):
            raise invalid("data", type(dataset).__name__, "a Dataset with a length")
        if len(self) == 0:
            raise InvalidInput("data: the data set is empty; give at least one sample")
        self._refuse_randomness()

    def __len__(self) -> int:
        return len(self.dataset)

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        order = range(len(self)) if indices is None else indices.tolist()
        for begin, end in _ranges(len(order), size):
            yield self._batch(order[begin:end]), end - begin

    def _batch(self, indices: Sequence[int]) -> Batch:
        batch = self.collate([self.dataset[i] for i in indices])
        return dict(batch) if isinstance(batch, Mapping) else batch

    def _refuse_randomness(self) -> None:
        step = max(1, len(self) // SAMPLES_READ_TWICE)
        with torch.random.fork_rng(devices=[]):
            for i in range(0, len(self), step)[:SAMPLES_READ_TWICE]:
                if not _same(self._batch([i]), self._batch([i])):
                    raise InvalidInput(
                        f"data: reading sample {i} twice gives two values (random augmentation?);"
                        " curvature needs a fixed loss: give the data set without augmentation"
                    )


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
        InvalidInput: empty data, unequal numbers of samples, random augmentation, no order, or a
            sampler that leaves samples out.
    """
    if (
        hasattr(data, "chunks")
        and hasattr(data, "__len__")
        and not isinstance(data, (Tensor, Mapping))
    ):
        return cast("Samples", data)
    if isinstance(data, DataLoader):
        return _from_loader(data)
    if isinstance(data, Dataset):
        return DatasetSamples(data)
    if isinstance(data, Mapping) or (
        isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data)
    ):
        return TensorSamples(data)
    if isinstance(data, Iterable) and not isinstance(data, (Tensor, str, bytes)):
        return _from_batches(list(data))
    raise invalid(
        "data", type(data).__name__, "tensors (inputs, target), a Dataset, or a list of batches"
    )


def _from_loader(loader: DataLoader) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return DatasetSamples(dataset)
    if loader.batch_sampler is None:
        # The data set itself holds batches.
        batches: Any = dataset
        return _from_batches([loader.collate_fn(batches[i]) for i in range(len(batches))])
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    ordinary = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    if not ordinary:
        raise invalid(
            "data",
            f"a DataLoader with {type(sampler).__name__}",
            "a loader that reads its whole data set once",
            "give the data set, a torch.utils.data.Subset, or list(loader)",
        )
    return DatasetSamples(dataset, loader.collate_fn)


def _from_batches(batches: list[Batch]) -> Samples:
    if not batches:
        raise InvalidInput("data: the list of batches is empty; give at least one batch")
    for batch in batches:
        if not isinstance(batch, (tuple, list, Mapping)):
            raise invalid(
                "batch",
                type(batch).__name__,
                "a tuple (inputs, target) or a dict of tensors",
                "tensors of all samples go in as a tuple (inputs, target), not as a list",
            )
    separate = BatchSamples(batches)
    joinable = [_kind(batch.tensors) for batch in separate.batches]
    if None in joinable or any(kind != joinable[0] for kind in joinable):
        return separate
    # Joined, any subset is one indexing operation instead of one for each batch.
    parts = [batch.tensors for batch in separate.batches]
    return TensorSamples(tree_map(lambda *leaves: torch.cat(leaves), *parts))


def _kind(batch: Batch) -> object | None:
    """What batches must have in common to be joined; None where one cannot be."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return tree_structure(batch), [(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves]


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
            return isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
        try:
            return bool(a == b)
        except (ValueError, RuntimeError):
            # Arrays compare element by element.
            return bool((a == b).all())

    return all(map(equal, tree_leaves(first), tree_leaves(second)))


def refuse_unfit_indices(indices: Tensor, num_samples: int) -> None:
    """Raise where indices name no samples.

    Raises:
        InvalidInput: they are not int64 (n,) with n >= 1, or one is not from 0 to N - 1.
    """
    allowed = f"int64 (n,), n >= 1, each from 0 to {num_samples - 1}"
    if indices.dtype != torch.int64 or indices.dim() != 1 or len(indices) == 0:
        raise invalid("samples", f"{indices.dtype} {tuple(indices.shape)}", allowed)
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= num_samples:
        raise invalid("samples", low if low < 0 else high, allowed)
