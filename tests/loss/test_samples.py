from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.loss.samples import as_samples

INPUTS = torch.arange(33.0).reshape(11, 3).sin()
TARGETS = torch.arange(22.0).reshape(11, 2).cos()


class Pairs(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index], TARGETS[index]


def batches(sizes: tuple[int, ...] = (4, 4, 3)) -> list[tuple[Tensor, Tensor]]:
    return list(zip(INPUTS.split(sizes), TARGETS.split(sizes), strict=True))


KINDS: dict[str, Any] = {
    "a tuple of tensors": (INPUTS, TARGETS),
    "a Dataset": Pairs(),
    "a TensorDataset": TensorDataset(INPUTS, TARGETS),
    "a DataLoader that shuffles": DataLoader(Pairs(), batch_size=4, shuffle=True),
    "a DataLoader of batches": DataLoader(
        [(INPUTS[:6], TARGETS[:6]), (INPUTS[6:], TARGETS[6:])],  # type: ignore[arg-type]
        batch_size=None,
    ),
    "a list of tuples": batches(),
    "a list of lists": [list(batch) for batch in batches()],
    "a generator of tuples": "generator",
}


def gradient(data: Any, chunk_size: int | None = None, samples: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = iter(batches()) if isinstance(data, str) else data
    return Objective(model, nn.MSELoss(), data, chunk_size=chunk_size).gradient(samples=samples)


@settings(max_examples=8, deadline=None)
@given(chunk_size=st.integers(1, 12))
@pytest.mark.parametrize("kind", few(3, KINDS))
def test_every_kind_of_data_gives_the_same_gradient_in_chunks_of_any_size(
    kind: str, chunk_size: int
) -> None:
    expected = gradient((INPUTS, TARGETS))
    assert torch.allclose(gradient(KINDS[kind], chunk_size), expected, atol=1e-6)
    some = torch.tensor([9, 1, 4, 10])
    expected = gradient((INPUTS[some], TARGETS[some]))
    assert torch.allclose(gradient(KINDS[kind], chunk_size, some), expected, atol=1e-6)


def test_dict_batches_go_to_the_model_as_keywords() -> None:
    class Named(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(inputs)

    torch.manual_seed(0)
    model = Named(3, 2)
    expected = Objective(model, nn.MSELoss(), (INPUTS, TARGETS)).gradient()
    named = {"inputs": INPUTS, "target": TARGETS}
    listed = [{"inputs": x, "target": y} for x, y in batches()]
    for data in (named, UserDict(named), listed, [UserDict(batch) for batch in listed]):
        found = Objective(model, nn.MSELoss(), data, chunk_size=3).gradient()
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_loss_of_ones_own_gets_the_output_and_the_dict_batch() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor, scale: Tensor) -> Tensor:
            return inputs[:, 0] + self.by

    data = {"inputs": INPUTS, "scale": torch.full((11,), 3.0)}
    objective = Objective(Shift(), lambda output, batch: (batch["scale"] * output).mean(), data)
    assert torch.allclose(objective.gradient(), torch.tensor([3.0]))


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_ragged_batches_count_every_sample_once(chunk_size: int | None) -> None:
    class Pooled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mean(1)

    torch.manual_seed(0)
    model = Pooled(3, 2)
    ragged = [(torch.randn(n, length, 3), torch.randn(n, 2)) for n, length in ((3, 2), (4, 5))]
    objective = Objective(model, nn.MSELoss(), ragged, chunk_size=chunk_size)
    losses = [nn.functional.mse_loss(model(x[i]), y[i]) for x, y in ragged for i in _each(x)]
    assert torch.allclose(objective.value(), torch.stack(losses).mean(), rtol=1e-5)
    some = torch.tensor([6, 0, 2, 4])
    chosen = torch.stack([losses[i] for i in some.tolist()]).mean()
    assert torch.allclose(objective.value(samples=some), chosen, rtol=1e-5)


def _each(inputs: Tensor) -> list[slice]:
    return [slice(i, i + 1) for i in range(len(inputs))]


def test_batches_with_other_keys_or_extra_values_are_kept_apart() -> None:
    samples = as_samples([{"x": torch.zeros(2, 1)}, {"y": torch.zeros(3, 1)}])
    assert len(samples) == 5
    assert [sorted(batch) for batch, _ in samples.chunks(None, None)] == [["x"], ["y"]]
    marked = as_samples([{"x": torch.zeros(2, 1), "kind": "a"}, {"x": torch.ones(1, 1)}])
    assert [count for _, count in marked.chunks(None, None)] == [2, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 3), torch.zeros(0, 2)), "no sample"),
        ([], "the list of batches is empty"),
        (TensorDataset(torch.zeros(0, 1)), "the data set is empty"),
        ((torch.zeros(3, 1), torch.zeros(4, 1)), r"\[3, 4\] samples"),
        ((torch.zeros(3, 1), torch.zeros(())), "without dimensions"),
        ([torch.zeros(3, 1), torch.zeros(3, 2)], "as a tuple"),
        (torch.zeros(3, 1), "Tensor.*a Dataset"),
        ("digits", "str.*a Dataset"),
        (np.zeros((3, 1)), r"ndarray.*\(inputs, target\)"),
        (7, "int.*a Dataset"),
    ],
)
def test_data_that_cannot_serve_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        as_samples(data)


def test_an_iterable_dataset_is_refused_also_in_a_loader() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield INPUTS[0], TARGETS[0]

    for data in (Stream(), DataLoader(Stream())):
        with pytest.raises(InvalidInput, match="no fixed order"):
            as_samples(data)


@pytest.mark.parametrize("numpy", [False, True])
def test_random_augmentation_is_refused(numpy: bool) -> None:
    class Augmented(Pairs):
        generator = np.random.default_rng(0)

        def __getitem__(self, index: int) -> Any:
            # Flips half the time, so that a single sample often looks fixed.
            flip = self.generator.random() < 0.5 if numpy else torch.rand(()) < 0.5
            inputs = INPUTS[index].flip(0) if flip else INPUTS[index]
            return (inputs.numpy() if numpy else inputs), TARGETS[index]

    before = torch.get_rng_state()
    with pytest.raises(InvalidInput, match="random augmentation"):
        as_samples(Augmented())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_collate_function_is_refused() -> None:
    def mask(items: list) -> tuple[Tensor, Tensor]:
        inputs = torch.stack([x for x, _ in items])
        return inputs + torch.randn_like(inputs), torch.stack([y for _, y in items])

    with pytest.raises(InvalidInput, match="random augmentation"):
        as_samples(DataLoader(Pairs(), collate_fn=mask))


def test_a_sampler_that_leaves_samples_out_is_refused() -> None:
    samplers = [
        SubsetRandomSampler([0, 1]),
        WeightedRandomSampler([1.0] * 11, 11),
    ]
    for sampler in samplers:
        with pytest.raises(InvalidInput, match=type(sampler).__name__):
            as_samples(DataLoader(Pairs(), sampler=sampler))
    assert len(as_samples(DataLoader(Subset(Pairs(), [0, 1]), shuffle=True))) == 2


def test_a_dataset_with_nan_inputs_is_not_taken_for_a_random_one() -> None:
    assert len(as_samples(TensorDataset(torch.full((3, 1), float("nan"))))) == 3
