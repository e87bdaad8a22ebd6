"""Two objectives over the parts of a data set, their sums added, give the numbers of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import CASES, Case
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import Reduction
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.tracking.tracker import SubspaceTracker

PARTS = 2


class Waits(BaseException):
    """A part has come to a sum that the others have not brought their part of yet."""


class Replayed(Reduction):
    """Closes the first sums as they are known, and stops at the next with this part's own."""

    def __init__(self, closed: list[Any]) -> None:
        self._closed = iter(closed)
        self.brought: Any = None

    def sum(self, partial: Tensor) -> Tensor:
        return self._close(partial)[0].clone()

    def total(self, partial: float) -> float:
        return self._close(partial)[0]

    def place(self, count: int) -> tuple[int, int]:
        total, parts, part = self._close(count)
        return sum(parts[:part]), total

    def _close(self, brought: Any) -> tuple[Any, list[Any], int]:
        for total in self._closed:
            return total
        self.brought = brought
        raise Waits


def in_parts(case: Case, ask: Callable[[Objective], Any], cut: int, **options: Any) -> list[Any]:
    """What is answered where the first `cut` samples are one part's and the others another's.

    Each part runs anew from its beginning, one sum further each time.
    """
    closed: list[list[Any]] = [[] for _ in range(PARTS)]
    rows = [slice(0, cut), slice(cut, None)]
    while True:
        answers, brought = [], []
        for part in range(PARTS):
            data = tuple(tensor[rows[part]] for tensor in case.data)
            reduction = Replayed(closed[part])
            try:
                loss = Objective(
                    case.model,
                    case.loss,
                    data,
                    reduction=reduction,
                    vectorize_up_to=0,
                    **options,
                )
                answers.append(ask(loss))
            except Waits:
                brought.append(reduction.brought)
        if len(answers) == PARTS:
            return answers
        assert not answers, "one part closes more sums than the other"
        total = sum(brought[1:], start=brought[0])
        for part in range(PARTS):
            closed[part].append((total, brought, part))


def weighted(case: Case) -> Case:
    """With class weights, so that samples count unequally."""
    return Case(
        case.model, nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 3.0]).double()), case.data
    )


def tiny() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    return Case(model, nn.MSELoss(), tuple(torch.randn(11, n, dtype=torch.float64) for n in (2, 1)))


BUILD: dict[str, Callable[[], Case]] = {
    "mean": lambda: CASES["mlp"]().to(torch.float64),
    "weighted": lambda: weighted(CASES["silu"]().to(torch.float64)),
}


def block(size: int) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


ASKED: dict[str, Callable[[Objective, Tensor | None], Tensor]] = {
    "value": lambda loss, samples: loss.value(samples=samples),
    "value_and_gradient": lambda loss, samples: torch.cat(
        [part.reshape(-1) for part in loss.value_and_gradient(samples=samples)]
    ),
    "weight": lambda loss, samples: torch.tensor(loss.weight(samples)),
    "hessian": lambda loss, samples: Hessian(loss, samples=samples) @ block(loss.num_parameters),
    "kept graphs": lambda loss, samples: (
        Hessian(loss, samples=samples, keep_graph=True) @ block(loss.num_parameters)
    ),
    "gradient of an operator": lambda loss, samples: Hessian(loss, samples=samples).gradient,
    "gauss_newton": lambda loss, samples: (
        GaussNewton(loss, samples=samples) @ block(loss.num_parameters)
    ),
    "covariance": lambda loss, samples: (
        GradientCovariance(loss, samples=samples) @ block(loss.num_parameters)
    ),
    "lockstep gradients": lambda loss, samples: torch.cat(
        [
            part.reshape(-1)
            for part in LockstepObjective(loss).values_and_gradients(loss.theta()[None], samples)
        ]
    ),
    "lockstep products": lambda loss, samples: LockstepObjective(loss).hessian_products(
        loss.theta()[None], block(loss.num_parameters).T[None].contiguous(), samples
    ),
}


@pytest.mark.parametrize(
    ("case", "samples"),
    # All, some, and some that the first part holds alone.
    few(1, [("weighted", [9, 1, 4, 8, 2]), ("weighted", None), ("mean", None), ("mean", [0, 2])]),
)
@pytest.mark.parametrize("asked", ASKED)
def test_parts_give_the_numbers_of_the_whole(
    asked: str, case: str, samples: list[int] | None
) -> None:
    built, ask = BUILD[case](), ASKED[asked]
    chosen = None if samples is None else torch.tensor(samples)
    whole = ask(Objective(built.model, built.loss, built.data), chosen)
    for found in in_parts(built, lambda loss: ask(loss, chosen), cut=4, chunk_size=3):
        assert torch.allclose(found, whole, rtol=1e-12, atol=1e-13)


def test_samples_count_through_all_parts() -> None:
    case = BUILD["mean"]()
    assert in_parts(case, lambda loss: loss.num_samples, cut=4) == [11, 11]
    whole = Objective(case.model, case.loss, case.data)
    last = torch.tensor([10])
    found = in_parts(case, lambda loss: float(loss.value(samples=last)), cut=4)
    assert found == pytest.approx([float(whole.value(samples=last))] * PARTS)


def test_trackers_of_the_parts_stay_equal_bit_for_bit() -> None:
    case = tiny()

    def follow(loss: Objective) -> list[Tensor]:
        tracker = SubspaceTracker(loss, k=2, seed=1)
        theta = loss.theta()
        return [tracker.update(theta * (1 + 0.01 * step)).basis for step in range(2)]

    first, second = in_parts(case, follow, cut=5)
    whole = follow(Objective(case.model, case.loss, case.data))
    for one, other, basis in zip(first, second, whole, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one @ (one.T @ basis), basis, atol=1e-6)


def test_each_runs_own_samples_cannot_be_divided() -> None:
    case = BUILD["mean"]()

    def ask(loss: Objective) -> str:
        own = torch.zeros(1, 2, dtype=torch.int64)
        with pytest.raises(InvalidInput, match="divided among processes") as caught:
            LockstepObjective(loss).values_and_gradients(loss.theta()[None], own)
        return str(caught.value)

    assert len(in_parts(case, ask, cut=4)) == PARTS
