"""A fixed sample of a trainer's own training set, collated as the trainer does.

Example:
    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(100.0)), batch_size=4, shuffle=True)
    >>> batches = fixed_sample(loader, 6, seed=0)
    >>> [len(batch[0]) for batch in batches]
    [4, 2]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from thalweg.errors import invalid
from thalweg.measure.watcher import undisturbed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CPU = torch.device("cpu")


def fixed_sample(
    loader: Any,
    samples: int,
    seed: int,
    device: torch.device = CPU,
    group: ProcessGroup | None = None,
    prepare: Callable[[Any], Any] = lambda batch: batch,
) -> list[Any]:
    """So many samples of a loader's data set, drawn once, as batches of the loader's size.

    The loader itself is not iterated, and no generator is moved.

    Args:
        loader: a `DataLoader`, or what accelerate and Lightning make of one.
        samples: how many, over all processes; at most those there are.
        seed: of the draw.
        device: where the batches go.
        group: the processes that divide the sample among them; None for this one alone.
        prepare: what the trainer does to a batch before the loss gets it.

    Raises:
        InvalidInput: a stream, which has no samples to draw; a part without a sample.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        given = type(dataset if dataset is not None else loader).__name__
        hint = "give batches of your own: data=[batch, ...]"
        raise invalid("training data", given, "a data set with a length", hint)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator, device="cpu")[:samples]
    rank = 0 if group is None else dist.get_rank(group)
    processes = 1 if group is None else dist.get_world_size(group)
    own = order[rank::processes].sort().values.tolist()
    if not own:
        raise invalid("samples", samples, f"an integer >= {processes}, one for each process")
    size = getattr(loader, "batch_size", None) or len(own)
    with undisturbed(device):
        parts = [own[begin : begin + size] for begin in range(0, len(own), size)]
        batches = [
            prepare(loader.collate_fn([dataset[number] for number in part])) for part in parts
        ]
    return [tree_map(lambda leaf: _moved(leaf, device), _plain(batch)) for batch in batches]


def _plain(batch: Any) -> Any:
    """A mapping of a library's own class, such as `BatchEncoding`, as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
