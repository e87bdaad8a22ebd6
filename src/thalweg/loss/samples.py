"""The data of an objective: a fixed, ordered set of samples that can be read in chunks.

A loss over data is a function of the parameters alone only if the data is the same at every call.
So whatever the user has (tensors, a `Dataset`, a `DataLoader`, batches) becomes `Samples`: a number
of samples, and batches of any subset of them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from thalweg.loss.batches import PerSample, collate_rows, mapped_leaves, plain, refuse_rows, sizes
from thalweg.loss.guards.generators import States, generators_kept

Batch = Any
"""A tuple (inputs..., target) or a dict of tensors whose first dimension counts samples.

What else it may hold: see `batches.py`.
"""

# An augmentation that acts on half the samples escapes with probability 2^-8.
SAMPLES_READ_TWICE = 8
# A random order of four is the same twice with probability 1/24: seen where numbers are drawn.
SAMPLES_MIXED, LOOKS_AT_DRAWN = 4, 8
CPU = torch.device("cpu")


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
    """Samples held as a tuple, list or dict of tensors with a common first dimension.

    Args:
        tensors: a batch of all samples, see `batches.py`.
        like: a parameter, see `plain`.
    """

    def __init__(self, tensors: Batch, like: Tensor | None = None) -> None:
        self.tensors = plain(tensors, like=like)
        found = sizes(self.tensors)
        if len(set(found.values())) != 1:
            each = ", ".join(f"{size} in {place}" for place, size in found.items())
            counts = sorted(set(found.values()))
            given = f"tensors of {counts} samples" + (f" ({each})" if each else "")
            hint = "" if found else _hint_without_tensors(tensors)
            raise invalid("data", given, "one number of samples", hint)
        self._size = next(iter(found.values()))
        if self._size == 0:
            raise InvalidInput("data: it holds no sample; give at least one")

    def __len__(self) -> int:
        return self._size

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        total = self._size if indices is None else len(indices)
        for begin, end in _ranges(total, size):
            chosen = slice(begin, end) if indices is None else indices[begin:end]
            yield tree_map(_select(chosen), self.tensors), end - begin


def _hint_without_tensors(data: Any) -> str:
    """What helps where there is no tensor in what is to be a batch."""
    kinds = {type(part).__name__ for part in data.values()} if isinstance(data, Mapping) else set()
    if any("Dataset" in kind for kind in kinds):
        return f"give one of them: data[{next(iter(data))!r}]"
    return "give tensors, arrays, or a Dataset"


class DatasetSamples:
    """Samples read from a map-style data set when they are needed.

    Args:
        dataset: has a length and gives a row for an index.
        collate: makes a batch of a list of rows.
        like: a parameter, see `plain`.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], Batch] = default_collate,
        like: Tensor | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise InvalidInput(
                "data: an IterableDataset has no fixed order; give a list of its batches, or take"
                " the first n of a DataLoader over it by Objective.from_batches"
            )
        self.dataset: Any = dataset
        self.collate = collate
        self._like = like
        # Whether reading draws random numbers, to no effect.
        self._draws = False
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
            with generators_kept(CPU) if self._draws else nullcontext():
                batch = self._batch(order[begin:end])
            yield batch, end - begin

    def _batch(self, indices: Sequence[int]) -> Batch:
        batch = plain(self.collate([self.dataset[i] for i in indices]), like=self._like)
        found = sizes(batch)
        if set(found.values()) - {len(indices)}:
            place, size = next((p, s) for p, s in found.items() if s != len(indices))
            raise invalid(
                f"data: {place} of a batch",
                f"{size} for {len(indices)} samples",
                "a first dimension that counts samples",
                "let collate_fn put samples first, or give the data set's batches as a list",
            )
        return batch

    def _refuse_randomness(self) -> None:
        step = max(1, len(self) // SAMPLES_READ_TWICE)
        looked_at = range(0, len(self), step)[:SAMPLES_READ_TWICE]
        with generators_kept(CPU):
            states = States(CPU)
            for i in looked_at:
                if not _same(self._batch([i]), self._batch([i])):
                    raise InvalidInput(
                        f"data: reading sample {i} twice gives two values (random augmentation?);"
                        " curvature needs a fixed loss: give the data set without augmentation"
                    )
            # One sample mixed with itself is the same.
            together = looked_at[:SAMPLES_MIXED]
            first = self._batch(together)
            self._draws = bool(states.moved())
            for _ in range(LOOKS_AT_DRAWN if self._draws else 1):
                if not _same(first, self._batch(together)):
                    raise InvalidInput(
                        f"data: the same {len(together)} samples twice give two batches: collate_fn"
                        " mixes or changes them at random (mixup?); curvature needs a fixed loss:"
                        " give a collate_fn that does not"
                    )


class BatchSamples:
    """Samples in batches that cannot be joined, such as texts padded to different lengths.

    Args:
        batches: see `batches.py`.
        like: a parameter, see `plain`.
    """

    def __init__(self, batches: Sequence[Batch], like: Tensor | None = None) -> None:
        self.batches = [TensorSamples(batch, like) for batch in batches]
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


class WholeBatches:
    """Batches that are never cut: each is a sample of its own, evaluated by itself.

    For a loss that is one of a batch as a whole, as with batch norm in training mode.

    Args:
        batches: see `batches.py`.
        like: a parameter, see `plain`.
    """

    def __init__(self, batches: Sequence[Batch], like: Tensor | None = None) -> None:
        self.batches = [TensorSamples(batch, like).tensors for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        for i in range(len(self)) if indices is None else indices.tolist():
            yield self.batches[i], 1


def are_whole(samples: Samples) -> bool:
    """Whether each sample is a batch that is never cut, also in another dtype."""
    return isinstance(getattr(samples, "samples", samples), WholeBatches)


def read_order(samples: Samples, indices: Tensor | None) -> Sequence[int]:
    """The numbers of samples in the order in which `chunks` gives them."""
    if indices is None:
        return range(len(samples))
    inside, indices = getattr(samples, "samples", samples), indices.cpu()
    if isinstance(inside, BatchSamples):
        # Batch by batch, and inside of one as they were asked for.
        starts = torch.tensor(inside.starts[1:-1], dtype=torch.int64, device="cpu")
        batch = torch.bucketize(indices, starts, right=True)
        indices = indices[torch.argsort(batch, stable=True)]
    return indices.tolist()


def as_samples(data: object, like: Tensor | None = None, *, whole: bool = False) -> Samples:
    """Turn what the user has into `Samples`.

    Args:
        data: a tuple `(inputs..., target)` or dict of tensors, see `batches.py`; a map-style
            `Dataset`, or another library's with rows by number and a length; a `DataLoader` (its
            data set is read in order, so shuffling does not matter); or an iterable of batches,
            such as a list. Generators of random numbers are left as they were.
        like: a parameter of the model: numbers that are no tensors (NumPy's) get its dtype and
            device.
        whole: batches that were given as such are not cut, each is a sample: `WholeBatches`.

    Raises:
        InvalidInput: empty data, unequal numbers of samples, random augmentation, no order, or a
            sampler that leaves samples out; what cannot be read by samples. It names the entry.
    """
    if callable(getattr(data, "chunks", None)) and hasattr(data, "__len__"):
        return cast("Samples", data)
    if isinstance(data, DataLoader):
        return _from_loader(data, like)
    if isinstance(data, Dataset):
        return DatasetSamples(data, like=like)
    if isinstance(data, Mapping) or (isinstance(data, tuple) and any(map(_is_numbers, data))):
        return TensorSamples(data, like)
    rows = all(hasattr(data, name) for name in ("__len__", "__getitem__"))
    if rows and not isinstance(data, (Sequence, Tensor)) and not _is_numbers(data):
        return DatasetSamples(data, collate_rows, like)
    if isinstance(data, Iterable) and not isinstance(data, (Tensor, str, bytes)):
        if _is_numbers(data):
            hint = "give a tuple (inputs, target)"
            raise invalid("data", type(data).__name__, "inputs and targets", hint)
        with generators_kept(CPU):
            return _from_batches(_all_of(data), like, whole)
    raise invalid(
        "data", type(data).__name__, "tensors (inputs, target), a Dataset, or a list of batches"
    )


def _is_numbers(part: Any) -> bool:
    """Whether it is a tensor, or an array of another library."""
    return isinstance(part, Tensor) or hasattr(part, "__array__")


def _all_of(batches: Iterable[Any]) -> list[Any]:
    """Every batch; what the first is, is looked at before more are asked for."""
    stream = iter(batches)
    for first in stream:
        refuse_rows(first)
        return [first, *stream]
    return []


def _from_loader(loader: DataLoader, like: Tensor | None) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return DatasetSamples(dataset)
    if loader.batch_sampler is None:
        # The data set itself holds batches.
        batches: Any = dataset
        read = [loader.collate_fn(batches[i]) for i in range(len(batches))]
        return _from_batches(read, like)
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
    return DatasetSamples(dataset, loader.collate_fn, like)


def generators_of(batches: object) -> list[torch.Generator]:
    """The generators that a `DataLoader` was given, by itself or in its samplers."""
    if not isinstance(batches, DataLoader):
        return []
    samplers = batches.sampler, getattr(batches.batch_sampler, "sampler", None)
    owners = (batches, *samplers, batches.batch_sampler)
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _from_batches(batches: list[Batch], like: Tensor | None, whole: bool = False) -> Samples:
    if not batches:
        raise InvalidInput("data: the list of batches is empty; give at least one batch")
    for batch in batches:
        if not isinstance(batch, (tuple, list, Mapping)):
            tensor = _is_numbers(batch)
            hint = "tensors of all samples go in as a tuple (inputs, target), not as a list"
            raise invalid(
                "batch",
                type(batch).__name__,
                "a tuple (inputs, target) or a dict of tensors",
                hint if tensor else "give a dict of its tensors, such as vars(batch)",
            )
    if whole:
        return WholeBatches(batches, like)
    separate = BatchSamples(batches, like)
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
    def tensor(leaf: Tensor) -> Tensor:
        if leaf.requires_grad and leaf.is_leaf:
            # So is a part of it: something to differentiate by, such as coordinates.
            return tensor(leaf.detach()).requires_grad_()
        return leaf[chosen if isinstance(chosen, slice) else chosen.to(leaf.device)]

    def values(leaf: PerSample) -> PerSample:
        if isinstance(chosen, slice):
            return PerSample(leaf[chosen])
        return PerSample(leaf[i] for i in chosen.tolist())

    return mapped_leaves(tensor, values)


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
