"""One training step of a run, from top to bottom.

    theta_t -> does a rule end the phase? -> mini-batch (seed, t) -> gradient, noise, clipping
            -> the optimizer's proposal -> its split on S_k(theta_t) -> theta_{t+1}
            -> the probes at theta_t -> row t

`make_step` is that line, and what it calls follows in the same order. An optimizer that evaluates
the loss again (SAM) sees the same mini-batch, noise and clipping there. Where a phase has workers,
each of them does all this from its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import Diverged
from thalweg.lab.config.optimizers import RELATIVE_LR
from thalweg.lab.training.building import Setup, solve, stream_seed
from thalweg.lab.training.recording import evaluate_test
from thalweg.lab.training.run_state import RunState
from thalweg.linalg import all_finite
from thalweg.loss.guards.determinism import mode_dependent_layers
from thalweg.loss.reduce import several_processes
from thalweg.measure.step_state import StepState
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.batch_subspace import BatchSubspace
from thalweg.tracking.wrapping import needs_closure

if TYPE_CHECKING:
    from thalweg.lab.config import NoiseSpec, PhaseSpec


def make_step(run: RunState) -> dict[str, Any] | None:
    """Make the next step of a run, unless a rule ends its phase at theta_t, before the step.

    Returns:
        What was measured at theta_t; None where no probe is due, or the phase has ended.

    Raises:
        Diverged: a parameter, a loss, a product or an update is NaN or infinite.
    """
    progression = run.progression
    now = state_at(run)
    if progression.ends(now):
        return None
    optimizer = run.optimizer
    if isinstance(optimizer, SplitUpdate):
        optimizer.dominant, optimizer.bulk = progression.split_factors
    buffers = make_update(now, run.setup, optimizer, progression.phase, run.seed)
    is_first = progression.position.step == progression.position.start
    row = run.recorder.row(now, everything=is_first)
    buffers.move_on()
    progression.position.step += 1
    return row


# Where the step begins.


def state_at(run: RunState) -> StepState:
    """What is known at theta_t before the step; the probes and the split ask it for the rest.

    Raises:
        Diverged: a parameter is NaN or infinite.
    """
    setup, position, phase = run.setup, run.progression.position, run.progression.phase
    theta = setup.objective.theta()
    if not bool(torch.isfinite(theta).all()):
        raise Diverged("a parameter is NaN or infinite")
    size = phase.batch_size if phase.noise is None else phase.noise.batch_size
    size = None if size in ("all", setup.problem.num_samples) else size
    tell_batch(run)
    return StepState(
        step=position.step,
        theta=theta,
        objective=setup.objective,
        source=run.source,
        learning_rate=run.progression.learning_rate,
        branch_point=run.branch_point,
        evaluate_test=None if setup.problem.test is None else partial(evaluate_test, setup),
        solve=partial(_solve, run),
        optimizer=run.optimizer,
        batches=None if size is None else partial(_measured_batches, run, size),
        k=setup.k,
    )


def tell_batch(run: RunState) -> None:
    """Tell a subspace that is that of the next mini-batch's Hessian which samples these are."""
    if isinstance(run.source, BatchSubspace):
        step, total = run.progression.position.step, run.setup.problem.num_samples
        run.source.samples = samples_of(run.progression.phase, run.seed, step, 0, total)


def _solve(run: RunState, theta: Tensor, k: int) -> Any:
    return solve(run.setup.objective, theta, k, run.spec.subspace.tolerance)


def _measured_batches(run: RunState, size: int, count: int) -> list[Tensor]:
    """Mini-batches as the phase draws them, independent of each other and of those trained on.

    A function of seed and step alone.
    """
    step, total = run.progression.position.step, run.setup.problem.num_samples
    seeds = (stream_seed("measured batches", run.seed, step, n) for n in range(count))
    return [minibatch(seed, 0, size, total) for seed in seeds]


# From theta_t to theta_{t+1}.


def make_update(
    now: StepState, setup: Setup, optimizer: Optimizer, phase: PhaseSpec, seed: int
) -> Buffers:
    """Move the model from theta_t to theta_{t+1}; `now` gets what happened.

    Returns:
        The model's buffers: call `move_on` once everything about the step is known.

    Raises:
        Diverged: the mini-batch loss or the update is NaN or infinite.
    """
    buffers = Buffers(setup.problem.model)
    evaluate = partial(_evaluate, now, setup, optimizer, phase, seed, buffers)
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate * group.get(RELATIVE_LR, 1.0)
    if isinstance(optimizer, SimulatedWorkers):
        seen = _step_of_workers(optimizer, evaluate, setup)
        now.minibatch_loss, now.minibatch_gradient = seen
    else:
        now.minibatch_loss = float(evaluate())
        now.minibatch_gradient = _gradient(setup)
        if isinstance(optimizer, SplitUpdate):
            # Asked for by a rule, or by noise on a part: not to be moved on twice at one theta.
            known = now.subspace_is_known
            optimizer.source_is_here = known and optimizer.source is now.source
        _step_of_optimizer(optimizer, evaluate)
    now.update = setup.objective.theta() - now.theta
    if isinstance(optimizer, SplitUpdate):
        _note_split(now, optimizer)
    else:
        now.proposed = now.update
    return buffers


