from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import dense
from tests.networks import Case, attention, cnn, mlp
from thalweg import registry, watch
from thalweg.errors import InvalidInput
from thalweg.integrations.dashboards import scalars
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss
from thalweg.measure.sharpness_by_block import TOLERANCE, sharpness_by_block
from thalweg.measure.step_state import StepState
from thalweg.operators.restricted import MODEL_BLOCKS, blocks_of, coordinates, layers_of
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace


def state_of(objective: Loss) -> StepState:
    theta = objective.theta()
    axis = torch.eye(len(theta), dtype=theta.dtype)[:, :1]
    source = FixedSubspace(Subspace(axis, torch.ones(1, dtype=theta.dtype)))
    return StepState(0, theta, objective, source, 0.1)


def largest(hessian: Tensor, objective: Objective, names: tuple[str, ...]) -> float:
    places = coordinates(objective.layout, names)
    return float(torch.linalg.eigvalsh(hessian[places][:, places])[-1])


@pytest.mark.parametrize("case", [attention(), cnn(), mlp()], ids=["attention", "cnn", "mlp"])
def test_it_is_the_top_eigenvalue_of_each_dense_block(case: Case) -> None:
    case = case.to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    hessian = dense.hessian(dense.flat_loss(case), objective.theta())
    layers = layers_of(objective.layout.names)
    for blocks in (MODEL_BLOCKS, layers):
        probe = sharpness_by_block(blocks)
        row = probe.measure(state_of(objective))
        assert set(row) <= set(probe.columns)
        error = row["sharpness_by_block_error"]
        assert isinstance(error, float)
        present = blocks_of(objective.layout.names, blocks)
        assert {c for c in row if "/" in c} == {f"sharpness_by_block/{b}" for b in present}
        for block, names in present.items():
            expected = largest(hessian, objective, names)
            found = row[f"sharpness_by_block/{block}"]
            assert found == pytest.approx(expected, rel=error), block
            assert error < 2 * TOLERANCE


def test_by_its_name_it_is_over_the_blocks_of_common_models() -> None:
    case = attention()
    objective = Objective(case.model, case.loss, case.data)
    named = registry.probes["sharpness_by_block"]
    assert named.columns == sharpness_by_block().columns
    assert named.measure(state_of(objective)) == sharpness_by_block().measure(state_of(objective))
    assert registry.probes.find("sharpness_by_block") is named


def test_a_chart_for_each_block_that_the_model_has() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    blocks = {"first": ["0.*"], "rest": ["*"], "nothing": ["embedding.*"]}
    sent: list[dict[str, float]] = []
    with watch(
        case.model,
        case.loss,
        case.data,
        optimizer,
        k=2,
        every=1,
        quiet=True,
        probes=[sharpness_by_block(blocks)],
        sinks=[lambda row, step: sent.append(scalars(row))],
    ) as watcher:
        optimizer.step()
    row = watcher.history[0]
    charts = {name for name in sent[0] if "by_block/" in name}
    assert charts == {"thalweg/sharpness_by_block/first", "thalweg/sharpness_by_block/rest"}
    assert row["sharpness_by_block/nothing"] is None
    assert 0 < row["sharpness_by_block/first"] <= row["sharpness"] * 1.01


def test_what_cannot_be_meant_is_refused_and_without_names_nothing_is_measured() -> None:
    with pytest.raises(InvalidInput, match="blocks"):
        sharpness_by_block({})
    case = mlp()
    objective = Objective(case.model, case.loss, case.data)
    with pytest.raises(InvalidInput, match="none of head matches a parameter"):
        sharpness_by_block({"head": ["lm_head.*"]}).measure(state_of(objective))
    plain = FunctionLoss(lambda t: (t * t).sum(), torch.ones(3))
    assert sharpness_by_block().measure(state_of(plain)) == {}
