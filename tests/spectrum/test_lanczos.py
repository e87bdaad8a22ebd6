import pytest
import torch

from tests.spectrum import spectra
from thalweg.errors import Diverged, InvalidInput
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.lanczos import LanczosSpace
from thalweg.spectrum.subspace import Subspace


def dense(size: int = 40) -> DenseOperator:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return DenseOperator((matrix + matrix.T) / 2)


def starts(count: int, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def basis(space: LanczosSpace) -> torch.Tensor:
    return torch.stack([space.combine(row) for row in torch.eye(space.dimension).double()], dim=1)


@pytest.mark.parametrize("count", [1, 3])
def test_the_basis_is_orthonormal_and_the_products_are_what_t_and_s_say(count: int) -> None:
    operator, space = dense(), LanczosSpace(dense(), starts(count))
    for _ in range(6):
        space.grow()
    v, seen = basis(space), space.compression()
    assert torch.allclose(v.T @ v, torch.eye(6 * count).double(), atol=1e-13)
    assert torch.allclose(v.T @ operator.matrix @ v, seen.projected, atol=1e-12)
    outside = operator.matrix @ v - v @ seen.projected
    assert torch.allclose(outside.T @ outside, seen.coupling.T @ seen.coupling, atol=1e-11)
    unit = starts(count) / starts(count).norm(dim=0)
    assert torch.allclose(v @ space.coordinates, unit, atol=1e-13)
    assert space.num_matvecs == 6 * count


def test_a_start_that_depends_on_the_others_costs_nothing() -> None:
    first, second = starts(2).T
    space = LanczosSpace(dense(), torch.stack([first, second, first - 2 * second], dim=1))
    for _ in range(3):
        space.grow()
    assert space.num_matvecs == 6
    third = space.combine(space.coordinates[:, 2]) * space.lengths[2]
    assert torch.allclose(third, first - 2 * second, atol=1e-12)


def test_the_space_ends_where_it_is_invariant() -> None:
    operator = spectra.Diagonal(torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0]).double())
    space = LanczosSpace(operator, torch.ones(5, 1).double())
    while not space.is_invariant:
        space.grow()
    assert space.dimension == 2
    assert len(space.compression().coupling) == 0


def test_without_its_basis_the_space_is_the_same_and_is_combined_in_a_second_pass() -> None:
    kept, thrifty = (LanczosSpace(dense(), starts(2), keep_basis=keep) for keep in (True, False))
    for space in (kept, thrifty):
        for _ in range(8):
            space.grow()
    assert torch.allclose(kept.compression().projected, thrifty.compression().projected, atol=1e-9)
    coefficients = torch.linspace(1, 2, 16).double()
    assert torch.allclose(kept.combine(coefficients), thrifty.combine(coefficients), atol=1e-9)
    assert (kept.num_matvecs, thrifty.num_matvecs) == (16, 16 + 14)


def test_known_eigenvectors_are_in_the_basis_without_a_product() -> None:
    operator = dense()
    values, vectors = torch.linalg.eigh(operator.matrix)
    known = Subspace(vectors[:, -4:].flip(1), values[-4:].flip(0))
    space = LanczosSpace(operator, starts(1), known)
    for _ in range(5):
        space.grow()
    assert (space.dimension, operator.num_matvecs) == (9, 5)
    v = basis(space)
    assert torch.allclose(v.T @ operator.matrix @ v, space.compression().projected, atol=1e-11)


def test_an_operator_that_is_not_symmetric_is_refused() -> None:
    matrix = dense().matrix + torch.triu(dense().matrix)
    space = LanczosSpace(DenseOperator(matrix), starts(1))
    with pytest.raises(InvalidInput, match="a symmetric operator"):
        [space.grow() for _ in range(3)]


def test_a_product_that_is_not_finite_is_told() -> None:
    operator = dense()
    operator.matrix[0, 0] = torch.nan
    with pytest.raises(Diverged, match="NaN or infinite"):
        LanczosSpace(operator, starts(1)).grow()


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (torch.zeros(40, 1).double(), "not zero"),
        (torch.full((40, 1), torch.inf).double(), "finite vectors"),
        (torch.ones(39, 1).double(), "P=40"),
    ],
)
def test_starts_that_no_space_can_grow_from_are_refused(start: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        LanczosSpace(dense(), start)
