from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import thalweg
from thalweg.linalg import (
    all_finite,
    combine,
    coordinates,
    dot,
    dots,
    gram,
    norm,
    orthonormalize,
    project,
    random_unit,
    reject,
    squared_norm,
    tall_qr,
)
from thalweg.loss.objective import Objective
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unfit", [float("nan"), float("inf"), -float("inf")])
def test_one_unfit_element_is_seen_wherever_it_stands(dtype: torch.dtype, unfit: float) -> None:
    for place in range(6):
        tensor = torch.ones(6, dtype=dtype)
        assert all_finite(tensor.reshape(2, 3))
        tensor[place] = unfit
        assert not all_finite(tensor.reshape(2, 3))


def test_infinities_that_cancel_are_seen() -> None:
    assert not all_finite(torch.tensor([float("inf"), 1.0, -float("inf")]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_finite_elements_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert largest.sum().isinf()
    assert all_finite(largest)


def test_gradients_and_products_whose_sum_overflows_are_no_divergence() -> None:
    # Loss theta_0 x_0 + theta_1 x_1, and its square: derivatives near the largest number.
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1e-30)
    huge = torch.tensor([[3e38, 3e38]])
    linear = Objective(model, lambda output, target: output.mean(), (huge, torch.zeros(1)))
    assert linear.gradient().tolist() == huge[0].tolist()
    inputs = huge.sqrt() / 2
    squared = Objective(model, lambda output, target: output.square().mean(), (inputs, inputs))
    image = Hessian(squared) @ torch.ones(2)
    assert image.sum().isinf()
    assert image.tolist() == pytest.approx([3e38, 3e38])
    either = torch.cat([huge, -huge])
    noisy = Objective(model, lambda output, target: output.mean(), (either, torch.zeros(2)))
    image = GradientCovariance(noisy) @ torch.tensor([3e-39, 0.0])
    assert image.sum().isinf()
    assert image.tolist() == pytest.approx([2.7e38, 2.7e38])


LONG = 3_000_017


@pytest.fixture(scope="module")
def long() -> torch.Tensor:
    """Three rows of single precision, whose sums over the columns do not cancel."""
    rows = torch.randn(3, LONG, generator=torch.Generator().manual_seed(0))
    rows[1] += rows[0] / 2
    return rows


def test_sums_over_long_single_precision_vectors_keep_its_digits(long: torch.Tensor) -> None:
    """At once they are off by 1e-4 here, and by 6 % at 10^8 numbers."""
    wide = long.double()
    expected = wide @ wide.mT
    scale = wide.norm(dim=1)
    found = {
        "gram": (gram(long, long), expected),
        "coordinates of a block": (coordinates(long, long.mT), expected),
        "coordinates of a vector": (coordinates(long, long[1]), expected[:, 1]),
        "coordinates in lockstep": (coordinates(long[None], long[None, 1]), expected[None, :, 1]),
        "dot": (dot(long[0], long[1]), expected[0, 1]),
        "norm": (norm(long), scale),
        "norm of columns": (norm(long.mT, dim=0), scale),
        "norm of columns, strided": (norm(long.mT.contiguous(), dim=0), scale),
        "norm in float64": (norm(long, dtype=torch.float64), scale),
        "squared norm": (squared_norm(long), scale.square()),
        "squared norm of one": (squared_norm(long[0]), scale[0].square()),
    }
    for name, (ours, right) in found.items():
        assert ours.shape == right.shape, name
        # Of inner products beside the lengths: those of random vectors cancel.
        error = (ours.double() - right).abs().max() / right.abs().max()
        assert error < 1e-5, name


def test_a_long_single_precision_basis_is_that_of_its_block(long: torch.Tensor) -> None:
    right, factor = torch.linalg.qr(long.mT.double())
    for block in (long.mT, long.mT[None]):
        basis, triangle = tall_qr(block)
        assert (basis.double() - right).norm() < 1e-5
        assert (triangle.double() - factor).norm() < 1e-5 * factor.norm()
    wide = orthonormalize(long.mT).mT.double()
    assert torch.allclose(wide @ wide.mT, torch.eye(3, dtype=torch.float64), atol=2e-6)


# What is multiplied by an operator is the operator's own business.
OPERATORS = {"operator", "hessian", "gauss_newton", "matrix", "half", "_half"}
# Products of k x k matrices, lengths of vectors of k numbers.
SHORT = {
    "both @ shared[..., :k, :]",
    "in_old @ shared.mT",
    "shared[..., :k, :] @ of_bulk.unsqueeze(-1)",
    "turn.T @ between",
    "turn.T @ between @ turn",
    "within[:k].square() @ squares.sum(1)",
    "squares.sum(0) @ within[k:].square()",
    "combination @ within[:step.k]",
    "combination.T @ seen",
    "combination @ to_basis",
    "factor.T @ torch.diag(values)",
    "factor.T @ torch.diag(values) @ factor",
    "factor.mT @ projected",
    "factor.mT @ projected @ factor",
    "inverse @ turn.mT",
    "vectors @ torch.linalg.pinv(triangle)",
    "vectors @ torch.linalg.pinv(triangle.to(vectors))",
    "self.coordinates(flat).norm()",
    "self._within @ inside",
    "self.nodes @ self.weights",
    "self.weights @ (self.nodes - self.mean).square()",
    "(tail[:, None] * vectors[self.last:]).norm(dim=0)",
}


def contractions(path: Path) -> Iterator[str]:
    """Products of matrices and norms that may contract over P, as source text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            by_operator = ast.unparse(node.left).split(".")[-1] in OPERATORS
            if not by_operator and ast.unparse(node) not in SHORT:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            contracts = node.func.attr in ("norm", "vector_norm", "dot", "matmul", "einsum")
            if contracts and ast.unparse(node) not in SHORT:
                yield ast.unparse(node)


# It sees m x m matrices alone.
SMALL = {"compression.py"}


@pytest.mark.parametrize("room", ["operators", "spectrum", "tracking"])
def test_long_vectors_are_contracted_in_linalg_alone(room: str) -> None:
    for path in sorted((Path(thalweg.__file__).parent / room).rglob("*.py")):
        if path.name not in SMALL:
            assert not list(contractions(path)), f"{path.name}: use thalweg.linalg"


def test_functions_do_what_their_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = orthonormalize(torch.randn(40, 3, generator=generator, dtype=torch.float64)).T
    others = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    unit = random_unit(40, generator)
    same = torch.testing.assert_close
    same(norm(unit), torch.ones((), dtype=torch.float64))
    same(gram(rows, others), torch.einsum("kp,bp->kb", rows, others))
    same(coordinates(rows, unit), torch.einsum("kp,p->k", rows, unit))
    same(coordinates(rows, others.T), gram(rows, others))
    same(combine(gram(others, rows), rows), project(rows, others.T).T)
    same(dot(unit, others[0]), (unit * others[0]).sum())
    same(dots(others, others.flip(0), dim=1), torch.full((2,), float(dot(*others))).double())
    same(norm(others), others.square().sum(1).sqrt())
    same(norm(others.T, dim=0), norm(others))
    same(squared_norm(others), norm(others) ** 2)
    left = reject(rows, unit)
    same(left + project(rows, unit), unit)
    assert float(coordinates(rows, left).abs().max()) < 1e-14
