"""What do finding S_k and following it cost? Measured where there is time, else counted.

Counted in products with the Hessian, as many as problems took that are known. A tracker's cost
falls as it settles: at first its reference is renewed at most steps, later at every twentieth or
less (see `RenewalPolicy`). So there are two: what the first steps cost, and what settled ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thalweg.curvature.operators import PRODUCT_COST
from thalweg.curvature.renewal import RenewalPolicy
from thalweg.lab.asking import samples_of_hessian
from thalweg.lab.run.building import make_source, solve

if TYPE_CHECKING:
    from thalweg.lab.run import Setup
    from thalweg.lab.spec import Spec
    from thalweg.lab.timing import Clock

STEPS = 8
PRODUCTS_BEGIN, PRODUCTS_SOLVE = 3, 6
"""Products with the Hessian for each of the top k eigenpairs, and for each of the top 2k, whose
gap is smaller: counted on digits, MNIST, CIFAR-10 and SST-2 at their initial parameters."""
PRODUCTS_GAP = 15
"""The most that a tracker's look at lambda_{k+1} takes."""


@dataclass(frozen=True)
class SubspaceCosts:
    """In seconds; 0 for what nothing asks for.

    Attributes:
        begin: finding S_k for the first time, or anew.
        tracked, settled: following it by an update, in the first steps, and in the long run.
        solve: 2k eigenpairs from scratch.
        samples: those of the loss whose S_k it is.
        counted: whether any of these is counted, not measured.
    """

    begin: float = 0.0
    tracked: float = 0.0
    settled: float = 0.0
    solve: float = 0.0
    samples: int = 0
    counted: bool = False


def subspace_costs(
    spec: Spec,
    setup: Setup,
    seed: int,
    product: float,
    make_step: Callable[[], object],
    clock: Clock,
    *,
    follows: bool,
    solves: bool,
) -> SubspaceCosts:
    """Measure or count them.

    Args:
        product: seconds of the product of all samples with one vector.
        make_step: moves the model's parameters on.
        follows, solves: whether anything asks for S_k, and for 2k eigenpairs.
    """
    costs = SubspaceCosts()
    if follows:
        costs = _following(spec, setup, seed, product, make_step, clock)
    if not solves:
        return costs
    return _with_solve(costs, spec, setup, product, clock)


def counted_following(spec: Spec, setup: Setup, product: float) -> SubspaceCosts:
    """What finding and following S_k cost, by the products that they take."""
    samples = samples_of_hessian(spec, spec.phases[-1], setup.objective.num_samples)
    product *= samples / setup.objective.num_samples
    settled, renewing = (product * n for n in _products(samples, setup.k, spec.subspace.error))
    if spec.subspace.source == "next":
        begin = product * PRODUCTS_SOLVE * 2 * setup.k
    else:
        begin = product * (PRODUCTS_BEGIN * setup.k + PRODUCTS_GAP) + renewing
    if spec.subspace.source != "tracker":
        return SubspaceCosts(begin, begin, begin, samples=samples, counted=True)
    return SubspaceCosts(begin, renewing, settled, samples=samples, counted=True)


def _following(
    spec: Spec,
    setup: Setup,
    seed: int,
    product: float,
    make_step: Callable[[], object],
    clock: Clock,
) -> SubspaceCosts:
    counted = counted_following(spec, setup, product)
    # Where each step has samples of its own, there is nothing to follow without one.
    of_each_step = not isinstance(spec.subspace.samples, int | None)
    if of_each_step or not clock.affords(counted.begin + counted.tracked):
        return counted
    source = make_source(spec, setup, seed)
    begin = clock.seconds(source.update)
    if spec.subspace.source != "tracker":
        return replace(counted, begin=begin, tracked=begin, settled=begin, counted=False)
    seconds: list[float] = []
    gradients: list[float] = []
    while len(seconds) < STEPS and clock.affords(max(seconds, default=0.0)):
        make_step()
        seconds.append(clock.seconds(source.update))
        gradients.append(source.report.gradients)
    if not seconds:
        return replace(counted, begin=begin)
    tracked = sum(seconds) / len(seconds)
    settled = tracked * _share_when_settled(spec, setup, counted.samples, gradients)
    return replace(counted, begin=begin, tracked=tracked, settled=settled, counted=False)


def _share_when_settled(spec: Spec, setup: Setup, samples: int, gradients: list[float]) -> float:
    """What share of the cost of these updates, counted in gradients, settled ones have."""
    if not sum(gradients):
        return 1.0
    settled, _ = _products(samples, setup.k, spec.subspace.error)
    return min(1.0, PRODUCT_COST * settled * len(gradients) / sum(gradients))


def _products(num_samples: int, k: int, error: float) -> tuple[float, float]:
    """Products an update takes in the long run, and with a renewal at each, over all samples."""
    policy = RenewalPolicy(num_samples, error)
    share = policy.subset / num_samples
    renewal = k * (1 + 1.5 * share)
    return (k + 1) * share + renewal / policy.period, (k + 1) * share + renewal


def _with_solve(
    costs: SubspaceCosts, spec: Spec, setup: Setup, product: float, clock: Clock
) -> SubspaceCosts:
    pairs = 2 * setup.k
    expected = PRODUCTS_SOLVE * pairs * product
    if not clock.affords(expected):
        return replace(costs, solve=expected, counted=True)
    objective, tolerance = setup.objective, spec.subspace.tolerance
    theta = objective.theta()
    seconds = clock.seconds(lambda: solve(objective, theta, pairs, tolerance))
    return replace(costs, solve=seconds)
