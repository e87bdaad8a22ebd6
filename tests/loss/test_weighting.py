from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian

CLASSES = 4
WEIGHTS = torch.tensor([0.1, 2.0, 1.0, 5.0], dtype=torch.float64)


def label_data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(17, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, CLASSES, (17,), generator=generator)


def token_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of 6 tokens a sample, with unequal numbers ignored; sample 3 entirely."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9, 6, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (9, 6), generator=generator)
    target[torch.rand(9, 6, generator=generator) < 0.5] = -100
    target[3] = -100
    return inputs, target


class TokenClassifier(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).transpose(1, 2)


def classifier(tokens: bool) -> nn.Module:
    torch.manual_seed(0)
    return (TokenClassifier if tokens else nn.Linear)(3, CLASSES).double()


LOSSES: dict[str, tuple[Callable[..., Any], bool]] = {
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), False),
    "class weights, smoothed": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), False),
    "an ignored class": (nn.CrossEntropyLoss(ignore_index=2), False),
    "ignored tokens": (nn.CrossEntropyLoss(), True),
    "ignored tokens, class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), True),
    "the function": (functional.cross_entropy, True),
    "a partial": (functools.partial(functional.cross_entropy, weight=WEIGHTS), False),
}


@settings(max_examples=8, deadline=None)
@given(chunk_size=st.integers(1, 20))
@pytest.mark.parametrize("name", few(3, LOSSES))
def test_a_loss_that_weighs_targets_is_the_same_for_every_chunk_size(
    name: str, chunk_size: int
) -> None:
    loss, tokens = LOSSES[name]
    data = token_data() if tokens else label_data()
    model = classifier(tokens)
    objective = Objective(model, loss, data, chunk_size=chunk_size, vectorize_up_to=0)
    expected = loss(model(data[0]), data[1])
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    assert torch.allclose(objective.value(), expected.detach(), rtol=1e-12)
    assert torch.allclose(objective.gradient(), objective.layout.flatten(gradient), rtol=1e-9)
    whole = Objective(model, loss, data, chunk_size=None, vectorize_up_to=0)
    vectors = torch.eye(objective.num_parameters, dtype=torch.float64)[:, :3]
    assert torch.allclose(Hessian(objective) @ vectors, Hessian(whole) @ vectors, atol=1e-12)


def test_class_probabilities_weigh_samples_alike() -> None:
    inputs, _ = label_data()
    target = torch.softmax(torch.randn(17, CLASSES, dtype=torch.float64), 1)
    model = classifier(False)
    loss = nn.CrossEntropyLoss()
    expected = loss(model(inputs), target).detach()
    assert torch.allclose(Objective(model, loss, (inputs, target), chunk_size=5).value(), expected)


def test_a_negative_log_likelihood_with_weights_is_known_too() -> None:
    model = nn.Sequential(classifier(False), nn.LogSoftmax(1))
    loss = nn.NLLLoss(weight=WEIGHTS)
    inputs, target = label_data()
    expected = loss(model(inputs), target).detach()
    assert torch.allclose(Objective(model, loss, (inputs, target), chunk_size=5).value(), expected)


def test_the_weights_of_subsets_put_their_means_together() -> None:
    objective = Objective(classifier(True), nn.CrossEntropyLoss(), token_data(), chunk_size=2)
    parts = torch.arange(9).split((2, 7))
    weighed = sum(objective.weight(part) * objective.gradient(samples=part) for part in parts)
    assert torch.allclose(weighed / objective.weight(), objective.gradient(), rtol=1e-10)
    kept = int((token_data()[1] != -100).sum())
    assert objective.weight() == kept


def test_without_unequal_targets_samples_count_alike() -> None:
    objective = Objective(classifier(False), nn.CrossEntropyLoss(), label_data())
    assert objective.weight() == 17
    assert objective.weight(torch.tensor([1, 2])) == 2
    plain = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(5, 2), torch.ones(5, 1)))
    assert (plain.weight(), plain.weight(torch.tensor([0, 4]))) == (5, 2)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_the_users_own_batch_weight_is_believed(chunk_size: int | None) -> None:
    class WithLoss(TokenClassifier):
        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"loss": functional.cross_entropy(super().forward(inputs), labels)}

    torch.manual_seed(0)
    model = WithLoss(3, CLASSES).double()
    inputs, labels = token_data()
    objective = Objective(
        model,
        None,
        {"inputs": inputs, "labels": labels},
        batch_weight=lambda batch: (batch["labels"] != -100).sum(),
        chunk_size=chunk_size,
    )
    expected = model(inputs, labels)["loss"].detach()
    assert torch.allclose(objective.value(), expected, rtol=1e-12)


def test_no_target_left_is_refused() -> None:
    inputs, target = label_data()
    objective = Objective(
        classifier(False), nn.CrossEntropyLoss(), (inputs, torch.full_like(target, -100))
    )
    with pytest.raises(InvalidInput, match="batch_weight"):
        objective.value()


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        functools.partial(functional.mse_loss, reduction="sum"),
    ],
)
def test_a_sum_is_refused(loss: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(InvalidInput, match="reduction='mean'"):
        Objective(classifier(False), loss, label_data())


def test_a_dict_batch_without_a_target_is_refused() -> None:
    inputs, target = label_data()
    with pytest.raises(InvalidInput, match="'labels' or 'target'"):
        Objective(classifier(False), nn.CrossEntropyLoss(), {"input": inputs, "y": target})
