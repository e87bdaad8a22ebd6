"""One step of a training run, as the probes see it: what is known at theta_t, computed when asked.

A `StepState` holds theta_t and what the step did. The full loss and its gradient, the subspace and
the parts of vectors are computed at the first request and kept for the rest of the step, so probes
share them, and nothing is computed that nobody asks for.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> model, data = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> source = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.ones(1)))
    >>> state = StepState(0, torch.zeros(3), objective, source, learning_rate=0.1)
    >>> state.loss, state.gradient.tolist(), state.parts(state.gradient)[0].tolist()
    (1.0, [-2.0, -2.0, -2.0], [-2.0, 0.0, 0.0])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.loss.protocol import Loss, value_of
from thalweg.measure.preconditioned_sharpness import metric_subspace
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import has_preconditioner
from thalweg.tracking.source import Split, SubspaceSource
from thalweg.tracking.threshold_source import ThresholdSource

Parts = tuple[Tensor, Tensor]

# Mini-batches over which an expectation is taken, such as the covariance of their gradients.
BATCHES = 8


@dataclass(frozen=True)
class BranchPoint:
    """Where a branch began: theta (P,) and S_k there."""

    theta: Tensor
    subspace: Subspace


@dataclass
class StepState:
    """What is known at one step, at theta_t; measured values are computed when first asked for.

    Attributes:
        step: t.
        theta: theta_t, (P,).
        objective: the full training loss.
        source: gives S_k.
        learning_rate: of this step.
        minibatch_loss, minibatch_gradient: what the optimizer saw; None after the last step.
        proposed: the update proposed by the optimizer, before the split (P,); None likewise.
        update: the update made, theta_{t+1} - theta_t (P,); None likewise.
        branch_point: None in the trunk.
        solve: gives the top k eigenpairs at a theta from scratch.
        subspace_updated: whether the split has moved the source on to theta_t already.
        steps_before, gradients_before: steps since the last recorded row, and what the subspace
            cost in them, in gradients of the full loss.
        k: dimension of S_k, where that is known without asking for it.
        notes: what probes have to say in words, such as why a value is NaN.
        evaluate_test: gives (loss, accuracy or None) on held-out data at the model's parameters
            set to a theta; None without such data.
        optimizer: that of the run, in its state after the step; None where not known.
        batches: gives m independent mini-batches as those that the step's was drawn from, each as
            indices of its samples, int64 (B,), on the CPU; None where every batch is all samples.
    """

    step: int
    theta: Tensor
    objective: Loss
    source: SubspaceSource
    learning_rate: float
    minibatch_loss: float | None = None
    minibatch_gradient: Tensor | None = None
    proposed: Tensor | None = None
    update: Tensor | None = None
    branch_point: BranchPoint | None = None
    evaluate_test: Callable[[Tensor], tuple[float, float | None]] | None = None
    solve: Callable[[Tensor, int], Subspace] | None = None
    subspace_updated: bool = False
    steps_before: int = 0
    gradients_before: float = 0.0
    optimizer: Optimizer | None = None
    batches: Callable[[int], list[Tensor]] | None = None
    k: int | None = None
    notes: list[str] = field(default_factory=list)
    # The vector is kept beside its parts: the identity of one that is gone may be given again.
    _parts: dict[int, tuple[Tensor, Parts]] = field(default_factory=dict)

    @cached_property
    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Full training loss, and its gradient (P,)."""
        loss, gradient = self.objective.value_and_gradient(self.theta)
        return float(loss), gradient

    @property
    def loss(self) -> float:
        """Full training loss; without the gradient, unless that is there already."""
        if "loss_and_gradient" in self.__dict__:
            return self.loss_and_gradient[0]
        return self._loss

    @cached_property
    def _loss(self) -> float:
        return float(value_of(self.objective, self.theta))

    @property
    def gradient(self) -> Tensor:
        """Gradient of the full training loss, (P,)."""
        return self.loss_and_gradient[1]

    @cached_property
    def subspace(self) -> Subspace:
        """S_k at theta_t, computed once a step for the split and all probes together.

        Its error is that of the full gradient's projection where the gradient is known by then, of
        a subset's gradient otherwise.
        """
        if not self.subspace_updated:
            known = self.__dict__.get("loss_and_gradient")
            self.source.update(self.theta, None if known is None else known[1])
        return self.source.subspace

    @property
    def subspace_is_known(self) -> bool:
        """Whether S_k at theta_t has been asked for already."""
        return self.subspace_updated or "subspace" in self.__dict__

    @property
    def step_was_made(self) -> bool:
        """Whether an update followed: not at the last row of a run."""
        return self.update is not None

    @cached_property
    def metric_subspace(self) -> MetricSubspace | None:
        """S_k at theta_t in the metric of the optimizer, solved once a step.

        The metric is D after the step's update, see `preconditioner`. None where the optimizer has
        none, or is not known, and where no step was made.
        """
        if self.optimizer is None or not self.step_was_made:
            return None
        if not has_preconditioner(self.optimizer):
            return None
        return metric_subspace(self.objective, self.optimizer, self.theta, self.subspace.k)

    @cached_property
    def batch_samples(self) -> list[Tensor | None]:
        """`BATCHES` mini-batches, int64 (B,) each; [None], all samples, where a batch is that."""
        return [None] if self.batches is None else [*self.batches(BATCHES)]

    @cached_property
    def batch_gradients(self) -> Tensor:
        """The gradient at theta_t of each of `batch_samples`, (P, m)."""
        gradients = [
            self.gradient
            if samples is None
            else self.objective.value_and_gradient(self.theta, samples)[1]
            for samples in self.batch_samples
        ]
        return torch.stack(gradients).T

    def keep_parts(self, split: Split, dominant: float, bulk: float) -> None:
        """Note the parts of the proposed update, and so of the update made, from the split."""
        assert self.proposed is not None
        assert self.update is not None
        made = (dominant * split.dominant, bulk * split.bulk)
        self._parts[id(self.proposed)] = (self.proposed, (split.dominant, split.bulk))
        self._parts[id(self.update)] = (self.update, made)

    def _split(self, vector: Tensor) -> Parts:
        subspace = self.subspace
        if isinstance(self.source, ThresholdSource):
            # Its subspace is what one vector has seen; another one needs products of its own.
            split = self.source.split(vector)
            return split.dominant, split.bulk
        return subspace.split(vector)

    def parts(self, vector: Tensor) -> Parts:
        """Dominant and bulk part of a vector, split once."""
        key = id(vector)
        if key not in self._parts:
            self._parts[key] = (vector, self._split(vector))
        return self._parts[key][1]
