"""The engine on the CPU and on a GPU, against dense float64 matrices on the CPU."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import dense
from tests.networks import CASES, Case, descend, digits
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.chunk_multiplier import EVERY_SIZE
from thalweg.loss.guards.memory import ChunkHalved
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton, ResidualHessian
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.restricted import Restricted, coordinates
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.density import spectral_density
from thalweg.spectrum.eigensolver import eigenpairs, top_eigenpairs
from thalweg.spectrum.trace_estimation import trace
from thalweg.tracking.gradient_subspaces import GradientSubspace
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.tracker import SubspaceTracker

CPU = torch.device("cpu")
FEW = torch.tensor([5, 0, 3])
SHIFT = 0.3
TRACKED, TARGET = 10, 0.02


@dataclass(frozen=True)
class Dense:
    """A network's matrices in float64 on the CPU, made without `Objective`."""

    case: Case
    matrices: dict[str, Tensor]
    diagonal: Tensor
    block: Tensor


def dense_matrices(name: str) -> Dense:
    case = CASES[name]().to(torch.float64)
    theta = dense.flat_parameters(case)
    hessian = dense.hessian(dense.flat_loss(case), theta)
    gauss_newton = dense.gauss_newton(case, theta)
    each = torch.stack(
        [
            dense.gradient(dense.flat_loss(case, rows=slice(i, i + 1)), theta)
            for i in range(len(case.data[0]))
        ]
    )
    deviations = each - each.mean(dim=0)
    diagonal = 0.5 + torch.rand(len(theta), generator=generator(1), dtype=torch.float64)
    root = diagonal.sqrt()
    names = dense.parameter_names(case)
    # The first parameter alone: its numbers are the first of theta.
    block = torch.arange(dict(case.model.named_parameters())[names[0]].numel())
    matrices = {
        "Hessian": hessian,
        "Gauss-Newton": gauss_newton,
        "residual": hessian - gauss_newton,
        "covariance": deviations.T @ deviations / len(each),
        "preconditioned": (hessian + SHIFT * torch.eye(len(theta), dtype=torch.float64))
        / root
        / root[:, None],
        "some samples": dense.hessian(dense.flat_loss(case, rows=FEW), theta),
        "a block": hessian[block][:, block],
    }
    return Dense(case, matrices, diagonal, block)


@pytest.fixture(scope="module")
def dense_of() -> Callable[[str], Dense]:
    known: dict[str, Dense] = {}

    def find(name: str) -> Dense:
        if name not in known:
            known[name] = dense_matrices(name)
        return known[name]

    return find


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objective_of(case: Case, **options: Any) -> Objective:
    return Objective(case.model, case.loss, case.data, **options)


def operators(
    objective: Objective, known: Dense, keep_graph: bool
) -> Iterator[tuple[str, SymmetricOperator]]:
    """Every operator, in the names of `Dense.matrices`."""
    kept: dict[str, Any] = {"keep_graph": keep_graph}
    diagonal = known.diagonal.to(objective.device, objective.dtype)
    first = objective.layout.names[0]
    yield "Hessian", Hessian(objective, **kept)
    yield "Gauss-Newton", GaussNewton(objective, **kept)
    yield "residual", ResidualHessian(objective, **kept)
    yield "covariance", GradientCovariance(objective, **kept)
    yield "preconditioned", Preconditioned(Hessian(objective, **kept), diagonal, shift=SHIFT)
    yield "some samples", Hessian(objective, samples=FEW, **kept)
    yield "a block", Restricted(Hessian(objective, **kept), coordinates(objective.layout, [first]))


@pytest.mark.parametrize("name", few(2, ["cnn", "attention", "mlp", "silu"]))
@pytest.mark.parametrize("vectorize_up_to", few(1, [None, 0, EVERY_SIZE]))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), few(1, [(torch.float64, 1e-9), (torch.float32, 1e-4)])
)
def test_every_operator_is_the_dense_matrix(
    name: str,
    vectorize_up_to: int | None,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
    dense_of: Callable[[str], Dense],
) -> None:
    known = dense_of(name)
    case = copy.deepcopy(known.case).to(dtype).on(device)
    objective = objective_of(case, vectorize_up_to=vectorize_up_to, chunk_size=5)
    for kind, operator in operators(objective, known, keep_graph=vectorize_up_to is not None):
        matrix = known.matrices[kind]
        vectors = torch.randn(len(matrix), 4, generator=generator(7), dtype=torch.float64)
        expected = matrix @ vectors
        # The residual part is a difference: as small as it may be, it has the rounding of H.
        whole = known.matrices["Hessian"] @ vectors if kind == "residual" else expected
        scale = tolerance * whole.norm()
        block = vectors.to(device, dtype)
        product = operator @ block
        assert product.device == block.device
        assert (product.cpu().double() - expected).norm() < scale, kind
        single = torch.stack([operator @ vector for vector in block.T[:2]], dim=1)
        assert (single.cpu().double() - expected[:, :2]).norm() < scale, kind


