from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import dense
from tests.networks import Case, silu
from thalweg.errors import InvalidInput
from thalweg.measure.watch import watch


def watched(case: Case, optimizer: torch.optim.Optimizer, **options: Any) -> list[dict[str, Any]]:
    with watch(case.model, case.loss, case.data, optimizer, quiet=True, **options) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(case.model(case.data[0]), case.data[1]).backward()
            optimizer.step()
    return watcher.history


def test_alignments_are_those_of_a_split_at_the_threshold() -> None:
    case = silu().to(torch.float64)
    hessian = dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    row = watched(case, optimizer, threshold=0.2, error=1e-6, every=5)[0]
    case = silu().to(torch.float64)
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    gradient = torch.cat([p.grad.flatten() for p in case.model.parameters()])
    values, vectors = torch.linalg.eigh(hessian)
    tau = 0.2 * float(values[-1])
    above = torch.sigmoid((values - tau) / (0.1 * tau)) * (vectors.T @ gradient)
    assert row["failure"] is None
    expected = float(above.norm() / gradient.norm())
    assert row["alignment_gradient"] == pytest.approx(expected, abs=1e-4)
    assert row["alignment_update"] == pytest.approx(expected, abs=1e-4)
    assert row["sharpness"] == pytest.approx(float(values[-1]), rel=1e-3)


def test_beyond_the_edge() -> None:
    case = silu()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=50.0)
    row = watched(case, optimizer, threshold=1.0, relative_to="edge", every=5)[0]
    assert row["failure"] is None
    assert row["alignment_gradient"] > 0


def test_where_the_gap_is_closed_alignments_are_by_the_share_and_the_row_says_so() -> None:
    """Two outputs that are treated alike: every eigenvalue is there twice, k = 1 cuts a pair."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2, bias=False).double()
    scale = torch.tensor([4.0, 1.0, 0.5, 0.3, 0.2, 0.1]).double()
    data = (torch.randn(80, 6).double() * scale, torch.randn(80, 2).double())
    case = Case(model, torch.nn.MSELoss(), data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = watched(case, optimizer, k=1, every=1)
    assert all("share above lambda_k" in row["caveat"] for row in rows)
    _, vectors = torch.linalg.eigh(data[0].T @ data[0] / 80)
    torch.manual_seed(0)
    weight = torch.nn.Linear(6, 2, bias=False).double().weight.detach()
    gradient = (weight @ data[0].T - data[1].T) @ data[0] / 80
    inside = float((gradient @ vectors[:, -1]).norm() / gradient.norm())
    # lambda_1 is the threshold itself: half of what lies there is above.
    assert rows[0]["alignment_gradient"] == pytest.approx(0.5**0.5 * inside, rel=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.1, "k": 3}, "None with a threshold"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 0.1, "relative_to": "lambda"}, "relative_to"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    case = silu()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match=words):
        watch(case.model, case.loss, case.data, optimizer, quiet=True, **options)


def test_the_edge_of_adam_is_in_its_own_metric() -> None:
    case = silu()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="own metric"):
        watch(
            case.model,
            case.loss,
            case.data,
            optimizer,
            quiet=True,
            threshold=1.0,
            relative_to="edge",
        )
