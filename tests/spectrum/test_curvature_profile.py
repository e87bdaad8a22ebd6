import pytest
import torch

from tests import dense, networks
from tests.spectrum import spectra
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.curvature_profile import curvature_profile, curvature_profiles
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs


def operator_and_vector(size: int = 60) -> tuple[spectra.Diagonal, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = spectra.spectrum(3, size, generator)
    return spectra.Diagonal(values), spectra.vectors(values, 1, generator)[:, 0]


def test_mean_and_spread_are_exact_after_two_products() -> None:
    operator, vector = operator_and_vector()
    weights = vector.square() / vector.square().sum()
    profile = curvature_profile(operator, vector, error=1e9)
    mean = float(weights @ operator.eigenvalues)
    assert profile.mean == pytest.approx(mean)
    spread = float(weights @ (operator.eigenvalues - mean).square()) ** 0.5
    assert profile.spread == pytest.approx(spread)
    assert profile.length == pytest.approx(float(vector.norm()))


@pytest.mark.parametrize("case", [networks.silu, networks.cnn])
def test_shares_of_a_gradient_are_those_of_the_dense_hessian(case) -> None:
    case = case().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data, mode="eval")
    theta = objective.theta()
    values, vectors = torch.linalg.eigh(dense.hessian(dense.flat_loss(case), theta))
    gradient = objective.gradient()
    parts = (vectors.T @ gradient).square() / gradient.square().sum()
    taus = [0.5 * float(values[-1]), 0.05 * float(values[-1])]
    profile = curvature_profile(objective, gradient, thresholds=taus, error=1e-6)
    assert profile.converged
    assert profile.caveat == ""
    for tau in taus:
        smooth = profile.share_above(tau, width=0.1)
        right = float(parts @ torch.sigmoid((values - tau) / (0.1 * tau)))
        assert smooth.value == pytest.approx(right, abs=2e-6)
        sharp = profile.share_above(tau)
        assert sharp.lower - 1e-9 <= float(parts[values > tau].sum()) <= sharp.upper + 1e-9


def test_the_share_is_the_squared_alignment_where_a_gap_is() -> None:
    case = networks.mlp().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    solved = top_eigenpairs(objective, 4, tolerance=1e-9)
    gradient, values = objective.gradient(), solved.eigenvalues
    ratios = values[1:] / values[:-1]
    k = int(ratios.argmin()) + 1
    tau = float((values[k - 1] * values[k]).sqrt())
    share = curvature_profile(objective, gradient, thresholds=[tau], error=1e-9).share_above(tau)
    chi = top_eigenpairs(objective, k, tolerance=1e-9).alignment(gradient)
    assert float(share) == pytest.approx(chi**2, abs=1e-6)


def test_vectors_that_share_a_space_are_profiled_as_alone() -> None:
    operator, vector = operator_and_vector()
    other = vector.flip(0)
    together = curvature_profiles(operator, [vector, other, vector + other], error=1e-9)
    for profile, alone in zip(together, (vector, other, vector + other), strict=True):
        single = curvature_profile(operator, alone, error=1e-9)
        found, right = (p.share_above(0.3, width=0.1).value for p in (profile, single))
        assert found == pytest.approx(right, abs=1e-8)
    assert together[0].num_matvecs == together[2].num_matvecs
    columns = curvature_profiles(operator, torch.stack([vector, other], dim=1), error=1e-9)
    assert [p.mean for p in columns] == pytest.approx([p.mean for p in together[:2]])


@pytest.mark.parametrize("vectors", [[], [torch.ones(60, 1)], [torch.ones(60), torch.ones(59)]])
def test_vectors_of_other_shapes_are_refused(vectors: list[torch.Tensor]) -> None:
    with pytest.raises(InvalidInput, match="vectors"):
        curvature_profiles(operator_and_vector()[0], vectors)


def test_the_error_asked_for_decides_the_products() -> None:
    operator, vector = operator_and_vector()
    rough, fine = (
        curvature_profile(operator, vector, thresholds=[0.2], error=error).num_matvecs
        for error in (0.1, 1e-6)
    )
    assert rough < fine


def test_a_limit_of_products_is_told() -> None:
    operator, vector = operator_and_vector()
    with pytest.warns(NotConverged, match="after 4 products"):
        profile = curvature_profile(operator, vector, error=1e-9, max_matvecs=4)
    assert not profile.converged


def test_bounds_that_are_estimates_say_why() -> None:
    case = networks.silu()
    objective = Objective(case.model, case.loss, case.data)
    some = Hessian(objective, samples=torch.arange(5))
    profile = curvature_profile(some, objective.gradient(), error=0.1)
    assert profile.caveat == "products are in float32; over 5 of 13 samples"


def test_a_spectrum_without_curvature_above_zero_has_no_share_above() -> None:
    operator = spectra.Diagonal(-torch.arange(1.0, 9.0).double())
    profile = curvature_profile(operator, torch.ones(8).double())
    assert profile.share_above(0.1).upper < 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"error": 0.0}, "error"),
        ({"width": -1.0}, "width"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"thresholds": [0.0]}, "threshold"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], words: str) -> None:
    operator, vector = operator_and_vector()
    with pytest.raises(InvalidInput, match=words):
        curvature_profile(operator, vector, **settings)  # type: ignore[arg-type]
