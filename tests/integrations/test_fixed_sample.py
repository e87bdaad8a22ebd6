from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from thalweg.errors import InvalidInput
from thalweg.integrations.fixed_sample import fixed_sample


def test_it_is_drawn_once_collated_as_the_loader_does_and_moves_no_generator() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"number": number, "noise": torch.rand(1)}

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([item["number"] for item in items])
        return {"numbers": numbers, "noise": torch.stack([item["noise"] for item in items])}

    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, collate_fn=collate)
    state = torch.get_rng_state()
    batches = fixed_sample(loader, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch["numbers"]) for batch in batches] == [4, 4, 2]
    drawn = torch.cat([batch["numbers"] for batch in batches]).tolist()
    assert len(set(drawn)) == 10
    again = fixed_sample(loader, 10, seed=3)
    assert torch.equal(again[0]["numbers"], batches[0]["numbers"])
    assert torch.cat([b["numbers"] for b in fixed_sample(loader, 10, seed=4)]).tolist() != drawn
    # More than there are is all.
    assert sum(len(batch["numbers"]) for batch in fixed_sample(loader, 99, seed=0)) == 30


def test_streams_and_nothing_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(range(3))

    for loader in (DataLoader(Stream()), None):
        with pytest.raises(InvalidInput, match=r"a data set with a length.*data="):
            fixed_sample(loader, 4, seed=0)
    with pytest.raises(InvalidInput, match="one for each process"):
        fixed_sample(DataLoader(TensorDataset(torch.ones(3))), 0, seed=0)
