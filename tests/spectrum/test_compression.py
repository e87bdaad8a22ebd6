import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.spectrum import spectra
from thalweg.spectrum.compression import Compression, continued, smooth_step
from thalweg.spectrum.lanczos import LanczosSpace

WIDTH = 0.1


def cases(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, float, LanczosSpace]]:
    """Eigenvalues, unit vectors, a threshold, and the Krylov space of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    for case in range(count):
        values = spectra.spectrum(case % spectra.KINDS, 150, generator)
        b = int(torch.randint(1, 4, (1,), generator=generator))
        starts = spectra.vectors(values, b, generator)
        space = LanczosSpace(spectra.Diagonal(values), starts)
        for _ in range(int(torch.randint(3, 25, (1,), generator=generator))):
            space.grow()
        yield values, starts / starts.norm(dim=0), spectra.threshold(generator), space


def check_bounds(count: int) -> None:
    for values, starts, tau, space in cases(count):
        seen = space.compression()
        for vector, coordinates in zip(starts.T, space.coordinates.T, strict=True):
            least, most = seen.step_bounds(coordinates, tau)
            share = float(vector[values > tau].square().sum())
            assert least - 1e-9 <= share <= most + 1e-9


def check_errors(count: int) -> None:
    """At least a third of the truth at 95 %, never below a tenth; of f(A) v right in the median."""
    filtered, shares = [], []
    for values, starts, tau, space in cases(count, seed=1):
        seen, right = space.compression(), smooth_step(tau, WIDTH)(values)
        for vector, coordinates in zip(starts.T, space.coordinates.T, strict=True):
            found = seen.step(coordinates, tau, WIDTH)
            true = float((space.combine(found.coordinates) - right * vector).norm())
            if true > 1e-9:
                filtered.append(found.error / true)
            true = abs(found.mean - float((right * vector.square()).sum()))
            if true > 1e-9:
                shares.append(found.mean_error / true)
    for ratios in (torch.tensor(filtered), torch.tensor(shares)):
        assert len(ratios) > count / 2
        assert ratios.min() > 0.1
        assert ratios.quantile(0.05) > 1 / 3
    assert 0.7 < torch.tensor(filtered).median() < 1.5
    # That of a share is from above.
    assert 0.7 < torch.tensor(shares).median() < 6


def test_the_bounds_of_a_sharp_step_hold() -> None:
    check_bounds(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_bounds_of_a_sharp_step_hold_in_ten_thousand_cases() -> None:
    check_bounds(5_000)  # two vectors each in the mean


def test_the_errors_of_a_smooth_step_tell_the_truth() -> None:
    check_errors(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_errors_of_a_smooth_step_tell_the_truth_in_two_thousand_cases() -> None:
    check_errors(2_000)


def test_bounds_close_in_a_gap_and_are_chi_squared_there() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.linspace(1, 0.5, 5), torch.linspace(0.05, -0.05, 95)]).double()
    start = torch.randn(100, 1, generator=generator).double()
    space = LanczosSpace(spectra.Diagonal(values), start)
    for _ in range(14):
        space.grow()
    least, most = space.compression().step_bounds(space.coordinates[:, 0], 0.2)
    chi_squared = float(start[:5].square().sum() / start.square().sum())
    # Closed bounds are the number itself, up to rounding.
    assert least - 1e-14 <= chi_squared <= most + 1e-14
    assert most < least + 1e-6


def test_bounds_where_the_threshold_is_an_eigenvalue_that_has_been_found() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]).double()
    space = LanczosSpace(spectra.Diagonal(values), torch.ones(5, 1).double())
    while not space.is_invariant:
        space.grow()
    least, most = space.compression().step_bounds(space.coordinates[:, 0], 2.0)
    assert least == pytest.approx(0.2)
    assert most == pytest.approx(0.4)


def test_a_side_without_nodes_counts_in_the_error() -> None:
    """All nodes are above tau, so that no continuation of T knows what may be below."""
    values = torch.cat([torch.linspace(1, 0.9, 20), torch.zeros(1)]).double()
    start = torch.cat([torch.ones(20), torch.full((1,), 0.02)]).double()[:, None]
    space = LanczosSpace(spectra.Diagonal(values), start)
    space.grow()
    found = space.compression().step(space.coordinates[:, 0], 0.3, WIDTH)
    true = 0.02 / math.sqrt(20 + 0.02**2)
    assert found.error > true


def test_continuing_repeats_the_last_blocks() -> None:
    rows = [[1.0, 0.25, 0.0], [0.25, 2.0, 0.5], [0.0, 0.5, 3.0], [0.0, 0.0, 0.75]]
    projected, coupling = torch.tensor(rows, dtype=torch.float64).split([3, 1])
    longer = continued(projected, coupling, pattern=2, steps=3)
    assert longer.diagonal().tolist() == [1, 2, 3, 2, 3, 2]
    assert longer.diagonal(1).tolist() == [0.25, 0.5, 0.75, 0.5, 0.75]
    assert torch.equal(longer, longer.T)


def test_what_is_invariant_has_no_error() -> None:
    projected = torch.diag(torch.tensor([2.0, 1.0]).double())
    seen = Compression(projected, projected[:0], (), steps=2)
    found = seen.step(torch.tensor([0.6, 0.8]).double(), 1.5, WIDTH)
    assert found.error == found.mean_error == 0
