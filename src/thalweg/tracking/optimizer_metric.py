"""S_k in the metric of an optimizer, as a source that `SplitUpdate` can split its updates with.

Adam and RMSprop divide by a diagonal D. The dominant subspace in their metric is that of
D^-1/2 H D^-1/2 = W Lambda W^T, and an update delta splits into D^-1/2 W W^T D^1/2 delta and the
rest, orthogonal in the metric D: see `preconditioned.py`.

W is followed by a `SubspaceTracker` in the coordinates D^1/2 theta, whose operator takes D as it is
at each update. Where D moves slowly, a reference taken under an older one still serves: on digits,
after 300 steps of Adam or RMSprop, a step costs 1.4 gradients at an error of 0.2 to 0.3 % in the
norm of D, where a solve takes 29. In Adam's first steps D moves by a factor. The tracker cannot see
the error of that, which was up to 48 % where 0.2 % were estimated, so it begins anew there.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.optim.split import SplitUpdate
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(32, 3), torch.randn(32, 1))
    >>> loss, adam = torch.nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.01)
    >>> source = OptimizerMetricSource(Objective(model, loss, data), k=1, optimizer=adam)
    >>> optimizer = SplitUpdate(adam, source, dominant=0.0, bulk=1.0)
    >>> loss(model(data[0]), data[1]).backward()
    >>> optimizer.step()
    >>> across = optimizer.split.dominant @ (source.metric.diagonal * optimizer.split.bulk)
    >>> abs(float(across)) < 1e-5
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.linalg import mean
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.metric_subspace import MetricSubspace, from_metric, to_metric
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import metric_of, require_preconditioner
from thalweg.tracking.source import Split, TrackerReport
from thalweg.tracking.tracker import SubspaceTracker
from thalweg.tracking.wrapping import unwrapped

# Mean of abs(log(D / D at the reference)) beyond which the tracker begins anew. In steady training
# Adam moves by 0.0007 a step, RMSprop by 0.002.
DRIFT = 0.03


class OptimizerMetricSource:
    """Follows the top k eigenvectors W of D^-1/2 (H + w I) D^-1/2; a `SubspaceSource`.

    D is the optimizer's diagonal at the time of the update, w the weight decay that it adds to the
    gradient, see `metric_of`. `SplitUpdate` asks after the optimizer has made its step, so D holds
    the second moments with which the update was made, while H is that of the point before the step.

    Args:
        objective: the loss.
        k: dimension of the subspace, 1 <= k <= P.
        optimizer: Adam, AdamW or RMSprop, or one that wraps one of them.
        every: move on at every n-th update only; D and W stay in between.
        frozen: solve at the first update, and keep that D and W.
        error, bulk_error, exact, tolerance, seed: as for `SubspaceTracker`, with norms in the
            metric, norm(D^1/2 delta).

    Attributes:
        report: what the last update cost, and how far its result can be trusted.

    Raises:
        InvalidInput: a setting out of its range; an optimizer without such a diagonal.

    Source: Cohen et al. 2022 (arXiv 2207.14484) for the preconditioned Hessian.
    """

    def __init__(
        self,
        objective: Loss,
        k: int,
        optimizer: Optimizer,
        *,
        every: int = 1,
        frozen: bool = False,
        error: float = 0.01,
        bulk_error: float | None = None,
        exact: bool = False,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise invalid("every", every, "an integer >= 1")
        self.objective = objective
        self.k = k
        self.optimizer = unwrapped(optimizer).base
        require_preconditioner(self.optimizer)
        self.every = every
        self.frozen = frozen
        self._new_tracker = partial(
            SubspaceTracker,
            objective,
            k,
            operator=self._operator,
            error=error,
            bulk_error=bulk_error,
            exact=exact,
            tolerance=tolerance,
            seed=seed,
        )
        self._tracker = self._new_tracker()
        self.report = self._tracker.report
        self._calls = 0
        self._diagonal: Tensor | None = None
        # D when the tracker last took its reference.
        self._diagonal_before: Tensor | None = None
        self._shift = 0.0

    @property
    def metric(self) -> MetricSubspace:
        """W and D of the last update: splits updates and gradients."""
        return MetricSubspace(self.subspace, self._metric_diagonal())

    @property
    def subspace(self) -> Subspace:
        """W of the last update: a subspace in the coordinates D^1/2 theta, not in those of theta.

        Its eigenvalues are those of the preconditioned Hessian.
        """
        return self._tracker.subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Move on to theta, with the D of now, and return W there.

        Args:
            theta: the point (P,); None for the model's current parameters.
            vector: an update (P,), whose dominant part the target error is about; None for the
                gradient of the tracker's subset.

        Raises:
            InvalidInput: the optimizer has made no step in which every parameter had a gradient.
            Diverged: the loss or a product is NaN or infinite.
        """
        waits = self.frozen or self._calls % self.every
        if self._diagonal is not None and waits:
            self._calls += 1
            self.report = replace(
                self.report,
                subspace_cost=0.0,
                renewed=False,
                subset=0,
                age=self.report.age + 1,
                checked_error=None,
            )
            return self.subspace
        self._diagonal, self._shift = metric_of(self.optimizer, self.objective)
        self._calls += 1
        if self._has_drifted():
            self._tracker = self._new_tracker()
        scaled = None if vector is None else to_metric(vector, self._diagonal)
        subspace = self._tracker.update(theta, scaled)
        self.report = self._tracker.report
        if self.report.renewed:
            self._diagonal_before = self._diagonal
        return subspace

    def split(self, vector: Tensor) -> Split:
        """Split an update (P,) at the last update, orthogonally in the metric D.

        Errors are in the norm of the metric.
        """
        diagonal = self._metric_diagonal()
        scaled = self._tracker.split(to_metric(vector, diagonal))
        dominant = from_metric(scaled.dominant, diagonal)
        return replace(scaled, dominant=dominant, bulk=vector - dominant)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; the optimizer's own state is not in it."""
        state = {
            "calls": self._calls,
            "diagonal": self._diagonal,
            "diagonal_before": self._diagonal_before,
            "shift": self._shift,
            "report": vars(self.report).copy(),
            "tracker": self._tracker.state_dict(),
        }
        return packed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        state = unpacked(state, sharding_of(self.objective))
        self._calls = state["calls"]
        # Before the tracker, which builds operators with it.
        self._diagonal, self._shift = state["diagonal"], state["shift"]
        self._diagonal_before = state["diagonal_before"]
        self._tracker.load_state_dict(state["tracker"])
        self.report = TrackerReport.from_state(state["report"])

    def _has_drifted(self) -> bool:
        if self._diagonal is None or self._diagonal_before is None:
            return False
        return float(mean((self._diagonal / self._diagonal_before).log().abs())) > DRIFT

    def _metric_diagonal(self) -> Tensor:
        if self._diagonal is None:
            raise InvalidInput("there is no subspace yet; call update() first")
        return self._diagonal

    def _operator(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> Preconditioned:
        """D^-1/2 (H + w I) D^-1/2 over some samples or all, with D and w of the last update."""
        hessian = Hessian(objective, theta, samples, keep_graph=keep_graph)
        return Preconditioned(hessian, self._metric_diagonal(), shift=self._shift)
