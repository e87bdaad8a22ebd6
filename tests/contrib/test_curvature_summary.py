from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import dense
from tests.networks import silu
from thalweg.contrib.curvature_summary import THRESHOLDS, as_data, curvature_summary
from thalweg.loss.objective import Objective


def test_every_number_is_that_of_the_dense_hessian() -> None:
    case = silu().to(torch.float64)
    found = curvature_summary(Objective(case.model, case.loss, case.data), 4, tolerance=1e-8)
    theta = dense.flat_parameters(case)
    loss = dense.flat_loss(case)
    hessian, gradient = dense.hessian(loss, theta), dense.gradient(loss, theta)
    values, vectors = torch.linalg.eigh(hessian)
    assert found.eigenvalues == pytest.approx(values.flip(0)[:5].tolist(), rel=1e-6)
    assert max(found.residuals) < 1e-7
    assert found.loss == pytest.approx(float(loss(theta)))
    assert found.gradient_norm == pytest.approx(float(gradient.norm()))
    assert abs(found.trace - float(hessian.trace())) < 5 * found.trace_error + 1e-6
    weights = (vectors.T @ gradient).square() / gradient.square().sum()
    for part, (low, high) in zip(THRESHOLDS, found.shares, strict=True):
        share = float(weights[values > part * values[-1]].sum())
        assert low - 1e-6 <= share <= high + 1e-6
    begin = 0
    for layer, module in zip(found.layers, (case.model[0], case.model[2]), strict=True):  # type: ignore[index]
        end = begin + sum(p.numel() for p in module.parameters())
        block = hessian[begin:end, begin:end]
        assert layer.num_parameters == end - begin
        assert layer.sharpness == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-3)
        average = float(block.trace()) / (end - begin)
        assert abs(layer.average - average) < 5 * layer.standard_error + 1e-9
        begin = end


def test_layers_are_numbered_modules_and_text_is_escaped() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 3)
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(inputs)
            for block in self.blocks:
                hidden = torch.tanh(block(hidden))
            return self.scale * hidden

    torch.manual_seed(0)
    data = torch.randn(20, 2), torch.randn(20, 3)
    found = curvature_summary(Objective(Net(), nn.MSELoss(), data), 2)
    names = [layer.name for layer in found.layers]
    assert sorted(names) == ["blocks.0", "blocks.1", "embed", "scale"]
    assert "lambda_1" in str(found)
    assert "<td>blocks.0</td>" in found._repr_html_()
    assert as_data(found)["layers"][0]["num_parameters"] > 0