@pytest.mark.parametrize("name", CASES)
def test_a_block_of_parameters_is_that_of_the_dense_matrix(
    name: str, device: torch.device, dense_of: Callable[[str], Dense]
) -> None:
    known = dense_of(name)
    case = known.case.on(device)
    first = dense.parameter_names(case)[0]
    hessian = Hessian(objective_of(case, parameters=[first]))
    matrix = known.matrices["a block"]
    found = hessian @ torch.eye(len(matrix), dtype=torch.float64, device=device)
    assert (found.cpu() - matrix).norm() < 1e-9 * matrix.norm()


@pytest.mark.parametrize("name", few(1, ["attention", "silu", "cnn"]))
def test_eigenpairs_are_those_of_the_dense_matrix(
    name: str, device: torch.device, dense_of: Callable[[str], Dense]
) -> None:
    known = dense_of(name)
    objective = objective_of(known.case.on(device))
    hessian = Hessian(objective, keep_graph=True)
    values = np.linalg.eigvalsh(known.matrices["Hessian"].numpy())[::-1]
    asked: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"k": 4}, values[:4]),
        ({"k": 3, "which": "smallest"}, values[-3:]),
        ({"band": (1, 3)}, values[1:3]),
    ]
    for options, expected in asked:
        found = eigenpairs(hessian, tolerance=1e-8, **options)
        assert found.converged
        assert found.basis.device == objective.device
        assert np.allclose(found.eigenvalues.cpu().numpy(), expected, atol=1e-7 * values[0])
        vectors, own = found.basis.cpu(), found.eigenvalues.cpu()
        residuals = known.matrices["Hessian"] @ vectors - vectors * own
        assert float(residuals.norm(dim=0).max()) < 1e-7 * abs(values).max()


def test_trace_and_density_are_those_of_the_dense_matrix(
    device: torch.device, dense_of: Callable[[str], Dense]
) -> None:
    matrix = dense_of("silu").matrices["Hessian"]
    hessian = Hessian(objective_of(dense_of("silu").case.on(device)), keep_graph=True)
    known = top_eigenpairs(hessian, 2, tolerance=1e-8)
    assert trace(hessian, num_matvecs=len(matrix)).value == pytest.approx(float(matrix.trace()))
    estimate = trace(hessian, num_matvecs=30, known=known)
    assert abs(estimate.value - float(matrix.trace())) < 4 * estimate.standard_error
    spectrum = spectral_density(hessian, probes=4, steps=20, known=known)
    first = spectrum.moment(1)
    error = float(first.value) - float(matrix.trace()) / len(matrix)
    assert abs(error) < 4 * float(first.standard_error)


@pytest.fixture(scope="module")
def trained() -> Case:
    return digits()


def tracker_of(case: Case) -> SubspaceTracker:
    objective = objective_of(case, vectorize_up_to=EVERY_SIZE)
    return SubspaceTracker(objective, TRACKED, error=TARGET, gap_every=0)


@pytest.mark.slow
def test_a_tracked_projection_is_within_its_target(trained: Case, device: torch.device) -> None:
    case = trained.on(device)
    tracker = tracker_of(case)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    errors = []
    for step in range(15):
        tracker.update()
        gradient = tracker.objective.gradient()
        dominant = tracker.split(gradient).dominant
        if step % 3 == 2:
            hessian = Hessian(tracker.objective, keep_graph=True)
            exact = top_eigenpairs(hessian, TRACKED, tolerance=1e-4, check_repeated=0)
            errors.append(float((dominant - exact.project(gradient)).norm() / gradient.norm()))
        descend(case, optimizer, step)
    assert sorted(errors)[-2] < TARGET
    assert max(errors) < 2 * TARGET


def test_a_restored_tracker_goes_on_bit_for_bit(trained: Case, device: torch.device) -> None:
    case = trained.on(device)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    thetas = []
    for step in range(12):
        thetas.append(torch.cat([p.detach().reshape(-1) for p in case.model.parameters()]))
        descend(case, optimizer, step)
    tracker, restored = tracker_of(case), tracker_of(case)
    for theta in thetas[:6]:
        tracker.update(theta)
    # As users save: everything is loaded to the device, the states of generators too.
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    for theta in thetas[6:]:
        assert torch.equal(tracker.update(theta).basis, restored.update(theta).basis)
        assert torch.equal(tracker.split(theta).bulk, restored.split(theta).bulk)
        assert str(tracker.report) == str(restored.report)


def test_the_same_seed_gives_the_same_bits(trained: Case, device: torch.device) -> None:
    first, again = (
        top_eigenpairs(Hessian(objective_of(trained.on(device), vectorize_up_to=EVERY_SIZE)), 3)
        for _ in range(2)
    )
    assert torch.equal(first.basis, again.basis)
    assert torch.equal(first.eigenvalues, again.eigenvalues)


