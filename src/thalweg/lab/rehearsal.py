"""What does each probe of a study ask for, and what does it cost by itself? It is asked once.

On a problem shrunk to a few samples, its mini-batches likewise, and with random directions in the
place of S_k: nothing is solved or followed for it. What it takes is scaled back up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from thalweg.curvature import FixedSubspace, Objective, Subspace, random_subspace
from thalweg.dynamics import PROBES, BranchPoint, Moment
from thalweg.lab.minibatches import minibatch

if TYPE_CHECKING:
    from thalweg.lab.timing import Clock

APART = ("test", "solved_eigenvalues")
"""Probes whose costs are known otherwise."""


@dataclass(frozen=True)
class Asked:
    """What a probe asked for.

    Attributes:
        seconds: what it takes itself, over all samples, without gradient and subspace.
        gradient, subspace: whether it asked for the gradient of the full loss, and for S_k.
    """

    seconds: float
    gradient: bool
    subspace: bool


def ask_probes(
    names: Sequence[str],
    moment: Moment,
    k: int,
    few: Objective,
    batch_size: int | None,
    clock: Clock,
) -> dict[str, Asked]:
    """Ask each of these probes once.

    Args:
        moment: a step that was made.
        k: dimension of S_k.
        few: the loss over a few of the samples.
        batch_size: of the mini-batches; None where these are all samples.
        clock: to time them.
    """
    scale = moment.objective.num_samples / few.num_samples
    gradient = clock.seconds(lambda: few.value_and_gradient(moment.theta))
    found: dict[str, Asked] = {}
    for name in names:
        if name in APART:
            found[name] = Asked(0.0, gradient=False, subspace=False)
        else:
            source = _StandIn(moment.theta, k)
            shrunk = _shrunk(moment, few, source, batch_size)
            seconds = clock.seconds(lambda: _ask(name, shrunk))  # noqa: B023
            asked = PROBES[name].needs_gradient or "loss_and_gradient" in shrunk.__dict__
            own = max(0.0, seconds - gradient) if asked else seconds
            found[name] = Asked(scale * own, asked, source.was_asked)
    return found


class _StandIn(FixedSubspace):
    """Random directions that note whether they were asked for."""

    def __init__(self, theta: Tensor, k: int) -> None:
        drawn = random_subspace(theta.numel(), k, seed=0, dtype=theta.dtype)
        super().__init__(drawn.to(theta.device))
        self.was_asked = False

    @property
    def subspace(self) -> Subspace:
        """The directions."""
        self.was_asked = True
        return self._subspace


def _shrunk(moment: Moment, few: Objective, source: _StandIn, batch_size: int | None) -> Moment:
    size = None if batch_size is None else batch_size * few.num_samples
    size = None if size is None else max(1, round(size / moment.objective.num_samples))

    def batches(count: int) -> list[Tensor]:
        assert size is not None
        return [minibatch(number, 0, size, few.num_samples) for number in range(count)]

    return replace(
        moment,
        objective=few,
        source=source,
        branch_point=BranchPoint(moment.theta, source._subspace),
        batches=None if size is None else batches,
        _parts={},
    )


def _ask(name: str, moment: Moment) -> None:
    if PROBES[name].needs_gradient:
        _ = moment.gradient
    try:
        PROBES[name].measure(moment)
    except Exception:
        # A stand-in is not all that a step knows. A mistake is said where the probe is in earnest.
        _ = moment.subspace
