from __future__ import annotations

import pytest
import torch

from thalweg.errors import InvalidInput
from thalweg.problems.losses import MeanCrossEntropy, MeanSquaredError, Output

OUTPUT = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0, 3])
ONE_HOT = torch.eye(4, dtype=torch.float64)[CLASSES]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_mse_is_the_factor_times_the_sum_over_outputs_averaged_over_samples(factor: float) -> None:
    expected = sum(
        factor * (OUTPUT[i, j] - ONE_HOT[i, j]) ** 2 / 7 for i in range(7) for j in range(4)
    )
    torch.testing.assert_close(MeanSquaredError(factor=factor).build()(OUTPUT, ONE_HOT), expected)


def test_the_default_factor_is_the_papers_half() -> None:
    assert MeanSquaredError().factor == 0.5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
def test_mse_goes_through_forward_mode_on_top_of_reverse() -> None:
    loss = MeanSquaredError().build()
    gradient = torch.func.grad(lambda output: loss(output, ONE_HOT))
    product = torch.func.jvp(gradient, (OUTPUT,), (torch.ones_like(OUTPUT),))[1]
    torch.testing.assert_close(product, torch.full_like(OUTPUT, 1 / 7))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"output of shape \(7, 4\), target of \(7, 1\)"):
        MeanSquaredError().build()(OUTPUT, ONE_HOT[:, :1])


def test_cross_entropy_is_the_mean_of_minus_log_softmax() -> None:
    log_probability = OUTPUT - OUTPUT.exp().sum(dim=1, keepdim=True).log()
    expected = -log_probability[torch.arange(7), CLASSES].mean()
    torch.testing.assert_close(MeanCrossEntropy().build()(OUTPUT, CLASSES), expected)


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_output_is_the_mean_of_the_models_own_losses(shape: tuple[int, ...]) -> None:
    losses = OUTPUT[:, 0].reshape(shape)
    torch.testing.assert_close(Output().build()(losses, ONE_HOT), OUTPUT[:, 0].sum() / 7)


def test_output_refuses_more_than_one_number_a_sample() -> None:
    with pytest.raises(InvalidInput, match=r"shape \(7, 4\), allowed: one number a sample"):
        Output().build()(OUTPUT, ONE_HOT)