def test_directions_of_gradients_are_those_of_the_cpu(trained: Case, device: torch.device) -> None:
    wide = copy.deepcopy(trained).to(torch.float64)
    here = GradientSubspace(objective_of(wide), 3)
    there = GradientSubspace(objective_of(wide.on(device)), 3)
    assert here.update().overlap(there.update().to("cpu")) > 1 - 1e-8


def test_runs_in_lockstep_are_the_dense_matrix(
    device: torch.device, dense_of: Callable[[str], Dense]
) -> None:
    known = dense_of("silu")
    objective = objective_of(known.case.on(device))
    thetas = objective.theta().expand(3, -1)
    vectors = torch.randn(3, 4, thetas.shape[1], generator=generator(3), dtype=torch.float64)
    expected = vectors @ known.matrices["Hessian"]
    for replay in (False, True):
        runs = LockstepObjective(objective, vectorize_up_to=EVERY_SIZE, replay=replay)
        for _ in range(2):  # recorded, then replayed
            products = runs.hessian_products(thetas, vectors.to(device))
            assert (products.cpu() - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.slow
def test_a_restored_lockstep_goes_on_bit_for_bit(device: torch.device) -> None:
    objective = objective_of(CASES["silu"]().on(device))
    # What is recorded serves both.
    runs = LockstepObjective(objective, vectorize_up_to=EVERY_SIZE, replay=True)
    tracker, restored = (LockstepTracker(runs, 2, error=0.1, gap_every=0) for _ in range(2))
    scales = torch.tensor([[1.0], [1.01]], device=device)
    thetas = objective.theta() * scales
    for _ in range(3):
        gradients = tracker.objective.values_and_gradients(thetas)[1]
        tracker.update(thetas, gradients)
        thetas = thetas - 0.05 * gradients
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    for _ in range(3):
        gradients = tracker.objective.values_and_gradients(thetas)[1]
        tracker.update(thetas, gradients)
        restored.update(thetas, gradients)
        assert torch.equal(tracker.project(gradients), restored.project(gradients))
        assert str(tracker.reports) == str(restored.reports)
        thetas = thetas - 0.05 * gradients


def test_tensors_of_another_device_are_refused(device: torch.device) -> None:
    case = CASES["mlp"]().on(device)
    elsewhere = torch.device("meta" if device == CPU else "cpu")
    objective = objective_of(case)
    theta = objective.theta()
    hessian = Hessian(objective)
    inputs, targets = case.data
    tries: list[tuple[str, Callable[[], object]]] = [
        ("data", lambda: Objective(case.model, case.loss, (inputs.to(elsewhere), targets))),
        ("theta", lambda: Hessian(objective, theta.to(elsewhere))),
        ("vector", lambda: hessian @ theta.to(elsewhere)),
        ("diagonal", lambda: Preconditioned(hessian, theta.exp().to(elsewhere))),
        ("start", lambda: top_eigenpairs(hessian, 1, start=theta.to(elsewhere))),
        (
            "thetas",
            lambda: LockstepObjective(objective).values_and_gradients(theta[None].to(elsewhere)),
        ),
    ]
    for name, attempt in tries:
        with pytest.raises(InvalidInput, match=rf"^{name}: got .* on {elsewhere}|'on {elsewhere}"):
            attempt()


def test_a_loss_that_draws_random_numbers_is_refused_and_they_are_put_back(
    device: torch.device,
) -> None:
    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return functional.dropout(super().forward(input), 0.5, training=True)

    def state() -> Tensor:
        return torch.get_rng_state() if device == CPU else torch.cuda.get_rng_state(device)

    data = (torch.randn(6, 3, device=device), torch.randn(6, 2, device=device))
    objective = Objective(Noisy(3, 2).to(device), nn.MSELoss(), data)
    before = state()
    with pytest.raises(InvalidInput, match="draws random numbers"):
        objective.value()
    assert torch.equal(state(), before)


@pytest.mark.gpu
def test_a_chunk_that_does_not_fit_a_gpu_is_halved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1024), nn.Tanh(), nn.Linear(1024, 1)).cuda()
    inputs = torch.randn(400_000, 4, device="cuda")
    data = (inputs, inputs.sum(1, keepdim=True).sin())
    small = Objective(model, nn.MSELoss(), data, chunk_size=20_000, vectorize_up_to=0)
    large = Objective(model, nn.MSELoss(), data, chunk_size=None, vectorize_up_to=0)
    vector = torch.ones(small.num_parameters, device="cuda")
    expected = Hessian(small) @ vector
    torch.cuda.empty_cache()
    # A chunk of all samples takes some times 1.6 GB.
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.warns(ChunkHalved) as warned:
            product = Hessian(large, keep_graph=False) @ vector
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    said = [str(each.message) for each in warned]
    assert "out of memory with chunks of 400000 samples" in said[0]
    assert large.chunk_size == 400_000 // 2 ** len(said) >= 20_000
    assert dense.relative(product.cpu(), expected.cpu()) < 1e-4
