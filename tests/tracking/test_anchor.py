from __future__ import annotations

import torch
from torch import Tensor

from thalweg.tracking.anchor import EARLY, IDLE, Anchors
from thalweg.tracking.reference import Reference
from thalweg.tracking.refresh_policy import RefreshPolicy


def reference(mark: float) -> Reference:
    rows = torch.full((2, 3), mark)
    return Reference(rows, rows, rows, torch.arange(4))


def point(x: float) -> Tensor:
    return torch.tensor([x, 0.0])


def serve(anchors: Anchors, x: float, times: int = 1) -> float:
    """Which reference serves at x, for so many updates."""
    for _ in range(times):
        found = anchors.serve(point(x))
        anchors.policy.record(0.001, 0.001)
    return float(found.rows[0, 0])


def begun() -> Anchors:
    anchors = Anchors(100, 0.01)
    anchors.renew(reference(1.0), point(0.0), anchors.plan())
    return anchors


def renew(anchors: Anchors, mark: float, x: float) -> None:
    anchors.renew(reference(mark), point(x), anchors.plan())


def test_a_reference_that_served_long_is_replaced() -> None:
    anchors = begun()
    serve(anchors, 0.1, EARLY)
    renew(anchors, 2.0, 1.0)
    assert serve(anchors, 0.0) == serve(anchors, 1.0) == 2.0


def test_a_trajectory_that_jumps_to_and_fro_keeps_a_reference_on_each_side() -> None:
    anchors = begun()
    serve(anchors, 1.0)
    renew(anchors, 2.0, 1.0)
    for step in range(20):
        side = step % 2
        assert serve(anchors, side + 0.01 * step) == 1.0 + side
    # What is renewed is the one that serves; the other side stays.
    serve(anchors, 0.0)
    renew(anchors, 3.0, 0.0)
    assert serve(anchors, 0.1) == 3.0
    assert serve(anchors, 1.1) == 2.0


def test_each_reference_has_a_plan_of_its_own() -> None:
    anchors = begun()
    serve(anchors, 1.0)
    renew(anchors, 2.0, 1.0)
    serve(anchors, 1.0, 3)
    assert len(anchors.policy.history) == 3
    anchors.serve(point(0.0))
    assert len(anchors.policy.history) == 1


def test_a_reference_that_is_idle_is_given_up() -> None:
    anchors = begun()
    serve(anchors, 1.0)
    renew(anchors, 2.0, 1.0)
    serve(anchors, 1.0, IDLE)
    renew(anchors, 3.0, 1.0)
    assert serve(anchors, 0.0) == 3.0


def test_what_is_saved_goes_on_alike() -> None:
    anchors = begun()
    serve(anchors, 1.0, 2)
    renew(anchors, 2.0, 1.0)
    serve(anchors, 0.0, 2)
    again = Anchors(100, 0.01)
    again.load_state_dict(anchors.state_dict())
    assert isinstance(again.policy, RefreshPolicy)
    assert again.policy.state_dict() == anchors.policy.state_dict()
    assert again.policy.target == 0.01
    for x in (0.0, 1.0, 0.4, 0.6):
        assert serve(again, x) == serve(anchors, x)
