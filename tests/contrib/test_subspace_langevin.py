from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.sampling import few
from thalweg.contrib.subspace_langevin import (
    Block,
    SubspaceLangevin,
    coordinate_blocks,
    dominant_and_bulk_blocks,
    eigenvector_blocks,
)
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.symmetric import DenseOperator
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker

# Correlated, condition number about 16.
COVARIANCE = torch.tensor([[2.0, 0.8, 0.2], [0.8, 1.0, -0.1], [0.2, -0.1, 0.3]]).double()
PRECISION = torch.linalg.inv(COVARIANCE)
# What a preconditioner is in practice: near the covariance, not equal to it.
NEAR = COVARIANCE + torch.diag(torch.tensor([0.3, 0.1, 0.1])).double()
ONE = torch.eye(3).double()


def steepest() -> Subspace:
    return top_eigenpairs(DenseOperator(PRECISION), 1)


CHAINS: dict[str, tuple[Sequence[Block], float]] = {
    "plain": (coordinate_blocks(3, 3), 0.2),
    "random coordinate": (coordinate_blocks(3), 0.1),
    "unequal blocks of a diagonal": (
        coordinate_blocks(3, 2, diagonal=COVARIANCE.diagonal()),
        0.2,
    ),
    "preconditioned": (eigenvector_blocks(NEAR, 3), 0.5),
    "eigenvectors of a preconditioner": (eigenvector_blocks(NEAR, 1), 0.2),
    "dominant and bulk": (dominant_and_bulk_blocks(steepest(), 1.5, dominant_probability=0.4), 0.3),
}


def matrix(block: Block) -> Tensor:
    """B, column by column."""
    return torch.stack([block.apply(e, 1.0) for e in ONE], dim=1) / block.probability


def stationary_covariance(blocks: Sequence[Block], h: float) -> Tensor:
    """C = E[(I - h B S^-1) C (I - h B S^-1)^T] + 2 h E[B], as one linear system for vec(C)."""
    system, noise = torch.eye(9).double(), torch.zeros(3, 3).double()
    for block in blocks:
        step = ONE - h * matrix(block) @ PRECISION
        system -= block.probability * torch.kron(step, step)
        noise += 2 * h * block.probability * matrix(block)
    return torch.linalg.solve(system, noise.reshape(-1)).reshape(3, 3)


def chain(x: nn.Parameter, sampler: SubspaceLangevin, steps: int) -> Tensor:
    """The points (steps, 3) of a chain on the Gaussian, whose gradient is S^-1 x."""
    found = torch.empty(steps, 3, dtype=x.dtype)
    for step in range(steps):
        x.grad = PRECISION @ x.detach()
        sampler.step()
        found[step] = x.detach()
    return found


@pytest.mark.parametrize("name", few(1, CHAINS))
def test_the_covariance_of_a_long_chain_is_that_of_the_linear_chain(name: str) -> None:
    blocks, h = CHAINS[name]
    exact = stationary_covariance(blocks, h)
    x = nn.Parameter(torch.zeros(3).double())
    points = chain(x, SubspaceLangevin([x], h, blocks=blocks, seed=1), 3100)[100:]
    # Batches longer than the chain remembers are independent: their scatter is the error.
    batches = points.unflatten(0, (30, -1))
    moments = torch.einsum("bni,bnj->bij", batches, batches) / batches.shape[1]
    error = moments.std(0) / 30**0.5
    assert bool((error < 0.15 * exact.trace()).all())
    assert float(((moments.mean(0) - exact) / error).abs().max()) < 4


def test_steps_of_a_finite_size_have_a_bias_that_the_chain_shows() -> None:
    """Against S itself the same test must fail: it can tell C from S."""
    blocks, h = coordinate_blocks(3, 3), 0.35
    exact = stationary_covariance(blocks, h)
    x = nn.Parameter(torch.zeros(3).double())
    points = chain(x, SubspaceLangevin([x], h, blocks=blocks, seed=1), 3000)
    found = points.T @ points / len(points)
    assert torch.linalg.norm(found - exact) < 0.3 * torch.linalg.norm(COVARIANCE - exact)


