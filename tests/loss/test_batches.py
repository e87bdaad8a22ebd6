"""Data as people have them: right wherever the meaning is plain, else an error that names it."""

from __future__ import annotations

import random
import warnings
from collections import UserDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian

_generator = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=_generator)
Y = torch.randint(0, 3, (12,), generator=_generator)
LOSS = nn.CrossEntropyLoss()
TEXTS = [f"text {i}" for i in range(12)]


class Model(nn.Module):
    """Linear in x, whatever else it gets; texts count by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Any, mask: Any = None, text: Any = None, flag: Any = None) -> Tensor:
        if isinstance(x, (tuple, list)):
            x = x[0] + x[1]
        if text is not None:
            assert type(text[0]) is str
            assert len(text) == len(x)
            x = x * torch.tensor([[float(t.split()[1])] for t in text])
        return self.layer(x)


def numbers(data: Any, loss: Any = LOSS, **options: Any) -> tuple[Tensor, ...]:
    """Value, gradient and a product of each class."""
    objective = Objective(Model(), loss, data, **options)
    assert objective.num_samples == 12
    vector = torch.linspace(-1, 1, 15)
    operators = Hessian(objective), GaussNewton(objective), GradientCovariance(objective)
    few = objective.gradient(samples=torch.tensor([7, 2, 9]))
    return objective.value(), objective.gradient(), few, *(op @ vector for op in operators)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6), (one, other)


Named = namedtuple("Named", "x labels")


class Rows:
    """Like a data set of Hugging Face: rows by number, and none of torch's."""

    def __init__(self, row: Callable[[int], Any], count: int = 12) -> None:
        self.row, self.count = row, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.row(index)

    def __iter__(self) -> Iterator[Any]:
        return (self.row(i) for i in range(self.count))


PLAIN: dict[str, Any] = {
    "None among the inputs": (X, None, Y),
    "None in a dict": {"x": X, "mask": None, "labels": Y},
    "a flag and a word in a dict": {"x": X, "flag": True, "mask": "causal", "labels": Y},
    "nested inputs": ((X - 1, torch.ones(12, 4)), Y),
    "a list inside": ([X - 1, torch.ones(12, 4)], Y),
    "arrays": (X.numpy(), Y.numpy()),
    "arrays in float64": (X.double().numpy(), Y.numpy().astype(np.int32).astype(np.int64)),
    "arrays backwards": (X.flip(0).numpy()[::-1], Y.numpy()),
    "an array and a tensor": (X, Y.numpy()),
    "arrays in a dict": {"x": X.double().numpy(), "labels": Y.numpy()},
    "lists of numbers": {"x": X.tolist(), "labels": Y.tolist()},
    "a UserDict": UserDict({"x": X, "mask": None, "labels": Y}),
    "a named tuple": Named(X, Y),
    "batches of arrays": [(X[:5].numpy(), Y[:5].numpy()), (X[5:].numpy(), Y[5:].numpy())],
    "batches with None": [(X[:5], None, Y[:5]), (X[5:], None, Y[5:])],
    "a tuple of batches": ((X[:5], Y[:5]), (X[5:], Y[5:])),
    "a deque of batches": deque([(X[:5], Y[:5]), (X[5:], Y[5:])]),
    "batches in dicts": [UserDict({"x": X[:5], "labels": Y[:5]}), {"x": X[5:], "labels": Y[5:]}],
    "rows of tensors": Rows(lambda i: {"x": X[i], "labels": Y[i]}),
    "rows of lists": Rows(lambda i: {"x": X[i].tolist(), "labels": int(Y[i])}),
    "rows of arrays": Rows(lambda i: {"x": X[i].numpy(), "labels": Y[i].numpy()}),
    "rows with None": Rows(lambda i: {"x": X[i], "mask": None, "labels": int(Y[i])}),
    "rows that are tuples": Rows(lambda i: (X[i], int(Y[i]))),
    "a loader of arrays": DataLoader(
        TensorDataset(X, Y),
        batch_size=5,
        collate_fn=lambda rows: (np.stack([x.numpy() for x, _ in rows]), [int(y) for _, y in rows]),
    ),
}


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, ...]:
    return numbers((X, Y))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("chunk_size", few(1, [5, None]))
