"""A step is made with the gradient, the noise and the learning rates that the phase says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lab.small_study import begin, differing, execute, left, small_spec
from thalweg.errors import Diverged, Interrupted
from thalweg.lab.config import PhaseSpec
from thalweg.lab.training import Run, Setup
from thalweg.lab.training.building import make_optimizer
from thalweg.lab.training.step import Buffers, _step_of_optimizer, make_update, minibatch
from thalweg.loss.objective import Objective
from thalweg.measure.step_state import StepState
from thalweg.optim.split import SplitUpdate
from thalweg.problems import Problem
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace, Split

SEED, STEP, K = 7, 3, 2
SGD = {"name": "sgd", "lr": 0.5}
SAM = {"name": "sam", "lr": 0.5, "rho": 0.3}
INPUTS = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80, dtype=torch.float64).reshape(40, 2).cos()
NOISE = {"part": "all", "batch_size": 8}


class Case:
    """One step from the same start, made as a phase says."""

    def __init__(self, batch_norm: bool = False, rate: float = 1.0, **said: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
        if batch_norm:
            layers.insert(1, nn.BatchNorm1d(4))
        model = nn.Sequential(*layers).double()
        loss = nn.MSELoss()
        problem = Problem(model=model, loss=loss, train=(INPUTS, TARGETS))
        self.objective = Objective(model, loss, (INPUTS, TARGETS), mode="eval")
        self.setup = Setup(problem, self.objective, K)
        self.model = model
        phase = PhaseSpec.model_validate({"batch_size": 8, "steps": 10, **said})
        space = random_subspace(self.objective.num_parameters, K, 0, dtype=torch.float64)
        source = FixedSubspace(space)
        self.optimizer = make_optimizer(small_spec(), phase, self.setup, SEED, source)
        self.theta = self.objective.theta()
        self.moment = StepState(
            STEP, self.theta, self.objective, source, learning_rate=phase.optimizer.lr * rate
        )
        self.buffers: Buffers = make_update(self.moment, self.setup, self.optimizer, phase, SEED)
        assert self.moment.minibatch_gradient is not None
        assert self.moment.update is not None
        self.gradient: Tensor = self.moment.minibatch_gradient
        self.update: Tensor = self.moment.update
        self.space = space


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def batch(size: int = 8) -> Tensor:
    return minibatch(SEED, STEP, size, 40)


def perturbed(case: Case, samples: Tensor | None, rho: float = 0.3) -> Tensor:
    gradient = case.objective.gradient(case.theta, samples)
    return case.theta + rho * gradient / gradient.norm()


def test_plain_descent_follows_the_minibatch_gradient() -> None:
    case = Case(optimizer=SGD)
    assert close(case.gradient, case.objective.gradient(case.theta, batch()))
    assert close(case.update, -0.5 * case.gradient)


def test_sam_steps_with_the_gradient_of_the_same_batch_at_the_perturbed_point() -> None:
    case = Case(optimizer=SAM)
    assert close(case.gradient, case.objective.gradient(case.theta, batch()))
    there = case.objective.gradient(perturbed(case, batch()), batch())
    assert close(case.update, -0.5 * there)
    loss = case.objective.value(case.theta, batch())
    assert case.moment.minibatch_loss == pytest.approx(float(loss), rel=1e-12)


def test_clipping_acts_at_the_perturbed_point_too() -> None:
    case = Case(optimizer=SAM, clip_norm=1e-3)
    assert float(case.gradient.norm()) == pytest.approx(1e-3, rel=1e-2)
    there = case.objective.gradient(perturbed(case, batch()), batch())
    assert float(case.update.norm()) == pytest.approx(0.5e-3, rel=1e-2)
    assert torch.allclose(case.update / case.update.norm(), -there / there.norm(), atol=1e-9)


def test_the_parts_of_sams_update_add_up_to_it_and_are_split_at_theta() -> None:
    whole = Case(optimizer=SAM)
    parts = [
        Case(optimizer=SAM, split={"dominant": dominant, "bulk": 1 - dominant})
        for dominant in (1.0, 0.0)
    ]
    for part in parts:
        assert part.moment.proposed is not None
        assert close(part.moment.proposed, whole.update)
    assert close(parts[0].update, whole.space.project(whole.update))
    assert close(parts[0].update + parts[1].update, whole.update)


@pytest.mark.parametrize("optimizer", [SGD, SAM], ids=["sgd", "sam"])
def test_running_statistics_move_on_by_the_pass_at_theta_alone(optimizer: dict[str, Any]) -> None:
    case = Case(batch_norm=True, optimizer=optimizer)
    mean = case.model[1].running_mean
    assert isinstance(mean, Tensor)
    assert mean.tolist() == [0.0] * 4
    fresh = Case(batch_norm=True, optimizer=optimizer)
    fresh.objective.layout.write(fresh.model, fresh.theta)
    features = fresh.model[0](INPUTS[batch()])
    case.buffers.move_on()
    assert torch.allclose(mean, 0.1 * features.mean(dim=0))
    assert int(case.model[1].num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [SGD, SAM], ids=["sgd", "sam"])
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_the_full_gradient_with_all_of_the_noise_is_training_on_the_minibatch(
    optimizer: dict[str, Any], clip_norm: float | None
) -> None:
    settings = {"optimizer": optimizer, "clip_norm": clip_norm}
    plain = Case(**settings)
    noisy = Case(**settings, batch_size="all", noise=NOISE)
    assert close(noisy.gradient, plain.gradient)
    assert close(noisy.update, plain.update)
    assert noisy.moment.minibatch_loss == pytest.approx(noisy.moment.loss, rel=1e-12)


def test_noise_of_one_part_is_the_projection_of_the_noise_and_is_scaled() -> None:
    noises = {
        part: Case(
            optimizer=SGD, batch_size="all", noise={"part": part, "batch_size": 8, "scale": 3.0}
        )
        for part in ("all", "dominant", "bulk")
    }
    case = noises["all"]
    full = case.objective.gradient(case.theta)
    noise = case.objective.gradient(case.theta, batch()) - full
    expected = {
        "all": noise,
        "dominant": case.space.project(noise),
        "bulk": noise - case.space.project(noise),
    }
    for part, vector in expected.items():
        assert float(vector.norm()) > 0
        assert close(noises[part].gradient, full + 3 * vector)
        assert close(noises[part].update, -0.5 * (full + 3 * vector))


def test_noise_is_of_the_function_that_curvature_is_of() -> None:
    noisy = Case(batch_norm=True, optimizer=SGD, batch_size="all", noise=NOISE)
    quiet = Case(batch_norm=True, optimizer=SGD, batch_size="all")
    objective = noisy.objective
    noise = objective.gradient(noisy.theta, batch()) - objective.gradient(noisy.theta)
    assert close(noisy.gradient, quiet.gradient + noise)
    assert noisy.model.training


@pytest.mark.parametrize("noise", [None, {"part": "dominant", "batch_size": 8}])
def test_the_source_moves_on_once_a_step_whoever_asks_first(
    noise: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def update(source: FixedSubspace, theta: Tensor, vector: Tensor | None = None) -> Any:
        asked.append(theta)
        return source.subspace

    monkeypatch.setattr(FixedSubspace, "update", update)
    said: dict[str, Any] = {} if noise is None else {"noise": noise, "batch_size": "all"}
    case = Case(optimizer=SGD, split={"dominant": 0.0, "bulk": 1.0}, **said)
    assert len(asked) == 1
    assert torch.equal(asked[0], case.theta)
    assert case.moment.subspace is case.space
    assert len(asked) == 1
    assert close(case.update, case.space.reject(case.update))


def test_a_schedule_scales_the_learning_rate_of_every_group() -> None:
    companion = {"name": "sgd", "lr": 0.04}
    case = Case(optimizer={"name": "muon", "lr": 0.01, "companion": companion}, rate=0.5)
    assert [group["lr"] for group in case.optimizer.param_groups] == pytest.approx([0.005, 0.02])
    biases = torch.cat(
        [torch.full((p.numel(),), p.ndim == 1) for p in case.model.parameters()]
    ).bool()
    assert close(case.update[biases], -0.02 * case.gradient[biases])
    assert not close(case.update[~biases], -0.02 * case.gradient[~biases])


def test_one_learning_rate_is_set_as_it_is_to_the_last_bit() -> None:
    case = Case(optimizer=SGD, rate=1 / 3)
    assert case.optimizer.param_groups[0]["lr"] == 0.5 * (1 / 3)


def test_a_loss_beyond_all_numbers_at_the_perturbed_point_is_divergence() -> None:
    with pytest.raises(Diverged, match="mini-batch loss is inf"):
        Case(optimizer={**SAM, "rho": 1e200})


class Broken(FixedSubspace):
    """Cannot split."""

    def split(self, vector: Tensor) -> Split:
        raise ValueError("a mistake of another kind")


@pytest.mark.parametrize(
    ("size", "error"),
    [(1e10, ValueError), (1e19, ValueError), (1e20, Diverged), (math.inf, Diverged)],
    ids=["usual", "its norm overflows", "its squares overflow", "infinite"],
)
def test_a_split_that_fails_is_divergence_where_the_update_is_beyond_all_numbers(
    size: float, error: type[Exception]
) -> None:
    theta = nn.Parameter(torch.zeros(30))
    theta.grad = torch.full((30,), size)
    source = Broken(random_subspace(30, K, 0))
    split = SplitUpdate(torch.optim.SGD([theta], lr=1.0), source, bulk=0.0, parameters=[theta])
    with pytest.raises(error, match="mistake" if error is ValueError else "squares"):
        _step_of_optimizer(split, lambda: torch.zeros(()))


RESUMED: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam", "lr": 0.05, "momentum": 0.9},
    "muon": {"name": "muon", "lr": 0.01, "companion": {"name": "adamw", "lr": 0.003}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on_bit_for_bit(quick_path: Path, name: str) -> None:
    spec = small_spec(
        {
            "phases.0.optimizer": RESUMED[name],
            "phases.0.steps": 8,
            "phases.0.schedule": "linear",
            "phases.0.noise": {"part": "bulk", "batch_size": 5},
            "branches": {"bulk": {"steps": 7, "split": {"dominant": 0.0}}},
            "probes": {"loss": 3},
        }
    )
    studies = [begin(quick_path / folder, spec) for folder in ("whole", "stopped")]
    for branch in ("trunk", "bulk"):
        execute(studies[0], spec, branch)
        calls = iter(range(100))
        stopped = Run(spec, studies[1], 0, branch, should_stop=lambda: next(calls) == 5)  # noqa: B023
        with pytest.raises(Interrupted):
            stopped.execute()
        execute(studies[1], spec, branch)
        assert differing(*(left(study, branch) for study in studies)) == []
