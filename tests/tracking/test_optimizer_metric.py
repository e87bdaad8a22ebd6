from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tests import dense
from tests.networks import Case, descend, digits, silu
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.lab.store.packing import pack_state, unpack_state
from thalweg.loss.objective import Objective
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum import gap
from thalweg.tracking import optimizer_metric
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.preconditioner import preconditioner

K = 3


@pytest.fixture(autouse=True)
def _closed_gaps_are_of_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "CLOSED", math.inf)


class Training:
    """Full-batch steps of a small network in float64, split in the metric of the optimizer."""

    def __init__(
        self,
        kind: type[Optimizer] = Adam,
        *,
        parts: tuple[float, float] = (0.0, 1.0),
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.case: Case = silu().to(torch.float64)
        self.objective = Objective(
            self.case.model, self.case.loss, self.case.data, vectorize_up_to=0
        )
        self.base = kind(self.case.model.parameters(), **{"lr": 0.01} | (settings or {}))  # type: ignore[call-arg]
        options = {"exact": True, "tolerance": 1e-7} | options
        self.source = OptimizerMetricSource(self.objective, K, self.base, **options)
        self.optimizer = SplitUpdate(self.base, self.source, *parts)

    def step(self) -> Tensor:
        """One step; theta before it."""
        theta = self.objective.theta()
        self.optimizer.zero_grad()
        self.case.loss(self.case.model(self.case.data[0]), self.case.data[1]).backward()
        self.optimizer.step()
        return theta

    def dominant_by_hand(self, theta: Tensor, shift: float = 0.0) -> Tensor:
        """The dominant part of the proposed update, by the generalized eigenvectors."""
        diagonal = preconditioner(self.base)
        hessian = dense.hessian(dense.flat_loss(self.case), theta) + shift * torch.eye(len(theta))
        # H v = lambda D v with v^T D v = 1: then W = D^1/2 v.
        _, vectors = scipy.linalg.eigh(hessian.numpy(), torch.diag(diagonal).numpy())
        top = torch.from_numpy(vectors[:, -K:].copy())
        assert self.optimizer.proposed is not None
        return top @ (top.T @ (diagonal * self.optimizer.proposed))


@pytest.mark.parametrize(
    ("kind", "settings", "shift"),
    few(
        2,
        [
            (Adam, {}, 0.0),
            (Adam, {"weight_decay": 0.3}, 0.3),
            (AdamW, {"weight_decay": 0.3}, 0.0),
            (RMSprop, {"momentum": 0.5}, 0.0),
        ],
    ),
)
def test_the_split_is_that_of_the_generalized_eigenvectors_at_every_step(
    kind: type[Optimizer], settings: dict[str, Any], shift: float
) -> None:
    training = Training(kind, settings=settings)
    for _ in range(3):
        theta = training.step()
        split, proposed = training.optimizer.split, training.optimizer.proposed
        assert split is not None
        assert proposed is not None
        expected = training.dominant_by_hand(theta, shift)
        torch.testing.assert_close(split.dominant, expected, rtol=0, atol=1e-5 * proposed.norm())
        # Not the Euclidean one: the parts are orthogonal in the metric D alone.
        torch.testing.assert_close(split.dominant + split.bulk, proposed)
        scaled = preconditioner(training.base) * split.bulk
        sizes = float((split.dominant @ (preconditioner(training.base) * split.dominant)).sqrt())
        sizes *= float((split.bulk @ scaled).sqrt())
        assert abs(float(split.dominant @ scaled)) < 1e-9 * sizes
        assert abs(float(split.dominant @ split.bulk)) > 1e-3 * float(
            split.dominant.norm() * split.bulk.norm()
        )
        torch.testing.assert_close(training.objective.theta(), theta + split.bulk)


def followed_and_solved(kind: type[Optimizer], begin: int, steps: int) -> Iterator[Any]:
    """Of each step after `begin` steps: error, its estimate, and the cost of both."""
    case = digits(warm_up=100)
    objective = Objective(case.model, case.loss, case.data, vectorize_up_to=0)
    optimizer = kind(case.model.parameters(), lr=1e-3)  # type: ignore[call-arg]
    for step in range(begin):
        descend(case, optimizer, step)
    sources = [OptimizerMetricSource(objective, 10, optimizer, exact=e) for e in (True, False)]
    for step in range(begin, begin + steps):
        theta = objective.theta()
        descend(case, optimizer, step)
        update = objective.theta() - theta
        for source in sources:
            source.update(theta, update)
        solved, followed = (source.split(update) for source in sources)
        root = preconditioner(optimizer).sqrt()
        error = (root * (solved.dominant - followed.dominant)).norm() / (root * update).norm()
        yield float(error), followed.error, *(source.report.subspace_cost for source in sources)


@pytest.mark.parametrize("kind", few(1, [Adam, RMSprop]))
def test_in_steady_training_it_is_followed_cheaply_with_the_error_estimated(
    kind: type[Optimizer],
) -> None:
    rows = list(followed_and_solved(kind, begin=100, steps=5))
    for error, estimate, solving, following in rows[1:]:
        assert error < 0.01
        assert estimate / 4 < error < 4 * estimate
        assert following < solving / 10


@pytest.mark.slow
def test_while_the_metric_of_adam_takes_shape_it_is_not_trusted() -> None:
    rows = list(followed_and_solved(Adam, begin=6, steps=6))
    assert max(error for error, *_ in rows) < 0.03


def test_between_updates_that_are_due_metric_and_subspace_stay() -> None:
    training = Training(every=3)
    seen = []
    for _ in range(7):
        training.step()
        metric = training.source.metric
        seen.append((metric.diagonal.clone(), training.source.report))
    changed = [n for n in range(7) if n == 0 or not torch.equal(seen[n][0], seen[n - 1][0])]
    assert changed == [0, 3, 6]
    assert [report.age for _, report in seen] == [0, 1, 2, 0, 1, 2, 0]
    assert [report.subspace_cost > 0 for _, report in seen] == [r.renewed for _, r in seen]


def test_a_frozen_one_keeps_metric_and_subspace_of_the_first_update() -> None:
    training = Training(frozen=True)
    theta = training.step()
    metric = training.source.metric
    expected = training.dominant_by_hand(theta)
    assert training.optimizer.split is not None
    torch.testing.assert_close(training.optimizer.split.dominant, expected, rtol=0, atol=1e-6)
    for _ in range(3):
        training.step()
        assert torch.equal(training.source.metric.diagonal, metric.diagonal)
        assert torch.equal(training.source.subspace.basis, metric.scaled.basis)
        assert training.source.report.subspace_cost == 0
        proposed, split = training.optimizer.proposed, training.optimizer.split
        assert proposed is not None
        assert split is not None
        torch.testing.assert_close(split.dominant, metric.split_update(proposed)[0])


# From scratch Adam's metric drifts: the tracker begins anew, or follows where that is allowed.
@pytest.mark.parametrize("drift", [optimizer_metric.DRIFT, math.inf])
@pytest.mark.parametrize(
    "options", few(2, [{"every": 3}, {"frozen": True}, {"bulk_error": 1e-6}, {"error": 0.5}])
)
@pytest.mark.parametrize("after", few(1, [4, 0]))
def test_a_restored_one_goes_on_bit_for_bit(
    options: dict[str, Any], after: int, drift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_metric, "DRIFT", drift)
    first, second = (Training(exact=False, tolerance=1e-3, **options) for _ in range(2))
    for _ in range(after):
        first.step()
    second.case.model.load_state_dict(first.case.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    # As a checkpoint stores it, which keeps no strides.
    tensors, state = pack_state(first.source.state_dict())
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    second.source.load_state_dict(unpack_state(copies, state))
    assert str(second.source.report) == str(first.source.report)
    for _ in range(3):
        first.step()
        second.step()
        assert torch.equal(first.objective.theta(), second.objective.theta())
        assert first.source.report == second.source.report


def test_optimizers_that_wrap_are_looked_into() -> None:
    training = Training()
    source = OptimizerMetricSource(training.objective, K, SAM(training.base))
    assert source.optimizer is training.base


def test_what_cannot_be_used_is_refused() -> None:
    training = Training()
    objective, parameters = training.objective, list(training.case.model.parameters())
    with pytest.raises(InvalidInput, match="optimizer: got 'SGD', allowed: Adam, AdamW or RMSprop"):
        OptimizerMetricSource(objective, K, SGD(parameters, lr=0.1))
    for options, message in (
        ({"k": 0}, "k: got 0, allowed: an integer from 1 to P = 74"),
        ({"k": 75}, "k: got 75"),
        ({"error": 0.0}, "error: got 0.0"),
        ({"every": 0}, "every: got 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            OptimizerMetricSource(
                **{"objective": objective, "k": K, "optimizer": training.base} | options
            )
    with pytest.raises(InvalidInput, match=r"call update\(\) first"):
        _ = training.source.subspace
    with pytest.raises(InvalidInput, match="no second moment of it yet"):
        training.source.update()
