"""One recorded stretch of training: what every variant of a tracker is replayed along."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg.lab.config import load_spec
from thalweg.lab.training.step import minibatch
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import build_problem
from thalweg.spectrum.eigensolver import top_eigenpairs

K = 10


@dataclass(frozen=True)
class Stretch:
    """Which stretch of which training: SGD on mini-batches of 50.

    Attributes:
        warm_up: steps before it.
        steps: how many there are in it.
        settle: of these, how many a tracker may take before it is looked at.
        check: from one step whose truth is solved to the next.
    """

    problem: str
    data_dir: str | None
    lr: float
    warm_up: int
    steps: int
    settle: int
    check: int
    seed: int

    def __str__(self) -> str:
        return f"{self.problem} MLP, SGD lr {self.lr:g}, from step {self.warm_up}"


@dataclass
class Replay:
    """Thetas, full gradients, and P_k g in float64 at some steps."""

    stretch: Stretch
    objective: Objective
    in_bfloat16: Objective
    labels: Tensor
    thetas: list[Tensor]
    gradients: list[Tensor]
    truth: dict[int, Tensor]


def record(stretch: Stretch) -> Replay:
    """Train, keep thetas and full gradients, and solve for the truth at every n-th of them."""
    words = [] if stretch.data_dir is None else ["--problem.data.data_dir", stretch.data_dir]
    spec = load_spec("digits" if stretch.problem == "digits" else "mnist-mlp", words)
    problem = build_problem(spec.problem, stretch.seed)
    model, (inputs, targets) = problem.model, problem.train
    base = torch.optim.SGD(model.parameters(), stretch.lr)
    objective = Objective(model, problem.loss, problem.train)
    thetas = []
    for step in range(stretch.warm_up + stretch.steps):
        if step >= stretch.warm_up:
            thetas.append(objective.theta())
        chosen = minibatch(stretch.seed, step, 50, problem.num_samples)
        base.zero_grad()
        problem.loss(model(inputs[chosen]), targets[chosen]).backward()
        base.step()
    gradients = [objective.gradient(theta) for theta in thetas]
    double = targets.double() if targets.is_floating_point() else targets
    exact = Objective(copy.deepcopy(model).double(), problem.loss, (inputs.double(), double))
    checked = range(stretch.settle, stretch.steps, stretch.check)
    return Replay(
        stretch,
        objective,
        Objective(model, problem.loss, problem.train, forward_dtype=torch.bfloat16),
        targets if targets.dim() == 1 else targets.argmax(dim=1),
        thetas,
        gradients,
        truth(exact, {step: (thetas[step], gradients[step]) for step in checked}),
    )


def truth(exact: Objective, checked: dict[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """P_k g in float64 at each theta, solved once: a temporary file keeps it."""
    digest = hashlib.sha256()
    for theta, _ in checked.values():
        digest.update(theta.numpy().tobytes())
    path = Path(tempfile.gettempdir()) / f"thalweg-truth-{digest.hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as saved:
            return {int(step): torch.from_numpy(saved[step]) for step in saved.files}
    found = {}
    for step, (theta, gradient) in checked.items():
        hessian = Hessian(exact, theta.double(), keep_graph=True)
        space = top_eigenpairs(hessian, K, tolerance=1e-6, check_repeated=0)
        found[step] = space.project(gradient.double())
    np.savez(path, **{str(step): vector.numpy() for step, vector in found.items()})
    return found
