from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import Case
from tests.sampling import few
from thalweg.loss.chunk_multiplier import EVERY_SIZE
from thalweg.loss.guards.precision import has_recurrent_layers
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.loss_operator import LossOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.surroundings import FULL, full_precision

LOWERED = "tf32"
SEEN: list[str] = []


def convolution() -> str:
    return torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


class Noting(nn.Module):
    """An identity that notes in which precision it is evaluated and differentiated."""

    def forward(self, inputs: Tensor) -> Tensor:
        SEEN.append(convolution())
        outputs = inputs * inputs.exp()
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: SEEN.append(convolution()))
        return outputs


class LastState(nn.Module):
    """A recurrent layer, and a linear map of its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.output = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.recurrent(inputs)[0][:, -1])


@pytest.fixture
def _as_if_a_gpu_were_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


@pytest.mark.usefixtures("_as_if_a_gpu_were_in_use")
@pytest.mark.parametrize("operator", [Hessian, GaussNewton, GradientCovariance])
@pytest.mark.parametrize("vectorize_up_to", [0, EVERY_SIZE])
def test_losses_and_products_are_in_full_precision_and_the_users_setting_stays(
    operator: type[LossOperator], vectorize_up_to: int
) -> None:
    SEEN.clear()
    model = nn.Sequential(nn.Linear(3, 4), Noting(), nn.Linear(4, 2))
    data = (torch.randn(6, 3), torch.randn(6, 2))
    objective = Objective(model, nn.MSELoss(), data, vectorize_up_to=vectorize_up_to)
    assert convolution() == LOWERED
    objective.value_and_gradient()
    _ = operator(objective) @ torch.randn(objective.num_parameters, 3)
    # Evaluated twice; inside of `vmap` a backward pass is not seen.
    assert len(SEEN) >= 3
    assert set(SEEN) == {FULL}
    assert convolution() == LOWERED


@pytest.mark.usefixtures("_as_if_a_gpu_were_in_use")
def test_matrix_products_that_the_user_has_lowered_are_lowered_again_afterwards() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = LOWERED
    try:
        with full_precision(), full_precision():
            assert matmul.fp32_precision == convolution() == FULL
        assert matmul.fp32_precision == convolution() == LOWERED
    finally:
        matmul.fp32_precision = before


def test_where_no_gpu_is_in_use_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with full_precision():
        assert convolution() == LOWERED


def test_on_a_gpu_float32_is_not_lowered_by_what_the_user_has_set(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16 * 36, 64), nn.Tanh(), nn.Linear(64, 4),
    )  # fmt: skip
    case = Case(model, nn.MSELoss(), (torch.randn(32, 8, 8, 8), torch.randn(32, 4)))
    wide = case.on(torch.device("cpu")).to(torch.float64)
    exact = Objective(wide.model, wide.loss, wide.data)
    vector = torch.randn(exact.num_parameters, dtype=torch.float64)
    here = case.on(device)
    objective = Objective(here.model, here.loss, here.data)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = LOWERED
    try:
        product = Hessian(objective) @ vector.float().to(device)
        solved = top_eigenpairs(Hessian(objective, keep_graph=True), 3, tolerance=1e-4)
    finally:
        matmul.fp32_precision = before
    # TF32 is off by 1e-3.
    assert dense.relative(product.cpu(), Hessian(exact) @ vector) < 2e-5
    images = Hessian(exact) @ solved.basis.cpu().double()
    residuals = images - solved.eigenvalues.cpu().double() * solved.basis.cpu().double()
    assert float(residuals.norm(dim=0).max() / solved.eigenvalues[0]) < 2e-4
    assert dense.relative(solved.basis.T @ solved.basis, torch.eye(3, device=device)) < 1e-5


@pytest.mark.parametrize("kind", few(1, [nn.RNN, nn.LSTM, nn.GRU]))
def test_recurrent_layers_have_second_derivatives(
    kind: type[nn.RNNBase], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = LastState(kind)
    case = Case(model, nn.MSELoss(), (torch.randn(5, 4, 3), torch.randn(5, 2))).to(torch.float64)
    matrix = dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))
    here = case.on(device)
    objective = Objective(here.model, here.loss, here.data)
    vector = torch.randn(objective.num_parameters, dtype=torch.float64)
    assert has_recurrent_layers(here.model)
    assert dense.relative((Hessian(objective) @ vector.to(device)).cpu(), matrix @ vector) < 1e-9
    assert torch.backends.cudnn.enabled