def _evaluate(
    now: StepState,
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
    problem, objective = setup.problem, setup.objective
    optimizer.zero_grad()
    if phase.batch_size == "all" and _can_be_divided(problem.model):
        loss, gradient = objective.value_and_gradient()
        _add_to_gradients(setup, gradient)
    else:
        chosen = samples_of(phase, seed, now.step, worker, problem.num_samples)
        inputs, targets = (part[chosen.to(part.device)] for part in problem.train)
        loss = problem.loss(problem.model(inputs), targets)
        loss.backward()
    buffers.put_aside()
    if not bool(torch.isfinite(loss.detach())):
        raise Diverged(f"the mini-batch loss is {float(loss.detach())}")
    if phase.noise is not None:
        noise = injected_noise(now, phase.noise, seed, objective.theta())
        _add_to_gradients(setup, noise)
    if phase.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), phase.clip_norm)
    return loss.detach()


def _can_be_divided(model: nn.Module) -> bool:
    """Whether processes share the gradient of all samples: that of mini-batches each computes.

    Not where the loss that is trained is another function than the one whose curvature is known.
    """
    return several_processes() and not mode_dependent_layers(model)


def samples_of(phase: PhaseSpec, seed: int, step: int, worker: int, num_samples: int) -> Tensor:
    """Indices of the samples of a worker's mini-batch, int64 (batch_size,), on the CPU.

    Worker w of K has mini-batch number K t + w at step t: together those of a step are the
    mini-batch of K times the size that synchronous training has there. A phase without workers has
    one, number 0.
    """
    size = num_samples if phase.batch_size == "all" else phase.batch_size
    workers = 1 if phase.local is None else phase.local.workers
    return minibatch(seed, workers * step + worker, size, num_samples)


def minibatch(seed: int, step: int, batch_size: int, num_samples: int) -> Tensor:
    """Indices of the samples of batch `step`, int64 (batch_size,), on the CPU.

    A function of seed and step alone: every epoch is a random order of all samples, the orders
    follow one another without end, and batch t is places t B to (t + 1) B - 1 of that sequence. So
    branches that start from one checkpoint see the same batches, whatever else draws random
    numbers, and a resumed run continues with them.
    """
    if batch_size == num_samples:
        return torch.arange(num_samples)
    begin = step * batch_size
    parts: list[Tensor] = []
    missing = batch_size
    while missing:
        epoch, place = divmod(begin, num_samples)
        part = _order(seed, epoch, num_samples)[place : place + missing]
        parts.append(part)
        begin += len(part)
        missing -= len(part)
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed("data order", seed, epoch))
    return torch.randperm(num_samples, generator=generator)


def injected_noise(now: StepState, noise: NoiseSpec, seed: int, theta: Tensor) -> Tensor:
    """Mini-batch noise at theta (P,), whole or one part of it: scale Q (g_B - g), (P,).

    g_B is the gradient of the mini-batch B that the step would have drawn, g that of the full loss
    at the same point; Q is the identity, P_k or I - P_k, with S_k at theta_t. Both gradients are
    of the same function, that of the full loss (batch norm with fixed statistics, no dropout), so
    that the mean over batches is zero. With part "all" and scale 1, the full gradient plus this is
    the gradient of the mini-batch.

    Args:
        theta: theta_t, or another point such as SAM's perturbed one.

    Raises:
        Diverged: a gradient or the loss is NaN or infinite.
    """
    objective = now.objective
    samples = minibatch(seed, now.step, noise.batch_size, objective.num_samples)
    at_start = torch.equal(theta, now.theta)
    full = now.gradient if at_start else objective.value_and_gradient(theta)[1]
    difference = objective.value_and_gradient(theta, samples)[1] - full
    if noise.part == "all":
        return noise.scale * difference
    dominant, bulk = now.parts(difference)
    return noise.scale * (dominant if noise.part == "dominant" else bulk)


def _add_to_gradients(setup: Setup, vector: Tensor) -> None:
    """Add a vector (P,) to the `grad` of the model's parameters."""
    layout = setup.objective.layout
    parameters = layout.parameters(setup.problem.model)
    for parameter, part in zip(parameters, layout.unflatten(vector), strict=True):
        before = parameter.grad
        parameter.grad = part.clone() if before is None else before.to_dense() + part


def _gradient(setup: Setup) -> Tensor:
    """The `grad` of the parameters as one vector (P,), a copy."""
    parameters = setup.objective.layout.parameters(setup.problem.model)
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).reshape(-1)
            for p in parameters
        ]
    )


def _step_of_optimizer(optimizer: Optimizer, evaluate: Callable[[], Tensor]) -> None:
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


def _step_of_workers(
    workers: SimulatedWorkers, evaluate: Callable[[int], Tensor], setup: Setup
) -> tuple[float, Tensor]:
    """A step of every worker of local SGD; theta_t of the run is the mean of their parameters.

    Running statistics of batch norm are those of the first worker.

    Returns:
        Mean over the workers of the loss, and of the gradient (P,), each at its own parameters.
    """
    gradients: dict[int, Tensor] = {}

    def closure(worker: int) -> Tensor:
        loss = evaluate(worker)
        # An optimizer that evaluates again does so elsewhere: the first time counts.
        gradients.setdefault(worker, _gradient(setup))
        return loss

    losses = workers.step(closure)
    total = sum(gradients.values(), start=0 * gradients[0])
    return sum(map(float, losses)) / len(losses), total / len(losses)


def _note_split(now: StepState, optimizer: SplitUpdate) -> None:
    """The parts that the split computed, refined where it refined them, serve the probes."""
    assert optimizer.proposed is not None
    now.proposed = optimizer.proposed
    if optimizer.split is not None and optimizer.source is now.source:
        now.subspace_updated = True
        now.keep_parts(optimizer.split, optimizer.dominant, optimizer.bulk)


class Buffers:
    """A model's buffers (batch norm's running statistics), kept at theta_t until step t is over.

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
