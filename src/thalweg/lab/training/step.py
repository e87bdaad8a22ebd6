"""One training step: mini-batch, gradient, the optimizer's proposal, the split.

batch (seed, t) -> gradient -> optimizer proposes -> split on S_k(theta_t)

The gradient is that of the mini-batch, plus the phase's injected noise, then clipped. An optimizer
that evaluates the loss again (SAM) sees the same mini-batch, noise and clipping there. Where a
phase has workers, each of them does all this from its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import Diverged
from thalweg.lab.config import PhaseSpec
from thalweg.lab.config.optimizers import RELATIVE_LR
from thalweg.lab.training.building import Setup
from thalweg.lab.training.local_workers import make_local_steps, samples_of
from thalweg.lab.training.noise import add_to_gradients, injected_noise
from thalweg.loss.guards.finiteness import all_finite
from thalweg.measure.step_state import StepState
from thalweg.optim.closure import needs_closure
from thalweg.optim.split import SplitUpdate
from thalweg.problems import Problem


class Buffers:
    """Keeps a model's buffers (batch norm's running statistics) at theta_t until step t is over.

    The forward pass in training mode moves them on. The split and the probes of step t must see
    one function, whether they are asked before or after the pass: so the new values are put aside
    until everything about the step is known. Of several passes, the first one's count: that at
    theta_t.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._after: list[Tensor] = []

    def put_aside(self) -> None:
        """Keep the new values of the first pass, and go back to those before the step."""
        if not self._after:
            self._after = [buffer.clone() for buffer in self._buffers]
        self._write(self._before)

    def move_on(self) -> None:
        """The step is over: take the new values."""
        self._write(self._after)

    def _write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, values, strict=True):
                buffer.copy_(value)


def train_one_step(
    moment: StepState, setup: Setup, optimizer: Optimizer, phase: PhaseSpec, seed: int
) -> Buffers:
    """Make the step from theta_t; `moment` gets what happened.

    Returns:
        The model's buffers: call `move_on` once everything about the step is known.

    Raises:
        Diverged: the mini-batch loss is NaN or infinite.
    """
    buffers = Buffers(setup.problem.model)
    evaluate = partial(_evaluate, moment, setup, optimizer, phase, seed, buffers)
    gradient = partial(_gradient, setup)
    for group in optimizer.param_groups:
        group["lr"] = moment.learning_rate * group.get(RELATIVE_LR, 1.0)
    if isinstance(optimizer, SimulatedWorkers):
        seen = make_local_steps(optimizer, evaluate, gradient)
        moment.minibatch_loss, moment.minibatch_gradient = seen
    else:
        moment.minibatch_loss = float(evaluate())
        moment.minibatch_gradient = gradient()
        if isinstance(optimizer, SplitUpdate):
            # Asked for by a rule, or by noise on a part: not to be moved on twice at one theta.
            known = moment.subspace_is_known
            optimizer.source_is_here = known and optimizer.source is moment.source
        _make_update(optimizer, evaluate)
    moment.update = setup.objective.theta() - moment.theta
    if isinstance(optimizer, SplitUpdate):
        _note_split(moment, optimizer)
    else:
        moment.proposed = moment.update
    return buffers


def _evaluate(
    moment: StepState,
    setup: Setup,
    optimizer: Optimizer,
    phase: PhaseSpec,
    seed: int,
    buffers: Buffers,
    worker: int = 0,
) -> Tensor:
    """The mini-batch loss at the model's parameters; their `grad` becomes what the optimizer sees.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    model, objective = setup.problem.model, setup.objective
    loss = _minibatch_loss(setup.problem, phase, seed, moment.step, worker)
    optimizer.zero_grad()
    loss.backward()
    buffers.put_aside()
    if not bool(torch.isfinite(loss.detach())):
        raise Diverged(f"the mini-batch loss is {float(loss.detach())}")
    if phase.noise is not None:
        noise = injected_noise(moment, phase.noise, seed, objective.theta())
        add_to_gradients(objective, model, noise)
    if phase.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), phase.clip_norm)
    return loss.detach()


def _make_update(optimizer: Optimizer, evaluate: Callable[[], Tensor]) -> None:
    """The optimizer's step, and its split; a split of an update beyond all numbers is divergence.

    Raises:
        Diverged: the proposed update is NaN or infinite, or too large for its squares to be
            numbers; the loss is, where the optimizer evaluates it again.
    """
    try:
        # With a closure, other optimizers would evaluate the loss again in vain.
        if needs_closure(optimizer):
            optimizer.step(evaluate)  # type: ignore[arg-type]
        else:
            optimizer.step()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        proposed = optimizer.proposed if isinstance(optimizer, SplitUpdate) else None
        # Not its norm: that of many elements overflows where each square is a number still.
        if proposed is None or all_finite(proposed.square()):
            raise
        raise Diverged("the squares of the proposed update are NaN or infinite") from error


def _gradient(setup: Setup) -> Tensor:
    """The `grad` of the parameters as one vector (P,), a copy."""
    parameters = setup.objective.layout.parameters(setup.problem.model)
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    )


def _minibatch_loss(
    problem: Problem, phase: PhaseSpec, seed: int, step: int, worker: int
) -> Tensor:
    chosen = samples_of(phase, seed, step, worker, problem.num_samples)
    inputs, targets = (part[chosen.to(part.device)] for part in problem.train)
    return problem.loss(problem.model(inputs), targets)


def _note_split(moment: StepState, optimizer: SplitUpdate) -> None:
    """The parts that the split computed, refined where it refined them, serve the probes."""
    assert optimizer.proposed is not None
    moment.proposed = optimizer.proposed
    if optimizer.split is not None and optimizer.source is moment.source:
        moment.subspace_updated = True
        moment.keep_parts(optimizer.split, optimizer.dominant, optimizer.bulk)


def evaluate_test(setup: Setup, theta: Tensor) -> tuple[float, float | None]:
    """Loss and accuracy (None without classes) on the held-out data at theta (P,).

    The model is left as it was, its training modes included.
    """
    problem, objective = setup.problem, setup.objective
    assert problem.test is not None
    model, (inputs, targets) = problem.model, problem.test
    now = objective.theta()
    modes = {module: module.training for module in model.modules()}
    objective.layout.write(model, theta)
    model.eval()
    size = objective.chunk_size or len(inputs)
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            output = model(x)
            loss += float(problem.loss(output, y)) * len(x)
            if problem.num_classes is not None:
                correct += float(problem.accuracy(output, y)) * len(x)
    for module, training in modes.items():
        module.training = training
    objective.layout.write(model, now)
    accuracy = None if problem.num_classes is None else correct / len(inputs)
    return loss / len(inputs), accuracy
