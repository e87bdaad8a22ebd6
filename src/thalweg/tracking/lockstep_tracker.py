"""The top eigenspaces of R runs, followed from one training step to the next in one computation.

How a step goes is in `following.py`, for one run and for many. Everything that belongs to a run
(its basis, what a power step leaves of its error, its lambda_{k+1}) is its own; the subset and the
renewals are common. A step waits for the device once, when the error estimates of all runs are
read. Not batched, and so run by run: solves from scratch, and looks at lambda_{k+1}.

Why not one class for one run and for many? It would cost one run nothing: on one CPU thread a
single run in lockstep takes as long as with `SubspaceTracker`, renewals included (side by side: 1.0
times on a 64-100-100-10 network and 1,437 samples, a step between renewals 0.6 times; 1.0 to 1.1
times on 784-200-200-10 and 5,000 samples). But its numbers are others: products come from `vmap`,
subsets in halves, and power steps without eigenvectors, so that no saved run would continue where
it was to the last bit. Where a layer has no `vmap`, runs are evaluated one by one. And other
operators than the Hessian, the refinement of one vector, two references at once (at the edge of
stability a lockstep is right, but renews often) and solves at every step are there for one run
only.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> runs = LockstepObjective(Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data))
    >>> tracker = LockstepTracker(runs, k=2)
    >>> thetas = torch.randn(5, 8)
    >>> _, gradients = runs.values_and_gradients(thetas)
    >>> tracker.update(thetas, gradients)
    >>> tracker.project(gradients).shape, tracker.subspace(4).k, tracker.reports[4].renewed
    (torch.Size([5, 8]), 2, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import norm
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.operators.hessian import Hessian
from thalweg.operators.product_check import check_once
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded
from thalweg.tracking.bulk_edge import BulkEdge
from thalweg.tracking.error_estimate import (
    Movement,
    content,
    deviation_by_difference,
    population_correction,
)
from thalweg.tracking.following import FEWEST_SAMPLES, Following, Seen
from thalweg.tracking.power_step import (
    LockstepPowerStep,
    lockstep_power_step,
    lockstep_power_step_by_qr,
    refuse_divergence,
)
from thalweg.tracking.reference import LockstepReference, draw_halves
from thalweg.tracking.refresh_policy import RefreshPolicy
from thalweg.tracking.source import TrackerReport

OF_EACH_RUN = ("reports", "edges", "contents", "bare")
"""Lists of a state that have an entry for each run."""
COMMON = ("halves",)
"""Tensors of a state that all runs share."""


class LockstepTracker(Following[LockstepPowerStep, LockstepReference]):
    """Follows the top-k eigenspace S_k of the Hessian for each of R runs.

    Args:
        objective: the losses of the runs.
        k: dimension of the subspaces.
        error: target for norm(tracked - P_k v) / norm(v) of the worst run; a step whose estimate
            exceeds it renews all references at once.
        tolerance: residual of solves from scratch, see `top_eigenpairs`.
        gap_every: renewals from one thorough look for eigenvectors that the bases may have missed
            to the next, 0 for none.
        seed: of the subsets.

    Attributes:
        reports: for each run what the last update cost it, in gradients of its own full loss, and
            how far its subspace can be trusted: `TrackerReport`s; empty before the first update.

    Raises:
        InvalidInput: k < 1 or k > P, a target that is not positive, fewer than 8 samples.

    Warns:
        GapClosed: lambda_k and lambda_{k+1} of a run are nearly equal.
        TargetMissed: the estimated error of a run is larger than the target all the same.
        NotConverged: a solve from scratch stopped early.

    Memory: about 10 R k P numbers beside the chunk. Source: see `following.py`. Example: see the
    module.
    """

    follows_guards = False
    # The halves of the subset are multiplied apart anyway.
    sampling_matvecs = 0.0
    reference_matvecs = 1.0

    def __init__(
        self,
        objective: LockstepObjective,
        k: int,
        *,
        error: float = 0.01,
        tolerance: float = 1e-3,
        gap_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective.num_parameters,
            objective.num_samples,
            k,
            error=error,
            tolerance=tolerance,
            gap_every=gap_every,
            seed=seed,
        )
        if objective.num_samples < FEWEST_SAMPLES:
            hint = "solve for each subspace with top_eigenpairs"
            raise invalid("data", f"{objective.num_samples} samples", "at least 8", hint)
        check_once(Hessian(objective.objective))
        self.objective = objective
        # Where a computation is recorded once for each shape, few sizes are few recordings.
        self._policy = RefreshPolicy(objective.num_samples, error, few_sizes=True)
        self._thetas: Tensor | None = None
        self._reference: LockstepReference | None = None
        # The subset of the reference, or of the one that is being taken: its halves (2, m / 2).
        self._halves: Tensor | None = None
        # Of the last power step by the subset, until it is known to be sound.
        self._images: Tensor | None = None

    @property
    def policy(self) -> RefreshPolicy:
        """How many samples are followed, and when the references are renewed; of all runs."""
        return self._policy

    def update(self, thetas: Tensor, vectors: Tensor) -> None:
        """Move on to thetas.

        Args:
            thetas: the points (R, P); R is that of the first update.
            vectors: (R, P), whose projections the target error is about: gradients, or updates.

        Raises:
            InvalidInput: other shapes.
            Diverged: a product of some run is NaN or infinite; the message names the runs.
        """
        runs = len(thetas) if self._step is None else len(self._step.rows)
        expected = (runs, self.objective.num_parameters)
        if thetas.shape != expected or vectors.shape != expected:
            given = f"{tuple(thetas.shape)} and {tuple(vectors.shape)}"
            raise invalid("thetas and vectors", given, f"(R, P) = {expected} both")
        self._thetas = thetas.detach()
        with shielded():
            if self._step is None:
                self._edges = [BulkEdge() for _ in range(runs)]
            self._advance(vectors)

    def project(self, vectors: Tensor) -> Tensor:
        """P_k v of each run at the thetas of the last update, (R, P), for vectors (R, P).

        Raises:
            InvalidInput: there was no update yet.
        """
        return self._current().project(vectors)

    def eigenvalues(self) -> Tensor:
        """The Ritz values of all runs, (R, k), each run's descending."""
        return self._current().eigenvalues()

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """The Ritz values of all runs (R, k), each run's descending, and vectors, rows (R, k, P).

        Raises:
            InvalidInput: there was no update yet.
        """
        return self._current().eigenpairs()

    def subspace(self, run: int) -> Subspace:
        """S_k of one run at the last update.

        Raises:
            InvalidInput: there was no update yet.
        """
        values, rows = self.eigenpairs()
        return Subspace(rows[run].T, values[run])

    def _operator(self, run: int) -> Hessian:
        assert self._thetas is not None
        return Hessian(self.objective.objective, self._thetas[run], keep_graph=True)

    def _multiply(self, rows: Tensor) -> Tensor:
        assert self._thetas is not None
        return self.objective.hessian_products(self._thetas, rows)

    def _step_from(self, rows: Tensor, images: Tensor) -> LockstepPowerStep:
        step = lockstep_power_step(rows.contiguous(), images)
        assert step.sound is not None
        return step if bool(step.sound.all()) else lockstep_power_step_by_qr(rows, images)

    def _step_without(self, rows: Tensor, values: Tensor) -> LockstepPowerStep:
        return LockstepPowerStep(rows.contiguous(), torch.diag_embed(values))

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts)

    def _serve(self) -> LockstepReference | None:
        return self._reference

    def _follow_from(self, reference: LockstepReference, vector: Tensor | None) -> Tensor:
        assert vector is not None
        assert self._thetas is not None
        images, difference = reference.images(self.objective, self._thetas)
        self._step = lockstep_power_step(reference.rows, images, difference)
        self._images = images
        return vector

    def _draw_subset(self) -> None:
        self.policy.plan()
        halves = draw_halves(self.num_samples, self.policy.subset, self._generator)
        assert self._thetas is not None
        self._halves = halves.to(self._thetas.device)

    def _take_reference(self, rows: Tensor, images: Tensor) -> None:
        assert self._halves is not None
        rows, images = rows[:, : self.k].contiguous(), images[:, : self.k]
        assert self._thetas is not None
        self._reference = LockstepReference.at(
            self.objective, self._thetas, rows, images, self._halves
        )

    def _drop_references(self) -> None:
        self._reference = None

    @property
    def _content_part(self) -> float:
        return self.policy.subset / 2 / self.num_samples

    def _seen(self, vector: Tensor, *, measured: bool) -> list[Seen]:
        *found, sound = self._measure(self._current(), vector, measured=measured)
        if not all(sound):
            step = self._current()
            assert step.stale is not None
            assert self._images is not None
            self._step = lockstep_power_step_by_qr(step.stale, self._images, step.difference)
            *found, _ = self._measure(self._step, vector, measured=measured)
        self._images = None
        if not all(math.isfinite(number) for each in found for number in each):
            refuse_divergence(vector, "a vector")
        if not measured:
            found[2] = self._contents
        return [Seen(*each) for each in zip(*found, strict=True)]

    def _measure(
        self, step: LockstepPowerStep, vector: Tensor, *, measured: bool
    ) -> list[list[float]]:
        """What `Seen` has, by run, and whether the step is sound: waits for the device once."""
        assert self._thetas is not None
        assert self._halves is not None
        movement = Movement.of(step, vector)
        lengths = norm(vector).clamp(min=torch.finfo(vector.dtype).tiny)
        sampling = torch.zeros_like(lengths)
        if step.difference is not None:
            correction = population_correction(self.policy.subset, self.num_samples)
            sampling = correction * deviation_by_difference(step, vector).outside
        sound = torch.ones_like(lengths) if step.sound is None else step.sound.to(lengths)
        fractions = torch.zeros_like(lengths)
        if measured:
            weighted = movement.weighted.unsqueeze(1)
            image = self.objective.hessian_products(self._thetas, weighted, self._halves[0])
            fractions = content(step, movement, image.squeeze(1))
        return torch.stack([sampling / lengths, movement.size / lengths, fractions, sound]).tolist()

    def _spectrum(self, run: int) -> Tensor:
        known = self._edges[run].known
        assert known is not None
        return known

    def _gradient(self) -> Tensor:
        raise NotImplementedError("every update is given its vectors")

    def _eigenvalue_errors(self) -> list[tuple[float, ...]]:
        sampled = self._current().difference is not None
        return [() for _ in self._edges] if sampled else self._value_errors

    def state_dict_of(self, run: int) -> dict[str, Any]:
        """What `state_dict` says of one run, with what is common: to be joined with the others'."""
        state = self.state_dict()
        for name in OF_EACH_RUN:
            state[name] = state[name][run : run + 1] if state[name] else state[name]
        for name in ("step", "reference"):
            state[name] = _entry(state[name], run)
        return state

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `state_dict_of` gave of each run, to the last bit.

        Args:
            states: one for each run, all of one step; a run that is not there any more may be stood
                in for by another one's.
        """
        joined = dict(states[0])
        for name in OF_EACH_RUN:
            whole = [entry for state in states for entry in state[name] or ()]
            joined[name] = whole if states[0][name] is not None else None
        for name in ("step", "reference"):
            joined[name] = _together([state[name] for state in states])
        self.load_state_dict(joined)

    def stand_in(self, gone: int, by: int) -> None:
        """Put a copy of one run in the place of another: it decides nothing of its own any more."""
        for tensors in (self._step, self._reference):
            for name, value in vars(tensors).items() if tensors is not None else ():
                if isinstance(value, Tensor) and name not in COMMON:
                    value[gone] = value[by]
        self._edges[gone].load_state_dict(self._edges[by].state_dict())
        self.reports[gone] = self.reports[by]
        for numbers in (self._contents, self._bare):
            if numbers:
                numbers[gone] = numbers[by]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit, as tensors and plain values."""
        return super().state_dict() | {
            "loss": self.objective.state_dict(),
            "policy": self.policy.state_dict(),
            "reference": None if self._reference is None else self._reference.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included.

        What version 0.1 saved lacks what errors are estimated by: the next update solves anew.
        """
        self.objective.load_state_dict(state.get("loss", state))
        if "edges" not in state:
            self.reports = [TrackerReport.from_state(report) for report in state["reports"]]
            return
        self._edges = [BulkEdge() for _ in state["edges"]]
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
        self._step = None if state["step"] is None else LockstepPowerStep(**state["step"])
        saved = state["reference"]
        self._reference = None if saved is None else LockstepReference(**saved)
        self._halves = None if self._reference is None else self._reference.halves


def _entry(stacked: Mapping[str, Any] | None, run: int) -> dict[str, Any] | None:
    """One run's part of tensors that are stacked; None where there are none."""
    if stacked is None:
        return None
    return {
        name: value[run] if isinstance(value, Tensor) and name not in COMMON else value
        for name, value in stacked.items()
    }


def _together(entries: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The parts of all runs as stacked tensors."""
    first = entries[0]
    if first is None:
        return None
    return {
        name: _stacked([entry[name] for entry in entries if entry is not None])
        if isinstance(value, Tensor) and name not in COMMON
        else value
        for name, value in first.items()
    }


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, each in its memory layout: rounding depends on strides."""
    order = sorted(range(parts[0].dim()), key=lambda dim: -parts[0].stride(dim))
    back = sorted(range(len(order)), key=lambda dim: order[dim])
    whole = torch.stack([part.permute(order) for part in parts])
    return whole.permute(0, *(dim + 1 for dim in back))