@pytest.mark.parametrize("name", CHAINS)
def test_the_blocks_add_up_to_the_preconditioner_whatever_their_probabilities(name: str) -> None:
    blocks, _ = CHAINS[name]
    assert sum(block.size for block in blocks) == 3
    assert sum(block.probability for block in blocks) == pytest.approx(1)
    steep = steepest().basis
    expected = {
        "plain": ONE,
        "random coordinate": ONE,
        "unequal blocks of a diagonal": torch.diag(COVARIANCE.diagonal()),
        "dominant and bulk": steep @ steep.T / steepest().eigenvalues
        + (ONE - steep @ steep.T) / 1.5,
    }.get(name, NEAR)
    mean = sum((block.probability * matrix(block) for block in blocks), torch.zeros(3, 3).double())
    assert torch.allclose(mean, expected, atol=1e-9)
    for block in blocks:
        vector = torch.tensor([1.0, -2.0, 3.0]).double()
        twice = block.apply(block.apply(vector, 0.5), 0.5)
        assert torch.allclose(twice, block.apply(vector, 1.0), atol=1e-9)


def test_without_noise_it_is_preconditioned_descent_on_the_block_drawn() -> None:
    blocks = eigenvector_blocks(NEAR, 2)
    x = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]).double())
    sampler = SubspaceLangevin([x], 0.1, blocks=blocks, temperature=0.0)
    assert sampler.drawn is None
    seen = set()
    for _ in range(20):
        before = x.detach().clone()
        chain(x, sampler, 1)
        assert sampler.drawn is not None
        block = blocks[sampler.drawn]
        assert torch.allclose(x, before - 0.1 * matrix(block) @ PRECISION @ before)
        seen.add(sampler.drawn)
    assert seen == {0, 1}


def test_the_preconditioner_of_a_gaussian_makes_one_step_of_descent_exact() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]).double())
    blocks = eigenvector_blocks(COVARIANCE, 3)
    chain(x, SubspaceLangevin([x], 1.0, blocks=blocks, temperature=0.0), 1)
    assert torch.allclose(x, torch.zeros(3).double(), atol=1e-12)


def test_blocks_are_drawn_as_often_as_they_say() -> None:
    drawn = torch.zeros(2)
    blocks = dominant_and_bulk_blocks(steepest(), dominant_probability=0.2)
    x = nn.Parameter(torch.zeros(3).double())
    sampler = SubspaceLangevin([x], 1e-3, blocks=blocks)
    for _ in range(1000):
        chain(x, sampler, 1)
        assert sampler.drawn is not None
        drawn[sampler.drawn] += 1
    # Five standard deviations.
    assert float(drawn[0]) == pytest.approx(200, abs=5 * (1000 * 0.2 * 0.8) ** 0.5)


def test_the_noise_has_twice_the_step_over_the_probability_as_variance() -> None:
    x = nn.Parameter(torch.zeros(3).double())
    sampler = SubspaceLangevin([x], 0.5, blocks=coordinate_blocks(3), temperature=4.0)
    squares = torch.zeros(3).double()
    for _ in range(1500):
        x.data.zero_()
        chain(x, sampler, 1)
        assert int((x != 0).sum()) == 1
        squares += x.detach().square()
    # 2 h temperature a step in the mean; 2 h 3 temperature where drawn, every third step.
    assert torch.allclose(squares / 1500, torch.full((3,), 4.0).double(), rtol=0.3)


