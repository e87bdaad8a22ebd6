"""Dominant spaces without second derivatives: from updates of the past, or gradients of samples.

Cheap stand-ins for S_k in an optimizer that treats the dominant and the bulk part of its updates
differently. What steep directions do to a trajectory is seen in it: updates, and gradients of
samples, vary most along them. Both take a space of each block of parameters, such as each tensor,
so that nothing of size P k^2 arises; both renew it every n steps.

Source: updates: Zhou, Wang, Chen, Cheng 2025, BSFA (arXiv 2510.25244); gradients: DOME (arXiv
2507.03545). Neither's code was at hand: windows, centring and what is done before the first window
is full are choices of ours.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> base = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> from thalweg.optim.split import SplitUpdate
    >>> source = UpdateSubspace(k=2, window=4, every=2, blocks=[6, 2])
    >>> optimizer = SplitUpdate(base, source, dominant=1.0, bulk=2.0)
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 3)).square().sum().backward()
    ...     optimizer.step()
    >>> source.subspace.k
    4
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.chunk_multiplier import pull_back
from thalweg.loss.guards.memory import within_memory
from thalweg.loss.objective import Objective, require_objective
from thalweg.sharding import refuse_sharding
from thalweg.tracking.block_subspace import BlockSubspace, principal_directions
from thalweg.tracking.source import Split, TrackerReport, check_every


class _Renewed:
    """Base of both sources: a space that is renewed every n updates, and splits on it."""

    def __init__(self, k: int, *, every: int, blocks: Sequence[int] | None, centered: bool) -> None:
        if k < 1:
            raise invalid("k", k, "an integer >= 1")
        check_every(every)
        self.k = k
        self.every = every
        self.blocks = None if blocks is None else tuple(blocks)
        self.centered = centered
        self.report = TrackerReport(math.nan, 0.0, False, 0, 0)
        self._subspace: BlockSubspace | None = None

    @property
    def subspace(self) -> BlockSubspace:
        """The space of the last update.

        Raises:
            InvalidInput: none is known yet.
        """
        if self._subspace is None:
            raise InvalidInput("there is no subspace yet; call update() more often first")
        return self._subspace

    def _take(self, vectors: Tensor) -> None:
        self._subspace = principal_directions(
            vectors, self.k, blocks=self.blocks, centered=self.centered
        )

    def _space_state(self) -> dict[str, Any]:
        found = self._subspace
        return {
            "rows": None if found is None else list(found.rows),
            "eigenvalues": None if found is None else found.eigenvalues,
        }

    def _load_space(self, state: Mapping[str, Any]) -> None:
        self._subspace = None
        if state["rows"] is not None:
            counts = [len(rows) for rows in state["rows"]]
            self._subspace = BlockSubspace(state["rows"], state["eigenvalues"].split(counts))


class UpdateSubspace(_Renewed):
    """The principal directions of an optimizer's last updates, block by block; a `SubspaceSource`.

    Args:
        k: directions of each block.
        window: updates that are kept, >= 2.
        every: take new directions at every n-th update, from when the window is first full.
        blocks: sizes of the blocks in the order of theta, such as `ParameterLayout.sizes`; None for
            one block.
        centered: subtract the mean update, which is the progress made; the directions are those in
            which updates go to and fro.

    Attributes:
        report: no error is known, no gradient is spent.

    Until the window is full no direction is known, and all of a vector counts as dominant: an
    optimizer whose bulk is amplified begins as what it wraps.

    Raises:
        InvalidInput: k, window or every is out of range.

    Memory: window times P numbers, and k times P for the directions, whatever the blocks.

    Source: Zhou et al. 2025 (arXiv 2510.25244), estimation by principal components of past updates.
    Example: see the module.
    """

    def __init__(
        self,
        k: int,
        *,
        window: int = 16,
        every: int = 10,
        blocks: Sequence[int] | None = None,
        centered: bool = True,
    ) -> None:
        super().__init__(k, every=every, blocks=blocks, centered=centered)
        if window < max(2, k):
            raise invalid("window", window, f"an integer >= {max(2, k)}")
        self.window = window
        self._vectors: Tensor | None = None
        self._count = 0

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> BlockSubspace:
        """Take note of an update and return the space, of dimension 0 until the window is full.

        Args:
            theta: not asked for.
            vector: the update proposed (P,), as `SplitUpdate` gives it; None: only the space is
                asked for.

        Raises:
            InvalidInput: a vector of another length than the blocks or the vectors before; none
                yet.
        """
        if vector is not None:
            self._note(vector)
        if self._subspace is not None:
            return self._subspace
        if self._vectors is None:
            raise InvalidInput("there is no subspace yet; call update() with a vector first")
        nothing = self._vectors[:0]
        return BlockSubspace([nothing], [nothing[:, 0]])

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,); all of it is dominant while no direction is known."""
        if self._subspace is None:
            return Split(vector.clone(), torch.zeros_like(vector), math.nan, math.nan)
        return Split(*self._subspace.split(vector), error=math.nan, bulk_error=math.nan)

    def _note(self, vector: Tensor) -> None:
        if self._vectors is None:
            self._vectors = vector.new_zeros(self.window, len(vector))
        if len(vector) != self._vectors.shape[1]:
            raise invalid("vector", tuple(vector.shape), f"a length of {self._vectors.shape[1]}")
        self._vectors[self._count % self.window] = vector.detach()
        self._count += 1
        since_full = self._count - self.window
        renewed = since_full >= 0 and since_full % self.every == 0
        if renewed:
            self._take(self._vectors)
        age = 0 if renewed else self.report.age + 1
        self.report = TrackerReport(math.nan, 0.0, renewed, 0, age)

    def state_dict(self) -> dict[str, Any]:
        """The vectors kept, their number so far, and the space."""
        state = {"vectors": self._vectors, "count": self._count, "age": self.report.age}
        return {**state, **self._space_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        vectors = state["vectors"]
        self._vectors = None if vectors is None else vectors.clone()
        self._count = state["count"]
        self.report = TrackerReport(math.nan, 0.0, False, 0, state["age"])
        self._load_space(state)


class GradientSubspace(_Renewed):
    """The principal directions of gradients of single samples, block by block; a `SubspaceSource`.

    Those of a few samples, drawn anew each time, in place of the covariance of all: no product with
    it, one vectorized backward pass. (Its top eigenspace over all samples and blocks, followed from
    step to step: `SubspaceTracker(objective, k, operator=GradientCovariance)`.)

    Args:
        objective: the loss, a mean over samples.
        k: directions of each block.
        samples: how many gradients are taken at once, from 2 to the number of samples.
        every: take new directions at every n-th update.
        blocks: as for `UpdateSubspace`.
        centered: the covariance; False for the second moment.
        seed: of the samples drawn.

    Attributes:
        report: its cost in gradients of the full loss; no error is known.

    Raises:
        InvalidInput: an argument is out of range.

    Memory: samples times P numbers while the directions are taken.

    Source: DOME (arXiv 2507.03545): the space removed from updates is that of the gradient
    covariance. Example: see the module.
    """

    def __init__(
        self,
        objective: Objective,
        k: int,
        *,
        samples: int = 32,
        every: int = 10,
        blocks: Sequence[int] | None = None,
        centered: bool = True,
        seed: int = 0,
    ) -> None:
        refuse_sharding(objective, "GradientSubspace")
        super().__init__(k, every=every, blocks=blocks, centered=centered)
        if not max(2, k) <= samples <= objective.num_samples:
            allowed = f"an integer from {max(2, k)} to N = {objective.num_samples}"
            raise invalid("samples", samples, allowed)
        self.objective = require_objective(objective, "GradientSubspace", "single samples' losses")
        self.samples = samples
        self._generator = torch.Generator().manual_seed(seed)
        self._calls = 0

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> BlockSubspace:
        """The space at theta (P,), taken anew at every n-th update; the vector is not asked for.

        Raises:
            Diverged: a loss is NaN or infinite.
        """
        renewed = self._calls % self.every == 0
        self._calls += 1
        if renewed:
            chosen = torch.randperm(
                self.objective.num_samples, generator=self._generator, device="cpu"
            )
            some = chosen[: self.samples].sort().values
            self._take(self._gradients(theta, some))
        cost = self.samples / self.objective.num_samples if renewed else 0.0
        age = 0 if renewed else self.report.age + 1
        self.report = TrackerReport(math.nan, cost, renewed, self.samples * renewed, age)
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) on the space of the last update."""
        return Split(*self.subspace.split(vector), error=math.nan, bulk_error=math.nan)

    def _gradients(self, theta: Tensor | None, chosen: Tensor) -> Tensor:
        """The gradient of each sample's loss at theta, (samples, P), those of all processes."""
        loss = self.objective
        chosen = chosen.to(loss.device)
        weight = loss.prepared(theta, chosen)
        with loss.reduction.together():
            own = within_memory(loss, lambda: self._own_gradients(theta, chosen, weight))
        before, total = loss.reduction.place(len(own))
        rows = own.new_zeros(total, loss.num_parameters)
        rows[before : before + len(own)] = own
        return loss.reduction.sum(rows)

    def _own_gradients(self, theta: Tensor | None, chosen: Tensor, weight: float) -> Tensor:
        """Those of the samples of this process."""
        loss = self.objective
        found = [torch.empty(0, loss.num_parameters, dtype=loss.dtype, device=loss.device)]
        for evaluation in loss.evaluations_of_each(theta, chosen, weight=weight):
            losses = evaluation.outputs[0]
            each = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
            with evaluation.at:
                parts = pull_back([losses], evaluation.leaves, [each], vectorized=True)
            found.append(torch.cat([part.reshape(len(losses), -1) for part in parts], dim=1))
        return torch.cat(found)

    def state_dict(self) -> dict[str, Any]:
        """The space, the number of updates so far, and the state of the draw."""
        state = {"calls": self._calls, "age": self.report.age}
        return {**state, "generator": self._generator.get_state(), **self._space_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._calls = state["calls"]
        self._generator.set_state(state["generator"].cpu())
        self.report = TrackerReport(math.nan, 0.0, False, 0, state["age"])
        self._load_space(state)
