from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from thalweg.errors import InvalidInput
from thalweg.optim.stability import sam_threshold, stability_threshold

# Gradients stay far below it, so that D is this number at every step.
EPS = 0.25

CASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "gradient descent": (SGD, {}),
    "weight decay": (SGD, {"weight_decay": 3.0}),
    "momentum": (SGD, {"momentum": 0.9}),
    "small momentum": (SGD, {"momentum": 0.3, "weight_decay": 3.0}),
    "dampening": (SGD, {"momentum": 0.8, "dampening": 0.4, "weight_decay": 3.0}),
    "dampening without momentum": (SGD, {"dampening": 0.4}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "nesterov, weight decay": (SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 3.0}),
    "adam": (Adam, {"eps": EPS}),
    "adam, amsgrad": (Adam, {"eps": EPS, "amsgrad": True, "betas": (0.5, 0.9)}),
    "adam, coupled decay": (Adam, {"eps": EPS, "weight_decay": 5.0}),
    "adam, beta1 = 0": (Adam, {"eps": EPS, "betas": (0.0, 0.99)}),
    "adamw": (AdamW, {"eps": EPS, "weight_decay": 4.0}),
    "rmsprop": (RMSprop, {"eps": EPS}),
    "rmsprop, all settings": (
        RMSprop,
        {"eps": EPS, "momentum": 0.7, "centered": True, "weight_decay": 5.0},
    ),
}


def optimizers() -> Any:
    return pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)


def grows(kind: type[Optimizer], options: dict[str, Any], hessian: Tensor) -> bool:
    """Whether theta^T H theta / 2 diverges from near its minimum."""
    theta = nn.Parameter(torch.zeros(len(hessian), dtype=torch.float64))
    optimizer = kind([theta], **{"lr": 0.1} | options)  # type: ignore[call-arg]
    size = start = 1e-20
    for step in range(600):
        # Steps at the minimum let Adam's correction of its first moment come to an end.
        if step == 200:
            theta.data.fill_(start)
        theta.grad = hessian @ theta.detach()
        optimizer.step()
        size = float(theta.detach().norm())
        if size > 1e2 * start:
            return True
    assert size < start
    return False