def test_a_saved_chain_goes_on_bit_for_bit() -> None:
    blocks = eigenvector_blocks(NEAR, 1)
    x, y = (nn.Parameter(torch.zeros(3).double()) for _ in range(2))
    sampler = SubspaceLangevin([x], 0.1, blocks=blocks, seed=5)
    chain(x, sampler, 10)
    resumed = SubspaceLangevin([y], 0.7, blocks=blocks, seed=6)
    with torch.no_grad():
        y.copy_(x)
    resumed.load_state_dict(sampler.state_dict())
    assert torch.equal(chain(x, sampler, 10), chain(y, resumed, 10))
    with pytest.raises(InvalidInput, match="with 'generator'"):
        resumed.load_state_dict(torch.optim.SGD([y], lr=0.1).state_dict())


def test_the_seed_decides_and_torchs_own_generator_does_not() -> None:
    found = []
    for seed, global_seed in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(global_seed)
        x = nn.Parameter(torch.zeros(3).double())
        found.append(chain(x, SubspaceLangevin([x], 0.1, seed=seed), 5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Bowl(nn.Module):
    """(1/2) theta^T S^-1 theta, theta in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([1.0]).double())
        self.rest = nn.Parameter(torch.tensor([[2.0], [-1.0]]).double())

    def theta(self) -> Tensor:
        return torch.cat([self.first, self.rest.reshape(-1)])

    def forward(self, scale: Tensor) -> Tensor:
        return scale.mean() * self.theta() @ PRECISION @ self.theta() / 2


def test_a_tracked_subspace_gives_the_blocks_at_every_step() -> None:
    model = Bowl()
    objective = Objective(model, None, (torch.ones(9).double(),))
    tracker = SubspaceTracker(objective, 1, exact=True, tolerance=1e-12)
    points: list[Tensor] = []

    def blocks_at(x: Tensor) -> list[Block]:
        points.append(x.clone())
        return dominant_and_bulk_blocks(tracker.update(x), 1.5, dominant_probability=0.4)

    sampler = SubspaceLangevin(model.parameters(), 0.3, blocks=blocks_at, temperature=0.0)
    known = CHAINS["dominant and bulk"][0]
    for _ in range(4):
        sampler.zero_grad()
        before = model.theta().detach()
        model(torch.ones(1).double()).backward()
        sampler.step()
        assert torch.equal(points[-1], before)
        assert sampler.drawn is not None
        expected = before - 0.3 * matrix(known[sampler.drawn]) @ PRECISION @ before
        assert torch.allclose(model.theta(), expected, rtol=1e-8)


class Funnel:
    """v ~ N(0, s^2) and x_i given v ~ N(0, e^v), i = 1, 2; many chains side by side.

    A is 1 on v and e^v on x: no entry depends on its own coordinate, so that div A = 0.
    """

    def __init__(self, deviation: float, chains: int) -> None:
        self.deviation, self.chains = deviation, chains
        generator = torch.Generator().manual_seed(0)
        # All chains begin at v = 0.
        x = torch.randn(2, chains, generator=generator, dtype=torch.float64)
        self.points = nn.Parameter(torch.cat([torch.zeros(1, chains).double(), x]))

    def blocks_at(self, flat: Tensor) -> list[Block]:
        width = flat[: self.chains].exp()
        diagonal = torch.cat([torch.ones_like(width), width, width])
        return coordinate_blocks(len(flat), self.chains, diagonal=diagonal)

    def run(self, sampler: SubspaceLangevin, steps: int) -> tuple[Tensor, Tensor]:
        """v (chains,) and x (2, chains) after so many steps of the gradient written out."""
        for _ in range(steps):
            v, x = self.points.detach()[0], self.points.detach()[1:]
            scaled = x * (-v).exp()
            slope = v / self.deviation**2 + 1 - (x * scaled).sum(0) / 2
            self.points.grad = torch.cat([slope[None], scaled])
            sampler.step()
        return self.points.detach()[0], self.points.detach()[1:]


def test_a_preconditioner_that_follows_the_width_of_a_funnel_finds_its_marginal() -> None:
    deviation, chains, h, steps = 1.5, 2000, 0.02, 700
    funnel = Funnel(deviation, chains)
    sampler = SubspaceLangevin([funnel.points], h, blocks=funnel.blocks_at, seed=0)
    v, x = funnel.run(sampler, steps)
    # A step of r = 3 h leaves x a variance of e^v / (1 - r / 2), as of any linear chain, and the
    # surplus pushes v up: by s^2 (r / 2) / (1 - r / 2) for two x.
    r = 3 * h
    squares = (x.square() * (-v).exp()).mean()
    assert float(squares) == pytest.approx(1 / (1 - r / 2), abs=4 * (2 / (2 * chains)) ** 0.5)
    shift = deviation**2 * (r / 2) / (1 - r / 2)
    assert shift < 0.07
    # Four standard errors of independent chains, 0.13 and 0.28.
    assert float(v.mean()) == pytest.approx(shift, abs=4 * deviation / chains**0.5)
    assert float(v.var()) == pytest.approx(deviation**2, abs=4 * deviation**2 * (2 / chains) ** 0.5)


def test_without_it_a_step_of_that_size_is_lost_in_the_funnels_neck() -> None:
    funnel = Funnel(1.5, 500)
    blocks = coordinate_blocks(1500, 500)
    v, _ = funnel.run(SubspaceLangevin([funnel.points], 0.02, blocks=blocks, seed=0), 700)
    # A chain that overshoots there is thrown far up.
    assert float(v.var()) > 4 * 1.5**2


def test_a_closure_is_called_with_gradients_on_and_its_value_returned() -> None:
    model = Bowl()
    sampler = SubspaceLangevin(model.parameters(), 0.1, temperature=0.0)

    def closure() -> Tensor:
        sampler.zero_grad()
        loss = model(torch.ones(1).double())
        loss.backward()
        return loss

    before = model.theta().detach()
    value = sampler.step(closure)
    assert float(value.detach()) == pytest.approx(float(before @ PRECISION @ before / 2))
    assert torch.allclose(model.theta(), before - 0.1 * PRECISION @ before)


def test_its_steps_can_be_split_along_a_subspace() -> None:
    made = []
    space = random_subspace(3, 1, 0, dtype=torch.float64)
    for dominant, bulk in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        x = nn.Parameter(torch.ones(3).double())
        sampler = SubspaceLangevin([x], 0.1, blocks=eigenvector_blocks(NEAR, 2), seed=3)
        x.grad = PRECISION @ x.detach()
        SplitUpdate(sampler, FixedSubspace(space), dominant, bulk).step()
        made.append(x.detach() - 1)
    whole, inside, outside = made
    assert torch.allclose(inside, space.project(whole))
    assert torch.allclose(inside + outside, whole)


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_what_cannot_be_used_is_refused() -> None:
    x, y = (nn.Parameter(torch.zeros(3).double()) for _ in range(2))
    refused(lambda: SubspaceLangevin([x], 0.0), "lr: got 0")
    refused(lambda: SubspaceLangevin([x], 0.1, temperature=-1), "temperature: got -1")
    refused(lambda: SubspaceLangevin([{"params": [x]}, {"params": [y]}], 0.1), "2 groups")
    refused(lambda: SubspaceLangevin([x], 0.1).step(), "call backward")
    half = coordinate_blocks(3)[:1]
    refused(lambda: SubspaceLangevin([x], 0.1, blocks=half), "positive ones of sum 1")
    refused(lambda: SubspaceLangevin([x], 0.1, blocks=[]), "positive ones of sum 1")
    refused(lambda: coordinate_blocks(3, 4), "size: got 4")
    refused(lambda: coordinate_blocks(3, diagonal=torch.ones(2)), "diagonal: got")
    refused(lambda: coordinate_blocks(3, diagonal=torch.tensor([1.0, 0, 1])), "positive")
    refused(lambda: eigenvector_blocks(torch.ones(3, 2)), "square")
    refused(lambda: eigenvector_blocks(-ONE), "preconditioner: got 'a value of -1'")
    refused(lambda: dominant_and_bulk_blocks(steepest(), 0.0), "bulk_curvature: got 0")
    for probability in (0.0, 1.0):
        refused(
            lambda p=probability: dominant_and_bulk_blocks(steepest(), dominant_probability=p),
            "dominant_probability: got",
        )
    x.grad = torch.zeros(3).double()
    refused(lambda: SubspaceLangevin([x], 0.1, blocks=lambda _: half).step(), "sum 1")


@pytest.mark.slow
def test_on_a_bayesian_logistic_regression_mean_and_covariance_are_the_posteriors() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 3, generator=generator).double() * torch.tensor([3.0, 1.0, 0.3])
    truth = torch.tensor([0.5, -1.0, 1.0]).double()
    labels = torch.bernoulli(torch.sigmoid(inputs @ truth), generator=generator)

    def negative_log_density(points: Tensor) -> Tensor:
        logits = points @ inputs.T
        likelihood = nn.functional.softplus(logits) - labels * logits
        return likelihood.sum(-1) + points.square().sum(-1) / (2 * 4.0)

    mode = torch.zeros(3).double()
    for _ in range(50):
        hessian = torch.autograd.functional.hessian(negative_log_density, mode)
        slope = torch.autograd.functional.jacobian(negative_log_density, mode)
        mode = mode - torch.linalg.solve(hessian, slope)
    laplace = torch.linalg.inv(hessian)  # type: ignore[possibly-undefined]
    # The reference: importance sampling, from a Gaussian wider than the posterior.
    proposal = torch.distributions.MultivariateNormal(mode, 1.5 * laplace)
    torch.manual_seed(0)
    draws = proposal.sample((200_000,))
    weights = torch.softmax(-negative_log_density(draws) - proposal.log_prob(draws), 0)
    mean = weights @ draws
    covariance = (draws - mean).T @ (weights[:, None] * (draws - mean))

    x = nn.Parameter(mode.clone())
    blocks = eigenvector_blocks(laplace, 2)
    sampler = SubspaceLangevin([x], 0.05, blocks=blocks, seed=0)
    points = torch.empty(20_000, 3).double()
    for step in range(len(points)):
        logits = inputs @ x.detach()
        x.grad = inputs.T @ (torch.sigmoid(logits) - labels) + x.detach() / 4.0
        sampler.step()
        points[step] = x.detach()
    # In units of the posterior: 20,000 steps of 0.05 are about 500 independent points.
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    assert float((whiten @ (points.mean(0) - mean)).abs().max()) < 0.16
    found = whiten @ torch.cov(points.T) @ whiten.T
    assert float((found - ONE).abs().max()) < 0.25


def test_a_copy_continues_the_chain_and_another_group_is_refused() -> None:
    x = nn.Parameter(torch.ones(3).double())
    sampler = SubspaceLangevin([x], lr=0.1, blocks=coordinate_blocks(3))
    chain(x, sampler, 3)
    twin, copied = copy.deepcopy((x, sampler))
    assert torch.equal(chain(x, sampler, 5), chain(twin, copied, 5))
    assert torch.equal(x, twin)
    refused(lambda: sampler.add_param_group({"params": [nn.Parameter(x.detach())]}), "2 groups")
    assert len(sampler.param_groups) == 1


def test_a_split_step_that_fails_draws_nothing() -> None:
    x = nn.Parameter(torch.ones(3).double())
    sampler = SubspaceLangevin([x], lr=0.1, blocks=coordinate_blocks(3))
    chain(x, sampler, 3)
    source = FixedSubspace(random_subspace(3, 1, 0, dtype=torch.float64))
    split = SplitUpdate(sampler, source, 0.0, 1.0, parameters=[x])
    twin, copied = copy.deepcopy((x, sampler))
    source.split = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ZeroDivisionError):
        split.step()
    assert torch.equal(chain(x, sampler, 5), chain(twin, copied, 5))
