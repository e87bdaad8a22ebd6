"""torchtitan's trainer, by stand-ins of its interface: watched, and left alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg import Objective, eigenpairs
from thalweg.errors import InvalidInput
from thalweg.integrations.torchtitan import watch_trainer

VOCABULARY, LENGTH = 11, 6


class Loader:
    """A stream of batches that saves and restores where it stands."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.at)
            tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=generator)
            self.at += 1
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Logger:
    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, Any], int]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append((metrics, step))


def trainer(step: int = 0) -> Any:
    """What the interface has of a trainer; its optimizers are a list, as a container gives them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))

    def loss_fn(predicted: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predicted.flatten(0, 1), labels.flatten(0, 1))

    return SimpleNamespace(
        model_parts=[model],
        loss_fn=loss_fn,
        optimizers=[torch.optim.AdamW(model.parameters(), lr=0.01)],
        dataloader=Loader(),
        metrics_processor=SimpleNamespace(logger=Logger()),
        step=step,
    )


def train(one: Any, steps: int) -> Tensor:
    batches = iter(one.dataloader)
    for _ in range(steps):
        one.step += 1
        inputs, labels = next(batches)
        one.optimizers[0].zero_grad()
        one.loss_fn(one.model_parts[0](inputs["input"]), labels).backward()
        one.optimizers[0].step()
    return nn.utils.parameters_to_vector(one.model_parts[0].parameters()).detach()


def test_rows_are_in_the_trainers_charts_and_the_training_is_as_without() -> None:
    alone, watched = trainer(), trainer()
    watcher = watch_trainer(watched, k=2, every=2)
    assert torch.equal(train(alone, 6), train(watched, 6))
    watcher.close()
    rows = watched.metrics_processor.logger.rows
    assert [step for _, step in rows] == [row["step"] for row in watcher.history]
    assert len(rows) >= 3
    last = watcher.history[-1]
    assert rows[-1][0]["thalweg/sharpness"] == last["sharpness"]
    assert last["failure"] is None


def test_the_first_report_is_that_of_the_loaders_first_batch() -> None:
    one = trainer()
    watcher = watch_trainer(one, k=2, every=1)
    inputs, labels = next(iter(Loader()))
    objective = Objective(one.model_parts[0], one.loss_fn, [(inputs["input"], labels)])
    expected = eigenpairs(objective, 2, tolerance=1e-5).eigenvalues.tolist()
    train(one, 1)
    watcher.close()
    assert watcher.history[0]["eigenvalues"] == pytest.approx(expected, rel=1e-3)


def test_a_resumed_trainer_goes_on_at_its_step() -> None:
    one = trainer(step=40)
    watcher = watch_trainer(one, k=2, every=1)
    train(one, 1)
    watcher.close()
    assert watcher.history[0]["step"] in (40, 41)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_parts": [nn.Linear(1, 1)] * 2}, "no pipeline parallel"),
        ({"optimizers": [1, 2]}, "optimizers"),
        ({"dataloader": [1, 2]}, "data=[(tokens, labels), ...]"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], says: str) -> None:
    one = trainer()
    vars(one).update(change)
    with pytest.raises(InvalidInput) as refused:
        watch_trainer(one)
    assert says in str(refused.value)


def test_inputs_with_more_than_tokens_are_refused() -> None:
    one = trainer()
    one.dataloader.__class__ = type("More", (Loader,), {"__iter__": _with_positions})
    with pytest.raises(InvalidInput, match="a dict with 'input' alone"):
        watch_trainer(one)


def _with_positions(self: Loader) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    yield {"input": torch.zeros(1, 2), "positions": torch.zeros(1, 2)}, torch.zeros(1, 2)