@optimizers()
def test_training_is_stable_just_below_the_threshold_and_unstable_just_above(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    threshold = stability_threshold(kind([nn.Parameter(torch.zeros(1))], **{"lr": 0.1} | options))  # type: ignore[call-arg]
    assert threshold.value is not None
    assert threshold.preconditioned == ("eps" in options)
    for factor, unstable in ((0.99, False), (1.01, True)):
        limit = factor * threshold.value
        sharpness = limit * EPS - threshold.shift if threshold.preconditioned else limit
        hessian = torch.tensor([[sharpness]], dtype=torch.float64)
        assert grows(kind, options, hessian) == unstable


@optimizers()
def test_of_groups_that_differ_the_smallest_threshold_is_safe(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    parts = [nn.Parameter(torch.full((1,), 1e-20, dtype=torch.float64)) for _ in range(2)]
    decay = options.get("weight_decay", 0.0)
    optimizer = kind(
        [  # type: ignore[call-arg]
            {"params": parts[:1], "lr": 0.1, "weight_decay": decay},
            {"params": parts[1:], "lr": 0.03, "weight_decay": 2 * decay},
        ],
        **options,
    )
    threshold = stability_threshold(optimizer)
    both = [stability_threshold(optimizer, [part]).value or 0.0 for part in parts]
    assert threshold.value == min(both)
    assert "smallest" in threshold.note
    limit = 0.99 * min(both)
    sharpness = limit * EPS - threshold.shift if threshold.preconditioned else limit
    # Its top eigenvector has a part in both groups.
    direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
    hessian = sharpness * (0.7 * torch.outer(direction, direction) + 0.3 * torch.eye(2))
    for _ in range(600):
        theta = torch.cat([part.detach() for part in parts])
        for part, gradient in zip(parts, hessian @ theta, strict=True):
            part.grad = gradient.reshape(1)
        optimizer.step()
    assert float(torch.cat([part.detach() for part in parts]).norm()) < 1e-20


def test_known_values() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    values = {
        SGD(parameters, lr=0.05): 40.0,
        SGD(parameters, lr=0.1, momentum=0.9): 38.0,
        SGD(parameters, lr=0.1, momentum=0.9, nesterov=True): 38.0 / 2.8,
        SGD(parameters, lr=torch.tensor(0.5)): 4.0,
        Adam(parameters, lr=0.1): 380.0,
        RMSprop(parameters, lr=0.1): 20.0,
        SGD(parameters, lr=0.0): math.inf,
    }
    for optimizer, value in values.items():
        assert stability_threshold(optimizer).value == pytest.approx(value)


def test_where_there_is_no_threshold_the_reason_is_said() -> None:
    one, two = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    cases = {
        Muon([one]): "Muon has no stability threshold: it makes updates of one size",
        NAdam([one]): "NAdam has no stability threshold: none is known",
        LBFGS([one]): "adapts to the curvature",
        SGD([one], lr=0.1, maximize=True): "maximizes",
        SGD([one], lr=0.1, momentum=1.0): "never stable",
        SGD([one], lr=0.1, momentum=0.5, dampening=1.5): "never stable",
        RMSprop([one], momentum=1.0): "never stable",
        SGD([{"params": [one]}, {"params": [two], "momentum": 0.9}], lr=0.1): "differ in their",
    }
    for optimizer, reason in cases.items():
        threshold = stability_threshold(optimizer)
        assert threshold.value is None
        assert reason in threshold.note


def test_groups_without_any_of_the_parameters_do_not_count() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}])
    assert stability_threshold(optimizer).value == pytest.approx(10)
    assert stability_threshold(optimizer, [one]).value == pytest.approx(20)
    with pytest.raises(InvalidInput, match="none of the parameters"):
        stability_threshold(optimizer, [nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("rho", [1e-12, 0.01, 0.5])
@pytest.mark.parametrize("norm", [0.1, 3.0])
def test_a_step_of_sam_overshoots_above_its_threshold_alone(rho: float, norm: float) -> None:
    lr = 0.1
    threshold = sam_threshold(norm, lr, rho)
    assert 0 < threshold < 2 / lr
    for factor, overshoots in ((0.99, False), (1.01, True)):
        sharpness = factor * threshold
        theta = norm / sharpness
        perturbed = theta + rho * (sharpness * theta) / norm
        assert (abs(theta - lr * sharpness * perturbed) > abs(theta)) == overshoots


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_the_threshold_of_sam_solves_its_equation(norm: float, lr: float, rho: float) -> None:
    sharpness = sam_threshold(norm, lr, rho)
    assert lr * sharpness * (1 + rho * sharpness / norm) == pytest.approx(2)


def test_the_threshold_of_sam_is_the_published_formula() -> None:
    root = math.sqrt(1 + 8 * 0.05 / (0.1 * 2.0))
    assert sam_threshold(2.0, 0.1, 0.05) == pytest.approx(2.0 / (2 * 0.05) * (root - 1))


def test_the_threshold_of_sam_at_its_limits() -> None:
    assert sam_threshold(1.0, 0.1, 0.0) == 20
    assert sam_threshold(0.0, 0.1, 0.05) == 0
    assert sam_threshold(0.0, 0.1, 0.0) == 20
    for wrong in ((1.0, 0.0, 0.1), (1.0, 0.1, -1.0), (-1.0, 0.1, 0.1), (math.nan, 0.1, 0.1)):
        with pytest.raises(InvalidInput, match="a number"):
            sam_threshold(*wrong)


def test_a_learning_rate_can_be_given_in_place_of_the_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 7.0)]
    found = stability_threshold(SGD(groups, momentum=0.5), lr=0.01)
    assert found.value == pytest.approx(300)
    assert found.note == ""
    assert [group["lr"] for group in groups] == [0.1, 7.0]


def test_a_wrapped_optimizer_has_the_threshold_of_the_one_inside_and_sam_none() -> None:
    from thalweg.optim.sam import SAM
    from thalweg.optim.split import SplitUpdate
    from thalweg.spectrum.subspace import Subspace
    from thalweg.tracking.source import FixedSubspace

    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    frozen = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    assert stability_threshold(SplitUpdate(base, frozen, dominant=0.0)).value == 20
    sam = stability_threshold(SAM(base, rho=0.05))
    assert sam.value is None
    assert "sam_threshold" in sam.note
    assert stability_threshold(SAM(base, rho=0.0)).value == 20


def test_the_parts_of_a_combined_count_as_its_groups() -> None:
    from thalweg.optim.combined import Combined

    weight, bias = nn.Linear(2, 2).parameters()
    groups = [{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.05, "weight_decay": 1.0}]
    whole = stability_threshold(SGD(groups, lr=1.0, momentum=0.9))
    parts = [
        SGD([weight], lr=0.1, momentum=0.9),
        SGD([bias], lr=0.05, momentum=0.9, weight_decay=1.0),
    ]
    assert stability_threshold(Combined(parts)) == whole
    assert stability_threshold(Combined(parts), [bias]).value == pytest.approx(75)
    mixed = Combined([parts[0], Adam([bias])])
    assert "metric of its own" in stability_threshold(mixed).note
    assert stability_threshold(mixed, [bias]).preconditioned
    differ = Combined([Adam([weight], betas=(0.9, 0.99)), RMSprop([bias], momentum=0.9)])
    assert stability_threshold(differ).value is None
    assert "Muon" in stability_threshold(Combined([Muon([weight]), parts[1]])).note
