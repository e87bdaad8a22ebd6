"""Local SGD in a run: workers held in one process, each with mini-batches of its own.

theta_t of the run is the mean of the workers' parameters, also between two averages. Worker w's
mini-batch of step t is number K t + w of the one sequence of the seed: together those of a step are
the mini-batch of K times the size that synchronous training has at that step. Running statistics
of batch norm are those of the first worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.lab.training.minibatches import minibatch

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec


def make_workers(
    phase: PhaseSpec, named: list[tuple[str, nn.Parameter]], num_samples: int
) -> SimulatedWorkers:
    """The phase's optimizer over these parameters, once for each of its workers."""
    assert phase.local is not None
    optimizers = [phase.optimizer.build(named) for _ in range(phase.local.workers)]
    schedule = phase.local.schedule(phase.warmup_steps)
    return SimulatedWorkers(optimizers, schedule, phase.most_steps(num_samples))


def samples_of(phase: PhaseSpec, seed: int, step: int, worker: int, num_samples: int) -> Tensor:
    """Indices of the samples of a worker's mini-batch, int64 (batch_size,), on the CPU.

    A phase without workers of its own has one, number 0.
    """
    size = num_samples if phase.batch_size == "all" else phase.batch_size
    workers = 1 if phase.local is None else phase.local.workers
    return minibatch(seed, workers * step + worker, size, num_samples)


def make_local_steps(
    workers: SimulatedWorkers,
    evaluate: Callable[[int], Tensor],
    gradient: Callable[[], Tensor],
) -> tuple[float, Tensor]:
    """Make a step of every worker.

    Args:
        evaluate: computes a worker's mini-batch loss and the gradients at the model's parameters.
        gradient: gives those gradients as one vector (P,).

    Returns:
        Mean over the workers of the loss, and of the gradient (P,), each at its own parameters.
    """
    gradients: dict[int, Tensor] = {}

    def closure(worker: int) -> Tensor:
        loss = evaluate(worker)
        # An optimizer that evaluates again does so elsewhere: the first time counts.
        gradients.setdefault(worker, gradient())
        return loss

    losses = workers.step(closure)
    total = sum(gradients.values(), start=0 * gradients[0])
    return sum(map(float, losses)) / len(losses), total / len(losses)