def test_every_class_gives_what_the_plain_tensors_give(
    name: str, chunk_size: int | None, plain: tuple[Tensor, ...]
) -> None:
    assert_same(numbers(PLAIN[name], chunk_size=chunk_size), plain)


TEXT = {
    "in a dict": {"x": X, "text": TEXTS, "labels": Y},
    "in a tuple": (X, None, TEXTS, Y),
    "as an array": {"x": X, "text": np.array(TEXTS), "labels": Y},
    "in batches": [
        {"x": X[a:b], "text": TEXTS[a:b], "labels": Y[a:b]} for a, b in ((0, 5), (5, 12))
    ],
    "in rows": Rows(lambda i: {"x": X[i], "text": TEXTS[i], "labels": int(Y[i])}),
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("chunk_size", few(1, [5, None]))
def test_texts_go_with_their_samples(name: str, chunk_size: int | None) -> None:
    scaled = X * torch.arange(12.0)[:, None]
    assert_same(numbers(TEXT[name], chunk_size=chunk_size), numbers((scaled, Y)))


def test_a_loss_of_ones_own_gets_a_nested_target() -> None:
    nested = (X, (Y, torch.ones(12)))
    found = numbers(nested, lambda o, t: F.cross_entropy(o, t[0]) * t[1].mean())
    assert_same(found, numbers((X, Y)))


@dataclass
class Batch:
    x: Tensor
    labels: Tensor


class Slots:
    __slots__ = ("labels", "x")

    def __init__(self) -> None:
        self.x, self.labels = X, Y


def _ragged(i: int) -> dict[str, Any]:
    return {"x": [1.0] * (i % 3 + 1), "labels": 0}


REFUSED: dict[str, tuple[Any, str]] = {
    "a tuple as a target": ((X, (Y, Y)), r"the target.*a tuple of 2.*a tensor, for CrossEntropy"),
    "a dict as a target": ((X, {"labels": Y}), r"the target.*dict.*CrossEntropyLoss"),
    "no target": ((X, None), r"the target.*NoneType"),
    "a dataclass": ([Batch(X, Y)], r"Batch.*vars\(batch\)"),
    "a dataclass inside": ((Batch(X, Y), Y), r"data\[0\].*Batch with tensors x, labels"),
    "an object with slots": ({"x": Slots(), "labels": Y}, r"data\['x'\].*Slots with tensors"),
    "an entry that the model does not take": (
        {"x": X, "token_type_ids": Y, "labels": Y},
        r"'token_type_ids'.*Model.forward takes: flag, mask, text, x.*remove_columns",
    ),
    "unequal numbers": ({"x": X, "labels": Y[:5]}, r"12 in data\['x'\], 5 in data\['labels'\]"),
    "too few texts": ({"x": X, "text": TEXTS[:5], "labels": Y}, r"5 in data\['text'\]"),
    "a number as a tensor": (
        {"x": X, "flag": torch.tensor(1.0), "labels": Y},
        r"data\['flag'\].*without dimensions.*item",
    ),
    "ragged lists": ({"x": [[1.0, 2.0], [3.0]], "labels": [0, 1]}, r"data\['x'\].*pad them"),
    "ragged rows": (Rows(_ragged), r"row\['x'\].*pad them"),
    "rows with gaps": (
        Rows(lambda i: {"x": X[i], "mask": None if i % 2 else 1.0, "labels": 0}),
        r"row\['mask'\]",
    ),
    "an array of objects": (
        {"x": np.array([[object()] * 2] * 12), "labels": Y},
        r"data\['x'\].*an array of dtype object",
    ),
    "a dict of data sets": (
        {"train": TensorDataset(X, Y), "test": TensorDataset(X, Y)},
        r"data\['train'\]",
    ),
    "a stream of rows": (iter([{"x": 1.0, "labels": 0}]), r"a row with entries 'x', 'labels'"),
    "a list of rows": ([{"x": 1.0, "labels": 0}] * 3, r"a row with entries 'x', 'labels'"),
    "an array alone": (X.numpy(), r"ndarray.*\(inputs, target\)"),
    "a loader whose batches put time first": (
        DataLoader(TensorDataset(X, Y), collate_fn=lambda rows: (torch.ones(4, 9), torch.ones(9))),
        r"data\[0\] of a batch.*first dimension that counts samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_at_once_by_its_name(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message):
        Objective(Model(), LOSS, data)


def test_an_endless_stream_of_rows_is_refused_and_not_read() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        while True:
            yield {"x": 1.0, "labels": 0}

    with pytest.raises(InvalidInput, match="a row with entries"):
        Objective(Model(), LOSS, stream())
    with pytest.raises(InvalidInput, match="a row with entries"):
        Objective.from_batches(Model(), LOSS, stream(), n=3)


def test_rows_of_another_library_count_once_each() -> None:
    ids, labels = torch.randint(0, 6, (8, 5)), torch.randint(0, 3, (8, 5))
    seen: list[tuple[int, ...]] = []

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            seen.append(tuple(input_ids.shape))
            return self.embed(input_ids).transpose(1, 2)

    rows = Rows(lambda i: {"input_ids": ids[i], "labels": labels[i]}, 8)
    model = Tokens()
    objective = Objective(model, LOSS, rows)
    assert objective.num_samples == 8
    assert torch.allclose(objective.value(), LOSS(model(ids), labels))
    assert (8, 5) in seen


class Augmented(Dataset):
    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] * self.draw(), Y[index]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_random_data_are_refused_and_the_generators_left_alone(draw: Any) -> None:
    model = Model()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(InvalidInput, match="random augmentation"):
        Objective(model, LOSS, Augmented(draw))
    # Drawn to no effect: right, and left alone.
    objective = Objective(model, LOSS, Augmented(lambda: float(draw() >= 0)), chunk_size=5)
    assert torch.allclose(objective.value(), LOSS(objective.model(X), Y))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert states == after


@pytest.mark.parametrize("kind", ["torch", "random", "numpy"])
def test_a_collate_function_that_mixes_samples_is_refused(kind: str) -> None:
    def mixup(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        order = {
            "torch": lambda: torch.randperm(len(rows)).tolist(),
            "random": lambda: random.sample(range(len(rows)), len(rows)),
            "numpy": lambda: np.random.permutation(len(rows)).tolist(),
        }[kind]()
        return 0.3 * x + 0.7 * x[order], y

    state = torch.get_rng_state()
    with pytest.raises(InvalidInput, match=r"collate_fn mixes.*mixup"):
        Objective(Model(), LOSS, DataLoader(TensorDataset(X, Y), batch_size=4, collate_fn=mixup))
    assert torch.equal(state, torch.get_rng_state())


def test_the_generator_of_a_loader_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
    state = generator.get_state(), torch.get_rng_state(), random.getstate()
    for objective in (
        Objective(Model(), LOSS, loader),
        Objective.from_batches(Model(), LOSS, loader, n=2),
    ):
        _ = objective.value()
    assert torch.equal(state[0], generator.get_state())
    assert torch.equal(state[1], torch.get_rng_state())
    assert state[2] == random.getstate()

    class Wrapped:
        """A loader that is none of torch's."""

        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))

    _ = Objective(Model(), LOSS, Wrapped()).value()
    assert torch.equal(state[1], torch.get_rng_state())


def test_streams_and_watched_subsets_take_the_same() -> None:
    batches = [(X[:6].double().numpy(), None, Y[:6].numpy()), (X[6:].numpy(), None, Y[6:].numpy())]
    found = Objective.from_batches(Model(), LOSS, iter(batches), n=2)
    assert torch.allclose(found.value(), LOSS(Model()(X), Y))
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = {"x": X.double().numpy(), "mask": None, "labels": Y.numpy()}
    with watch(model, LOSS, data, optimizer, k=1, samples=9, quiet=True) as watcher:
        LOSS(model(X), Y).backward()
        optimizer.step()
    assert watcher.history[0]["sharpness"] > 0


def test_no_warning_is_new() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("arrays", "arrays backwards", "rows of lists", "lists of numbers"):
            numbers(PLAIN[name])
