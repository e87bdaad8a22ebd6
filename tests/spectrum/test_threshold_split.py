import pytest
import torch

from tests import dense, networks
from tests.spectrum import spectra
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.spectrum.threshold_split import split_at


def right(values: torch.Tensor, vectors: torch.Tensor, tau: float) -> torch.Tensor:
    """The logistic step of the matrix, from its eigenpairs."""
    return vectors * torch.sigmoid((values - tau) / (0.1 * tau)) @ vectors.T


@pytest.mark.parametrize("case", [networks.mlp, networks.silu, networks.cnn])
@pytest.mark.parametrize("part", [0.5, 0.05])
def test_both_parts_are_those_of_the_dense_hessian(case, part: float) -> None:
    case = case().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data, mode="eval")
    values, vectors = torch.linalg.eigh(dense.hessian(dense.flat_loss(case), objective.theta()))
    tau, gradient = part * float(values[-1]), objective.gradient()
    found = split_at(objective, gradient, tau, error=1e-3)
    true = right(values, vectors, tau) @ gradient
    off = float((found.above - true).norm() / gradient.norm())
    assert off < 3 * found.error
    assert found.error < 1e-3
    assert torch.equal(found.above + found.below, gradient) or torch.allclose(
        found.above + found.below, gradient, rtol=1e-14
    )


def test_a_split_within_a_gap_is_that_of_the_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.linspace(1, 0.8, 5), torch.linspace(0.02, -0.02, 75)]).double()
    vector = torch.randn(80, generator=generator).double()
    found = split_at(spectra.Diagonal(values), vector, 0.2, width=0.05, error=1e-8)
    assert torch.allclose(found.above[:5], vector[:5], atol=1e-6)
    assert float(found.above[5:].abs().max()) < 1e-6
    assert found.profile is not None
    assert found.profile.share_above(0.2).value == pytest.approx(
        float(vector[:5].square().sum() / vector.square().sum()), abs=1e-6
    )


def test_in_a_metric_an_update_is_split_there() -> None:
    generator = torch.Generator().manual_seed(0)
    values = spectra.spectrum(3, 50, generator)
    diagonal = 0.1 + torch.rand(50, generator=generator).double()
    update = torch.randn(50, generator=generator).double()
    scaled = values / diagonal
    tau = 0.2 * float(scaled.max())
    found = split_at(spectra.Diagonal(values), update, tau, diagonal=diagonal, error=1e-6)
    # All is diagonal, so that the metric changes where eigenvalues are and not the vectors.
    assert torch.allclose(
        found.above, torch.sigmoid((scaled - tau) / (0.1 * tau)) * update, atol=1e-5
    )


def test_known_eigenvectors_save_products_and_their_error_counts() -> None:
    case = networks.silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    gradient, known = objective.gradient(), top_eigenpairs(objective, 6, tolerance=1e-8)
    tau = 0.15 * float(known.eigenvalues[0])
    alone = split_at(objective, gradient, tau, error=1e-4)
    helped = split_at(objective, gradient, tau, error=1e-4, known=known)
    assert helped.num_matvecs < alone.num_matvecs
    assert torch.allclose(helped.above, alone.above, atol=5e-4 * float(gradient.norm()))
    rough = Subspace(known.basis, known.eigenvalues, angles=torch.full((6,), 0.01).double())
    assert split_at(objective, gradient, tau, error=0.02, known=rough).error > 0.002


def test_without_the_basis_the_split_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    values = spectra.spectrum(1, 120, generator)
    vector = spectra.vectors(values, 1, generator)[:, 0]
    kept, thrifty = (
        split_at(spectra.Diagonal(values), vector, 0.1, error=1e-6, keep_basis=keep)
        for keep in (True, False)
    )
    assert torch.allclose(kept.above, thrifty.above, atol=1e-5)
    assert thrifty.num_matvecs == 2 * kept.num_matvecs - 1


def test_float32_says_what_rounding_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    values = spectra.spectrum(0, 100, generator)
    vector = spectra.vectors(values, 1, generator)[:, 0]
    operator = spectra.Diagonal(values.float())
    with pytest.warns(NotConverged):
        found = split_at(operator, vector.float(), 0.02, error=1e-9)
    true = torch.sigmoid((values - 0.02) / 0.002) * vector
    off = float((found.above.double() - true).norm() / vector.norm())
    assert off / 3 < found.error
    assert found.above.dtype == torch.float32


def test_the_zero_vector_has_two_zero_parts() -> None:
    operator = spectra.Diagonal(torch.ones(4).double())
    found = split_at(operator, torch.zeros(4).double(), 0.5)
    assert not found.above.any()
    assert not found.below.any()
    assert operator.num_matvecs == 0


@pytest.mark.parametrize(
    ("vector", "tau", "words"),
    [
        (torch.ones(5).double(), 0.5, "P=4"),
        (torch.ones(4, 1).double(), 0.5, "P=4"),
        (torch.full((4,), torch.nan).double(), 0.5, "finite"),
        (torch.ones(4).double(), 0.0, "threshold"),
        (torch.ones(4).double(), float("nan"), "threshold"),
    ],
)
def test_what_cannot_be_split_is_refused(vector: torch.Tensor, tau: float, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        split_at(spectra.Diagonal(torch.ones(4).double()), vector, tau)
