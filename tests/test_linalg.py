from __future__ import annotations

import pytest
import torch

from thalweg.linalg import all_finite
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
